"""The checks of notebook 03's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import pytest
import torch
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    return Lesson("03_router", {"1": "my_router", "2": "my_bias", "3": "my_floor"}, missing=("trained", "tails", "end"))


# ---- 1, the router ---------------------------------------------------------------------------------------------------


def router(s, bias, cfg, best=2, fill=-torch.inf, leak=False, soft=False, groups=True, biased=True, scale=True,
           norm=True, count=None):  # fmt: skip
    """Token by token, experts by sorting: another way than the notebook's."""
    out = torch.zeros_like(s)
    size = s.shape[1] // cfg.n_group
    for n, row in enumerate(s):
        wish = row + bias if biased else row.clone()
        value = [sum(sorted(wish[g * size : (g + 1) * size].tolist())[-best:]) for g in range(cfg.n_group)]
        kept = sorted(range(cfg.n_group), key=value.__getitem__)[-cfg.topk_group :] if groups else range(cfg.n_group)
        masked = [wish[i].item() if i // size in kept else fill for i in range(len(row))]
        chosen = sorted(range(len(row)), key=masked.__getitem__)[-(count or cfg.num_experts_per_tok) :]
        gates = (wish if leak else row)[chosen]
        gates = gates.softmax(0) if soft else gates / (gates.sum() if norm else 1)
        out[n, chosen] = gates * (cfg.routed_scaling_factor if scale else 1)
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
    (dict(count=3), "not equal"),
])  # fmt: skip
def test_wrong_routers_are_named(lesson, slip, hint):
    lesson.refuses("1", lambda s, bias, cfg: router(s, bias, cfg, **slip), hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda b, c, g: 2 * b - bias_step(b, c, g), "wrong way"),
    (one_by_one, "not one a micro-batch"),
    (lambda b, c, g: b + (one_by_one(b, c, g) - b) / 3, "mean of the signs"),
    (lambda b, c, g: bias_step(b, c[-1:], g), "last micro-batch"),
    (lambda b, c, g: bias_step(b, c[:1], g), "first micro-batch"),
    (lambda b, c, g: b + g * (c.sum(0).double().mean() - c.sum(0)), "takes the sign"),
    (lambda b, c, g: b + g * (1 - c.sum(0) / c.sum(0).double().mean()), "takes the sign"),
    (lambda b, c, g: b + g * torch.where(c.sum(0) < c.sum() / 4, 1.0, -1.0), "stays where it is"),
    (lambda b, c, g: bias_step(b, c, g) - b, "that is the step"),
    (lambda b, c, g: bias_step(b, c, 2 * g), "not equal"),
])  # fmt: skip
def test_wrong_steps_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda n, k, e: 0.0, "never deals evenly"),
    (deviation, "largest of E"),
    (lambda n, k, e: deviation(n, k, e) * (2 * torch.tensor(e).log().item()) ** 0.5, "endless E"),
    (lambda n, k, e: 0.9 * floor(n, k, e), "\\(512, 2, 16\\)"),
    (lambda n, k, e: floor(n, k, e) * (1.2 if e == 256 else 1), "\\(4096, 8, 256\\)"),
])  # fmt: skip
def test_wrong_floors_fail(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)
