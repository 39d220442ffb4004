"""The recipe against figures computed by hand from the report, and its invariants on random recipes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.train.recipe import Recipe

T, B = 1e12, 1e9
V3 = Recipe.v3()


@pytest.mark.parametrize(("tokens", "lr"), [
    (0, 0.0),
    (1 * T, 2.2e-4), (10 * T, 2.2e-4),
    (12.15 * T, 1.21e-4),  # middle of the cosine: the mean of 2.2e-4 and 2.2e-5
    (10 * T + 4.3 * T / 3, 2.2e-5 + 0.75 * 1.98e-4),  # a third: (1 + cos 60 degrees) / 2 = 3/4
    (14.3 * T, 2.2e-5), (14.4 * T, 2.2e-5), (14.633 * T, 2.2e-5),
    (14.633 * T + 1 * B, 7.3e-6), (14.8 * T, 7.3e-6),
])
def test_v3_learning_rate_at_hand_computed_points(tokens, lr):
    assert V3.lr(tokens) == pytest.approx(lr, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("tokens", "batch"), [(0, 3072), (469 * B / 4, 6144), (469 * B / 2, 9216), (469 * B, 15360),
                                               (14 * T, 15360)])
def test_v3_batch_ramp(tokens, batch):
    assert V3.batch_size(tokens) == batch


def test_v3_gamma_and_lambda_switch_exactly_where_the_report_says():
    assert [V3.gamma(t) for t in (0, 14.3 * T - 1, 14.3 * T, 14.8 * T)] == [1e-3, 1e-3, 0.0, 0.0]
    assert [V3.mtp_lambda(t) for t in (0, 10 * T - 1, 10 * T, 14.8 * T)] == [0.3, 0.3, 0.1, 0.1]
    assert V3.total_tokens - V3.gamma_until == 500 * B


def test_v3_last_phases_have_the_published_lengths():
    assert V3.floor_until - V3.cosine_until == pytest.approx(333 * B)
    assert V3.total_tokens - V3.floor_until == pytest.approx(167 * B)


def test_v3_warm_up_is_two_thousand_real_steps():
    """Count the steps one by one with whole batches: the independent way to the closed form."""
    tokens, rates = 0, []
    for _ in range(2000):
        tokens += V3.batch_size(tokens) * 4096
        rates.append(V3.lr(tokens))
    assert tokens == pytest.approx(28.07 * B, rel=1e-4)
    assert V3.tokens_after(2000) == pytest.approx(tokens, rel=1e-4)
    for step in (1, 500, 1000, 1999):
        assert rates[step - 1] == pytest.approx(2.2e-4 * step / 2000, rel=1e-3)
    assert rates[-1] == pytest.approx(2.2e-4, rel=1e-4)


def test_v3_learning_rate_is_continuous_but_for_the_published_last_drop():
    for boundary in (V3.tokens_after(2000), 10 * T, 14.3 * T):
        assert V3.lr(boundary - 1e6) == pytest.approx(V3.lr(boundary + 1e6), rel=1e-4)
    before, after = V3.lr(14.633 * T), V3.lr(14.633 * T + 1)
    assert (before, after) == (2.2e-5, 7.3e-6)


def test_scaled_keeps_the_shares_and_ratios_of_v3():
    toy = Recipe.scaled(1_480_000, sequence_length=128, batch=16, peak_lr=2.2e-3, warmup_steps=10)
    for million in (2, 5, 8, 10, 11, 12.15, 13.7, 14.5, 14.7, 14.8):
        assert toy.lr(million * 1e5) == pytest.approx(10 * V3.lr(million * T), rel=1e-9)
        assert toy.gamma(million * 1e5) == V3.gamma(million * T)
        assert toy.mtp_lambda(million * 1e5) == V3.mtp_lambda(million * T)
    assert (toy.batch_size(0), toy.batch_size(46_900)) == (3, 16)


recipes = st.builds(
    lambda total, length, batch, start, lr, warm: Recipe.scaled(
        total, sequence_length=length, batch=batch, batch_start=min(start, batch), peak_lr=lr, warmup_steps=warm),
    st.integers(400_000, 5_000_000), st.sampled_from([64, 128, 200]), st.integers(1, 64), st.integers(1, 64),
    st.floats(1e-5, 1e-1), st.integers(0, 20))


@given(recipes, st.floats(0, 1), st.floats(0, 1))
def test_steps_and_tokens_are_inverse_and_monotonic(recipe, a, b):
    low, high = sorted((a * recipe.total_tokens, b * recipe.total_tokens))
    assert recipe.steps(low) <= recipe.steps(high)
    assert recipe.tokens_after(recipe.steps(high)) == pytest.approx(high, rel=1e-6, abs=1e-3)


@settings(deadline=None)
@given(recipes)
def test_a_run_uses_up_its_budget_and_not_a_row_more(recipe):
    plan = list(recipe.batches())
    total = sum(size for _, size in plan) * recipe.sequence_length
    assert recipe.total_tokens <= total < recipe.total_tokens + recipe.sequence_length
    sizes = [size for _, size in plan[:-1]]
    assert sizes == sorted(sizes) and sizes[-1] <= recipe.batch
    # A step keeps the batch of its beginning while n(t) follows the growing line: at most 1 - b_k / b_(k+1) of a step
    # each, ln(b1 / b0) in all; rounding to whole sequences shifts the steps of the ramp by at most 1 / b0 each.
    slack = 1 + math.log(recipe.batch / recipe.batch_start) + recipe.steps(recipe.ramp_until) / recipe.batch_start
    assert abs(len(plan) - recipe.steps(recipe.total_tokens)) <= slack


@given(recipes)
def test_rates_stay_inside_their_bounds_and_only_fall_after_the_warm_up(recipe):
    warm = recipe.tokens_after(recipe.warmup_steps)
    points = [warm + (recipe.total_tokens - warm) * i / 50 for i in range(1, 51)]
    rates = [recipe.lr(p) for p in points]
    assert all(0 < r <= recipe.peak_lr for r in rates)
    assert all(x >= y for x, y in zip(rates, rates[1:], strict=False))
    assert rates[-1] == recipe.final_lr


@pytest.mark.parametrize(("change", "message"), [
    ({"batch": 0}, "batch = 0"), ({"batch_start": 40}, "batch_start = 40"), ({"peak_lr": math.nan}, "peak_lr = nan"),
    ({"peak_lr": -1.0}, "peak_lr = -1.0"), ({"warmup_steps": 10_000}, "warmup_steps = 10000"),
    ({"sequence_length": 0}, "sequence_length = 0"), ({"gamma": -0.1}, "gamma_value = -0.1"),
    ({"peak_lr": math.inf, "warmup_steps": 0}, "peak_lr = inf: must be finite"),
])
def test_impossible_recipes_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.scaled(100_000, **change)
