"""The checks of notebook 01's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import math

import pytest
import torch
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    return Lesson("01_mla", {"1": "my_scale", "2": "my_latents", "3": "my_merged", "4": "my_compress"})


# ---- 1, the scale ----------------------------------------------------------------------------------------------------


def scale(cfg, width=None, power=2, always=False):
    width = width or cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    s = cfg.rope_scaling or {}
    coefficient = s.get("mscale_all_dim") or (1.0 if always else 0.0)
    return width**-0.5 * (0.1 * coefficient * math.log(s.get("factor", 1)) + 1) ** power


# ---- 2, what is cached -----------------------------------------------------------------------------------------------


def cache_entry(w, x, angles, norm=True, weight=True, rotate="pairs", norm_key=False, rotate_latent=False, sign=1,
                per_head=1):  # fmt: skip
    size = w["kv_a_layernorm.weight"].numel()
    latent, key = (x @ w["kv_a_proj_with_mqa.weight"].T).split([size, 2 * angles.shape[1]], -1)

    def rms(v):
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

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
    return torch.cat([latent] + [key] * per_head, -1)


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
    (lambda c: scale(c, width=c.qk_head_dim + c.qk_rope_head_dim), "not equal"),
])  # fmt: skip
def test_wrong_scales_are_named(lesson, wrong, hint):
    lesson.refuses("1", wrong, hint)


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
    (dict(norm=False), "not equal"),
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
])  # fmt: skip
def test_wrong_merges_are_named(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (by_weights, "no better than the SVD"),
    (by_inputs, "times the optimum|no better"),
    (lambda w_kv, x, rank: by_data(w_kv, x, rank)[::-1], "shapes"),
    (lambda w_kv, x, rank: by_data(w_kv, x, rank + 1), "shapes"),
])  # fmt: skip
def test_worse_compressions_fail(lesson, wrong, hint):
    lesson.refuses("4", wrong, hint)
