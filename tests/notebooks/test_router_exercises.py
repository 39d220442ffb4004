"""The checks of notebook 03's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import pytest
import torch
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    return Lesson("03_router", {"1": "my_router", "2": "my_bias", "3": "my_floor"}, missing=("trained", "tails", "end"))


# ---- 1, the router ---------------------------------------------------------------------------------------------------


def router(s, bias, cfg, best=2, fill=-torch.inf, leak=False, soft=False, groups=True, biased=True, scale=True,
           norm=True, count=None, sign=1, over_all=False, overwrite=False):  # fmt: skip
    """Token by token, experts by sorting: another way than the notebook's."""
    out, given = torch.zeros_like(s), bias
    bias = sign * bias
    size = s.shape[1] // cfg.n_group
    for n, row in enumerate(s):
        wish = row + bias if biased else row.clone()
        value = [sum(sorted(wish[g * size : (g + 1) * size].tolist())[-best:]) for g in range(cfg.n_group)]
        kept = sorted(range(cfg.n_group), key=value.__getitem__)[-cfg.topk_group :] if groups else range(cfg.n_group)
        masked = [wish[i].item() if i // size in kept else fill for i in range(len(row))]
        chosen = sorted(range(len(row)), key=masked.__getitem__)[-(count or cfg.num_experts_per_tok) :]
        gates = (wish if leak else row)[chosen]
        gates = gates.softmax(0) if soft else gates / ((row if over_all else gates).sum() if norm else 1)
        out[n, chosen] = gates * (cfg.routed_scaling_factor if scale else 1)
    if overwrite:
        s.zero_(), given.zero_()
    return out


# ---- 2, the bias -----------------------------------------------------------------------------------------------------


def bias_step(bias, counts, gamma):
    load = counts.sum(0)
    mean = load.sum().item() / len(load)
    return torch.stack([b + gamma * ((n < mean) * 1.0 - (n > mean) * 1.0) for b, n in zip(bias, load, strict=True)])


def one_by_one(bias, counts, gamma):
    for row in counts:
        bias = bias_step(bias, row[None], gamma)
    return bias


# ---- 3, the floor ----------------------------------------------------------------------------------------------------


def deviation(n, k, e):
    return ((e - k) / (n * k)) ** 0.5


def floor(n, k, e):
    """The largest of E normal deviates that sum to 0, times one expert's deviation; the skew of small loads is left out."""
    draws = torch.randn(20_000, e, generator=torch.Generator().manual_seed(1))
    largest = (draws - draws.mean(1, keepdim=True)).amax(1).mean().item() / (1 - 1 / e) ** 0.5
    return largest * deviation(n, k, e)


RIGHT = [("1", router), ("2", bias_step), ("3", floor)]


@pytest.mark.parametrize("number", "123")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("slip, hint", [
    (dict(leak=True), "leaks into the gate"),
    (dict(fill=0.0), "masked with 0"),
    (dict(soft=True), "softmax after"),
    (dict(best=1), "best two"),
    (dict(groups=False), "limit of groups"),
    (dict(biased=False), "no part in the choice"),
    (dict(scale=False), "routed_scaling_factor"),
    (dict(norm=False), "not normalised"),
    (dict(norm=False, scale=False), "neither"),
    (dict(best=4), "not all of a group"),
    (dict(sign=-1), "added, not subtracted"),
    (dict(over_all=True), "over the chosen, not over all"),
    (dict(count=3), "not equal; .* is what came"),
])  # fmt: skip
def test_wrong_routers_are_named(lesson, slip, hint):
    lesson.refuses("1", lambda s, bias, cfg: router(s, bias, cfg, **slip), hint)


def test_other_shapes_and_kinds_are_told(lesson, capsys):
    lesson.accepts("1", lambda *a: router(*a, overwrite=True), capsys)  # on copies: nothing is spoilt for other checks
    lesson.accepts("1", lambda *a: router(*a).tolist(), capsys)
    lesson.refuses("1", lambda *a: (router(*a), None), "one tensor, not several")
    lesson.refuses("1", lambda *a: router(*a)[:, :4], "\\(64, 4\\) is what came, \\(64, 16\\) what should")


def overwriting(bias, counts, gamma):
    answer = bias_step(bias, counts, gamma)
    counts.zero_()
    return answer


@pytest.mark.parametrize("wrong, hint", [
    (lambda b, c, g: b + g * (c.sum(0).median() - c.sum(0)).sign(), "mean, not median"),
    (lambda b, c, g: b + g * (c.sum() // c.shape[1] - c.sum(0)).sign(), "mean rounded down"),
    (overwriting, "counts was overwritten"),
    (lambda b, c, g: 2 * b - bias_step(b, c, g), "wrong way"),
    (one_by_one, "not one a micro-batch"),
    (lambda b, c, g: b + (one_by_one(b, c, g) - b) / 3, "mean of signs"),
    (lambda b, c, g: bias_step(b, c[-1:], g), "last micro-batch"),
    (lambda b, c, g: bias_step(b, c[:1], g), "first micro-batch"),
    (lambda b, c, g: b + g * (c.sum(0).double().mean() - c.sum(0)), "takes the sign"),
    (lambda b, c, g: b + g * (1 - c.sum(0) / c.sum(0).double().mean()), "takes the sign"),
    (lambda b, c, g: b + g * torch.where(c.sum(0) < c.sum() / c.shape[1], 1.0, -1.0), "at the mean stays"),
    (lambda b, c, g: bias_step(b, c, g) - b, "that is the step"),
    (lambda b, c, g: bias_step(b, c, 2 * g), "not equal"),
])  # fmt: skip
def test_wrong_steps_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda n, k, e: 0.0, "never deals evenly"),
    (deviation, "largest of E"),
    (lambda n, k, e: deviation(n, k, e) * (2 * torch.tensor(e).log().item()) ** 0.5, "endless E"),
    (lambda n, k, e: 0.9 * floor(n, k, e), "\\(512, 2, 16\\).*-.*% off"),
    (lambda n, k, e: floor(n, k, e) * (1.2 if e == 256 else 1), "\\(4096, 8, 256\\)"),
])  # fmt: skip
def test_wrong_floors_fail(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)
