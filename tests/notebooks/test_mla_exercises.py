"""The checks of notebook 01's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import math

import pytest
import torch
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    return Lesson("01_mla", {"1": "my_scale", "2": "my_latents", "3": "my_merged", "4": "my_compress"})


# ---- 1, the scale ----------------------------------------------------------------------------------------------------


def scale(cfg, width=None, power=2, always=False, log=math.log, field="mscale_all_dim", weight=None):
    width = width or cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    s = cfg.rope_scaling or {}
    coefficient = s.get(field) or (1.0 if always else 0.0)
    coefficient = weight if weight and coefficient else coefficient
    return width**-0.5 * (0.1 * coefficient * log(s.get("factor", 1)) + 1) ** power


def careless_scale(cfg):
    """Right wherever the config says something of mscale_all_dim."""
    s = cfg.rope_scaling
    return cfg.qk_head_dim**-0.5 * (0.1 * s["mscale_all_dim"] * math.log(s["factor"]) + 1 if s else 1) ** 2


# ---- 2, what is cached -----------------------------------------------------------------------------------------------


def cache_entry(w, x, angles, norm=True, weight=True, rotate="pairs", norm_key=False, rotate_latent=False, sign=1,
                per_head=1, eps=1e-6, key_first=False, overwrite=False):  # fmt: skip
    size = w["kv_a_layernorm.weight"].numel()
    latent, key = (x @ w["kv_a_proj_with_mqa.weight"].T).split([size, 2 * angles.shape[1]], -1)

    def rms(v):
        return v / (v.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def turn(v):
        pairs = torch.complex(v[:, 0::2], v[:, 1::2]) if rotate == "pairs" else torch.complex(*v.chunk(2, -1))
        pairs = pairs * torch.exp(1j * sign * angles)
        if rotate == "pairs":
            return torch.view_as_real(pairs).flatten(1)
        return torch.cat([pairs.real, pairs.imag], -1)

    latent = rms(latent) if norm else latent
    latent = latent * w["kv_a_layernorm.weight"] if weight else latent
    key = turn(key) if rotate else key
    key = rms(key) if norm_key else key
    if rotate_latent:
        latent = torch.cat([turn(latent[:, : key.shape[1]]), latent[:, key.shape[1] :]], -1)
    if overwrite:
        x.zero_()
    return torch.cat([key, latent] if key_first else [latent] + [key] * per_head, -1)


# ---- 3, values absorbed into the output ------------------------------------------------------------------------------


def merged(kv_b, o, heads, n, part=1, by_head=True, o_by_head=True):
    if by_head:
        rows = kv_b.view(heads, -1, kv_b.shape[1])
        rows = rows[:, :n] if part == 0 else rows[:, n:]
    else:
        rows = kv_b[heads * n :].view(heads, -1, kv_b.shape[1])
    width = rows.shape[1]
    columns = o.view(-1, heads, width) if o_by_head else o.view(-1, width, heads).transpose(1, 2)
    return torch.stack([columns[:, h] @ rows[h] for h in range(heads)])


# ---- 4, low rank where the data lie ----------------------------------------------------------------------------------


def by_data(w_kv, x, rank):
    """The best rank-C map of x: project the outputs on their own leading directions."""
    directions = torch.linalg.svd(x @ w_kv.T, full_matrices=False).Vh[:rank]
    return directions @ w_kv, directions.T


def by_weights(w_kv, x, rank):
    u, s, vt = torch.linalg.svd(w_kv, full_matrices=False)
    return s[:rank, None] * vt[:rank], u[:, :rank]


def by_inputs(w_kv, x, rank):
    """Plausible, not best: keeps the leading directions of x instead of those of the outputs."""
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
    return directions, w_kv @ directions.T


RIGHT = [("1", scale), ("2", cache_entry), ("3", merged), ("4", by_data)]


@pytest.mark.parametrize("number", "1234")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("wrong, hint", [
    (lambda c: scale(c, width=c.qk_nope_head_dim), "the rotated ones count"),
    (lambda c: c.qk_head_dim**-0.5, "m\\^2"),
    (lambda c: c.qk_nope_head_dim**-0.5, "192 numbers"),
    (lambda c: scale(c, power=1), "once for the query"),
    (lambda c: scale(c, always=True), "mscale_all_dim"),
    (lambda c: scale(c, log=math.log10), "ln, not log10"),
    (lambda c: scale(c, field="mscale"), "switches the factor off"),
    (lambda c: scale(c, always=True, weight=1.0), "a = mscale_all_dim; 0 without"),
    (lambda c: scale(c, weight=1.0), "a = mscale_all_dim"),
    (lambda c: scale(c, width=c.qk_head_dim + c.qk_rope_head_dim), "not equal; .* is what came"),
])  # fmt: skip
def test_wrong_scales_are_named(lesson, wrong, hint):
    lesson.refuses("1", wrong, hint)


def test_a_config_may_say_nothing_of_mscale_all_dim(lesson):
    with pytest.raises(KeyError, match="mscale_all_dim"):
        lesson.attempt("1", careless_scale)


@pytest.mark.parametrize("slip, hint", [
    (dict(norm=False, weight=False), "norm on the latent is missing"),
    (dict(weight=False), "weight of the norm"),
    (dict(rotate=None), "key is not rotated"),
    (dict(rotate=None, norm=False, weight=False), "latent is normed and the key is rotated"),
    (dict(rotate="halves"), "neighbours"),
    (dict(sign=-1), "wrong way"),
    (dict(norm_key=True), "not on the key"),
    (dict(rotate_latent=True), "no position"),
    (dict(per_head=4), "one key for all heads"),
    (dict(eps=0), "needs its 1e-6"),
    (dict(key_first=True), "latent comes first"),
    (dict(overwrite=True), "an input was overwritten"),
    (dict(norm=False), "not equal; .* is what came"),
])  # fmt: skip
def test_wrong_cache_entries_are_named(lesson, slip, hint):
    lesson.refuses("2", lambda w, x, angles: cache_entry(w, x, angles, **slip), hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda *a: merged(*a, part=0), "key's factor"),
    (lambda *a: merged(*a, by_head=False), "sorted by head: its key rows"),
    (lambda *a: merged(*a, o_by_head=False), "columns of o"),
    (lambda *a: merged(*a).transpose(1, 2), "not \\(H, C, D\\)"),
    (lambda *a: merged(*a).sum(0), "one matrix for each head"),
    (lambda *a: 2 * merged(*a), "not equal"),
    (lambda *a: (merged(*a), a[0].zero_())[0], "an input was overwritten"),
    (lambda *a: merged(*a).split(2), "one tensor, not several"),
])  # fmt: skip
def test_wrong_merges_are_named(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (by_weights, "no better than the SVD"),
    (by_inputs, "times the optimum|no better"),
    (lambda w_kv, x, rank: by_data(w_kv, x, rank)[::-1], "shapes"),
    (lambda w_kv, x, rank: by_data(w_kv, x, rank + 1), "shapes"),
    (lambda w_kv, x, rank: by_data(w_kv, x - x.mean(0), rank), "times the optimum"),  # the mean is a part of the states
    (lambda w_kv, x, rank: by_data(w_kv, x, rank)[0], "the pair"),
])  # fmt: skip
def test_worse_compressions_fail(lesson, wrong, hint):
    lesson.refuses("4", wrong, hint)
