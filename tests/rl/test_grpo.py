"""The objective against scalar loops written from the formula, hand-worked cases, and the traps."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.rl.grpo import (
    Denominators,
    GRPOConfig,
    clipped_surrogate,
    group_advantages,
    grpo_loss,
    informative,
    k3,
    token_logprobs,
)

CONFIGS = [
    GRPOConfig(), GRPOConfig(beta=0.0), GRPOConfig(clip_low=0.1, clip_high=0.28, beta=0.04, length="token"),
    GRPOConfig(beta=0.0, length="constant", length_scale=9, std=None), GRPOConfig(clip_low=10, clip_high=10, beta=1.0),
]  # fmt: skip


def scalar_loss(logp, old, advantages, mask, ref, config):
    """-J with Python numbers, a term at a time."""
    tokens = sum(sum(row) for row in mask)
    total = 0.0
    for i, advantage in enumerate(advantages):
        length = sum(mask[i])
        inner = 0.0
        for t, counted in enumerate(mask[i]):
            if not counted:
                continue
            ratio = math.exp(logp[i][t] - old[i][t])
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            term = min(ratio * advantage, clipped * advantage)
            if config.beta:
                r = math.exp(ref[i][t] - logp[i][t])
                term -= config.beta * (r - math.log(r) - 1)
            inner += term
        if config.length == "answer":
            total += inner / length / len(advantages)
        elif config.length == "constant":
            total += inner / config.length_scale / len(advantages)
        else:
            total += inner / tokens
    return -total


def scalar_gradient(logp, old, advantages, mask, ref, config):
    """d(-J)/d(logp) by the rules of calculus: rho A where the clip does not bind, and beta (1 - r) of KL."""
    tokens = sum(sum(row) for row in mask)
    gradient = [[0.0] * len(row) for row in logp]
    for i, advantage in enumerate(advantages):
        scale = {"answer": 1 / sum(mask[i]) / len(advantages), "token": 1 / tokens,
                 "constant": 1 / (config.length_scale or 1) / len(advantages)}[config.length]  # fmt: skip
        for t, counted in enumerate(mask[i]):
            if counted:
                ratio = math.exp(logp[i][t] - old[i][t])
                binds = ratio > 1 + config.clip_high if advantage > 0 else ratio < 1 - config.clip_low
                slope = 0.0 if binds else ratio * advantage
                kl = config.beta * (1 - math.exp(ref[i][t] - logp[i][t])) if config.beta else 0.0
                gradient[i][t] = -scale * (slope - kl)
    return gradient


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(CONFIGS), st.integers(1, 3), st.integers(2, 4), st.integers(1, 6))
def test_loss_and_gradient_are_those_of_the_formula(seed, config, questions, answers, length):
    g = torch.Generator().manual_seed(seed)
    b = questions * answers
    logp, old, ref = (-3 * torch.rand(b, length, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.randint(1, length + 1, (b,), generator=g)
    mask = torch.arange(length) < lengths.unsqueeze(1)
    advantages = group_advantages(torch.randint(0, 3, (questions, answers), generator=g).double(), config.std).flatten()
    logp.requires_grad_()
    loss, stats = grpo_loss(logp, old, advantages, mask, ref, config)
    loss.backward()
    lists = [x.tolist() for x in (logp.detach(), old, advantages, mask, ref)]
    assert float(loss.detach()) == pytest.approx(scalar_loss(*lists, config), abs=1e-12)
    wanted = torch.tensor(scalar_gradient(*lists, config), dtype=torch.float64)
    torch.testing.assert_close(logp.grad, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats["policy"] + config.beta * stats["kl"], loss.detach())


# ratio, A, value with eps = 0.2, whether the gradient survives
HAND = [(1.0, 2.0, 2.0, True), (1.5, 1.0, 1.2, False), (0.5, 1.0, 0.5, True), (2.0, -1.0, -2.0, True),
        (0.5, -1.0, -0.8, False), (1.1, -1.0, -1.1, True), (0.9, 3.0, 2.7, True)]  # fmt: skip


@pytest.mark.parametrize(("ratio", "advantage", "value", "alive"), HAND)
def test_clip_by_hand(ratio, advantage, value, alive):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    config = GRPOConfig(beta=0.0)
    loss, stats = grpo_loss(logp, torch.zeros(1, 1).double(), torch.tensor([advantage]).double(), one, config=config)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-value)
    assert float(logp.grad) == pytest.approx(-ratio * advantage if alive else 0.0)
    assert float(stats["clipped"]) == (0.0 if alive else 1.0)


def test_two_answers_of_three_tokens_by_hand():
    """Rewards 1 and 0: A = +1, -1. Ratios are 1, so the loss is 0 and the gradient -A/(3 * 2) at each token."""
    logp = torch.full((2, 3), -0.7, dtype=torch.float64, requires_grad=True)
    advantages = group_advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64)).flatten()
    assert advantages.tolist() == [1.0, -1.0]
    loss, _ = grpo_loss(logp, logp.detach(), advantages, torch.ones(2, 3, dtype=torch.bool), config=GRPOConfig(beta=0.0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    torch.testing.assert_close(logp.grad, torch.tensor([[-1 / 6] * 3, [1 / 6] * 3], dtype=torch.float64))


def test_advantages_against_the_statistics_module():
    rewards = [[0.0, 1.0, 1.0, 0.2], [3.0, -1.0, 0.0, 5.0]]
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    sample = group_advantages(torch.tensor(rewards, dtype=torch.float64), "sample")
    plain = group_advantages(torch.tensor(rewards, dtype=torch.float64), None)
    for q, row in enumerate(rewards):
        mean = statistics.fmean(row)
        assert plain[q].tolist() == pytest.approx([r - mean for r in row])
        assert found[q].tolist() == pytest.approx([(r - mean) / statistics.pstdev(row) for r in row])
        assert sample[q].tolist() == pytest.approx([(r - mean) / statistics.stdev(row) for r in row])


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
       st.sampled_from(["population", "sample", None]))  # fmt: skip
def test_advantages_are_centred_and_finite(rewards, std):
    rewards_QG = torch.tensor(rewards, dtype=torch.float64)
    found = group_advantages(rewards_QG, std)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.mean(1), torch.zeros(len(found), dtype=torch.float64), rtol=0, atol=1e-6)
    assert ((found == 0).all(1) | informative(rewards_QG)).all()


def test_sums_that_differ_by_rounding_are_equal_and_others_are_not():
    """0.1 + 0.2 is not 0.3 in floating point: as an advantage that would be 1.73 against 0.58 three times."""
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3], [0.3, 0.3 + 1e-9, 0.3, 0.3], [0.0, 1e-30, 0.0, 0.0]],
                           dtype=torch.float64)  # fmt: skip
    assert rewards[0, 0] != rewards[0, 1]
    assert informative(rewards).tolist() == [False, True, True]
    advantages = group_advantages(rewards)
    assert (advantages[0] == 0).all()
    assert advantages[1].tolist() == pytest.approx([-(3**-0.5), 3**0.5, -(3**-0.5), -(3**-0.5)], rel=1e-5)


@pytest.mark.parametrize(("least", "dtype"), [(1e-300, torch.float64), (1e-30, torch.float32)])
@pytest.mark.parametrize("std", ["population", "sample"])
def test_differences_whose_squares_vanish_are_no_infinities(least, dtype, std):
    found = group_advantages(torch.tensor([[least, 2 * least, 0.0]], dtype=dtype), std)
    assert torch.isfinite(found).all() and found[0, 1] > 0 > found[0, 2]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e7 + 0.7, 0.0])
@pytest.mark.parametrize("std", ["population", "sample", None])
def test_equal_rewards_give_exactly_nothing(value, std):
    """0.1 seven times has a float32 mean other than 0.1: divided by its own rounding that would be an advantage of 1."""
    rewards = torch.full((2, 7), value)
    assert group_advantages(rewards, std).abs().max() == 0.0
    assert not informative(rewards).any()
    logp = torch.randn(14, 3, requires_grad=True)
    loss, _ = grpo_loss(logp, logp.detach(), group_advantages(rewards, std).flatten(), torch.ones(14, 3, dtype=torch.bool),
                        config=GRPOConfig(beta=0.0))  # fmt: skip
    loss.backward()
    assert logp.grad.abs().max() == 0.0


def test_k3_is_an_unbiased_estimate_with_the_gradient_of_the_kl():
    """Summed over a vocabulary with the policy's probabilities k3 is KL(pi || ref); at pi = ref its slope is zero, while
    the slope of mean(log pi - log ref), the wrong loss, is one for each sample."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 50, generator=g, dtype=torch.float64)).log_softmax(-1)
    assert float((p.exp() * k3(p, q)).sum()) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-12)
    assert (k3(p, q) >= 0).all() and (k3(p, p) == 0).all()
    x = p.clone().requires_grad_()
    k3(x, p).sum().backward()
    assert x.grad.abs().max() == 0.0
    tiny = torch.tensor(1e-7, dtype=torch.float32)  # the plain form gives 0 or 1.2e-7 here, not 5e-15
    assert float(k3(torch.tensor(0.0), tiny)) == pytest.approx(5e-15, abs=1e-14)


def test_padding_counts_nowhere_even_when_it_is_nan():
    config = GRPOConfig()
    g = torch.Generator().manual_seed(1)
    logp, old, ref = (-torch.rand(4, 3, generator=g) for _ in range(3))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    clean = logp.clone().requires_grad_()
    wanted, _ = grpo_loss(clean, old, advantages, mask, ref, config)
    wanted.backward()
    dirty = [x.masked_fill(~mask, bad) for x, bad in ((logp, float("nan")), (old, float("inf")), (ref, -float("inf")))]
    dirty[0].requires_grad_()
    found, stats = grpo_loss(dirty[0], dirty[1], advantages, mask, dirty[2], config)
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(dirty[0].grad, clean.grad, rtol=0, atol=0)
    assert (clean.grad[~mask] == 0).all() and torch.isfinite(stats["ratio_max"])


@pytest.mark.parametrize("config", CONFIGS)
def test_micro_batches_add_up_to_the_batch(config):
    g = torch.Generator().manual_seed(2)
    logp, old, ref = (-torch.rand(6, 5, generator=g, dtype=torch.float64) for _ in range(3))
    advantages = torch.randn(6, generator=g, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2], [5], [4]])
    whole, _ = grpo_loss(logp, old, advantages, mask, ref, config)
    over = Denominators.of(mask)
    parts = [grpo_loss(logp[s], old[s], advantages[s], mask[s], ref[s], config, over)[0]
             for s in (slice(0, 1), slice(1, 4), slice(4, 6))]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


def test_length_bias_of_the_three_averages():
    """Two wrong answers, one three times as long: 1/|o| pushes each of the long one's tokens a third as hard."""
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    def slope(config):
        logp = torch.zeros(2, 6, requires_grad=True)
        grpo_loss(logp, torch.zeros(2, 6), torch.tensor([-1.0, -1.0]), mask, config=config)[0].backward()
        return logp.grad[0, 0] / logp.grad[1, 0]
    assert float(slope(GRPOConfig(beta=0.0))) == pytest.approx(3.0)
    assert float(slope(GRPOConfig(beta=0.0, length="constant", length_scale=6))) == pytest.approx(1.0)
    assert float(slope(GRPOConfig(beta=0.0, length="token"))) == pytest.approx(1.0)


def test_scores_are_those_of_the_tempered_distribution():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4, 9, generator=g, dtype=torch.float64)
    tokens = torch.randint(0, 9, (2, 4), generator=g)
    for temperature in (0.6, 1.0, 2.0):
        wanted = (logits / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(token_logprobs(logits, tokens, temperature), wanted.float(), rtol=0, atol=1e-5)


def good():
    return {"logp_BT": torch.zeros(2, 3, requires_grad=True), "old_logp_BT": torch.zeros(2, 3),
            "advantages_B": torch.zeros(2), "mask_BT": torch.ones(2, 3, dtype=torch.bool),
            "ref_logp_BT": torch.zeros(2, 3)}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    ({"logp_BT": torch.zeros(3)}, "logp"), ({"mask_BT": torch.ones(2, 3)}, "mask of torch.float32"),
    ({"old_logp_BT": torch.zeros(2, 4)}, r"old_logp of shape \(2, 4\)"),
    ({"advantages_B": torch.zeros(2, 1)}, "one an answer"),
    ({"ref_logp_BT": None}, "beta = 0.001"), ({"old_logp_BT": torch.zeros(2, 3, requires_grad=True)}, "detach"),
])  # fmt: skip
def test_bad_tensors_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**good() | change)


@pytest.mark.parametrize(("change", "message"), [
    ({"clip_low": -0.1}, "clip_low"), ({"clip_high": math.inf}, "clip_high"), ({"beta": math.nan}, "beta"),
    ({"length": "mean"}, "length"), ({"length": "constant"}, "length_scale"), ({"length_scale": 5}, "length_scale"),
    ({"length": "constant", "length_scale": 0}, "length_scale"), ({"std": "none"}, "std"),
])  # fmt: skip
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**change)


@pytest.mark.parametrize("rewards", [torch.zeros(4), torch.zeros(2, 1), torch.zeros(2, 2, dtype=torch.int64),
                                     torch.tensor([[0.0, math.nan]])])  # fmt: skip
def test_bad_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(rewards)


def test_the_clip_alone():
    assert clipped_surrogate(torch.tensor(2.0), torch.tensor(-1.0), 0.2, 0.2) == -2.0
