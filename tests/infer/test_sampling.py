"""Sampling against hand-worked cases, brute force over subsets, and exact distributions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.infer import sampling
from minids.infer.sampling import (
    MAX_SEED,
    check_sampling,
    check_seed,
    draw,
    greedy,
    keep_nucleus,
    probabilities,
    row_generators,
    sample,
    uniforms,
)


def test_greedy_takes_the_largest_and_of_ties_the_lowest_id():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    assert greedy(logits).tolist() == [1, 1, 0]


def test_temperature_is_a_division_of_the_logits():
    logits = torch.tensor([[0.0, math.log(4.0)]])
    torch.testing.assert_close(probabilities(logits, 1.0), torch.tensor([[0.2, 0.8]]))
    torch.testing.assert_close(probabilities(logits, 2.0), torch.tensor([[1 / 3, 2 / 3]]))
    torch.testing.assert_close(probabilities(logits, 0.5), torch.tensor([[1 / 17, 16 / 17]]))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_small_temperature_becomes_greedy_without_overflow(temperature):
    logits = 50 * torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(greedy(logits), 100).float()
    torch.testing.assert_close(probabilities(logits, temperature), one_hot)


def test_small_temperature_shares_the_mass_among_equal_maxima():
    torch.testing.assert_close(probabilities(torch.tensor([[1.0, 9.0, 9.0]]), 1e-30), torch.tensor([[0.0, 0.5, 0.5]]))


def test_large_temperature_becomes_uniform():
    torch.testing.assert_close(probabilities(torch.tensor([[-9.0, 0.0, 9.0]]), 1e9), torch.full((1, 3), 1 / 3))


def test_nucleus_by_hand():
    probs = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    assert keep_nucleus(probs, 0.3).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert keep_nucleus(probs, 0.5).tolist() == [[0.0, 1.0, 0.0, 0.0]]  # exactly reached: nothing more is needed
    torch.testing.assert_close(keep_nucleus(probs, 0.51), torch.tensor([[0.0, 2 / 3, 1 / 3, 0.0]]))
    torch.testing.assert_close(keep_nucleus(probs, 0.76), torch.tensor([[1 / 7, 4 / 7, 2 / 7, 0.0]]))  # tie: lower id
    assert keep_nucleus(probs, 1e-9).tolist() == [[0.0, 1.0, 0.0, 0.0]]  # the first token always stays


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 8), min_size=1, max_size=7).filter(any), sixtyfourths=st.integers(1, 63))
def test_nucleus_is_the_smallest_set_that_reaches_p(counts, sixtyfourths):
    """Brute force over all subsets of up to seven tokens with probabilities count / total."""
    total, p = sum(counts), sixtyfourths / 64 + 1 / 1000  # no count / total equals this p, as total <= 56
    probs = torch.tensor([counts], dtype=torch.float64) / total
    kept = keep_nucleus(probs, p)[0]
    subsets = (s for size in range(1, len(counts) + 1) for s in itertools.combinations(range(len(counts)), size))
    enough = [s for s in subsets if sum(counts[i] for i in s) / total >= p]
    smallest = min(len(s) for s in enough)
    best = max(sum(counts[i] for i in s) for s in enough if len(s) == smallest)
    support = kept.nonzero().flatten().tolist()
    assert len(support) == smallest
    assert sum(counts[i] for i in support) == best
    torch.testing.assert_close(kept[support], torch.tensor([counts[i] / best for i in support], dtype=torch.float64))


def test_top_p_one_keeps_the_whole_distribution():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(probabilities(logits, 0.7, 1.0), torch.softmax(logits / 0.7, -1))
    assert (probabilities(logits, 0.7, 1.0) > 0).all()


def test_draw_inverts_the_cumulative_distribution():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(7, -1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs, u).tolist() == [1, 1, 3, 3, 3, 4, 4]  # never 0, 2 or 5, whose probability is zero


def test_draw_is_exact_for_a_fine_grid_of_uniforms():
    """The share of evenly spaced u that give token v is p_v, to within one grid step."""
    probs = probabilities(torch.randn(1, 40, generator=torch.Generator().manual_seed(2)), 1.0)
    n = 20_000
    tokens = draw(probs.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    share = torch.bincount(tokens, minlength=40) / n
    assert (share - probs[0]).abs().max() <= 1.01 / n


def test_sample_follows_the_distribution():
    """Chi-square over 20,000 seeded draws; 99.9% quantile of 9 degrees of freedom is 27.9."""
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    n = 20_000
    tokens = sample(logits.expand(n, -1), 0.8, 1.0, row_generators(range(n)))
    expected = n * torch.softmax(logits[0] / 0.8, -1)
    chi_square = ((torch.bincount(tokens, minlength=10) - expected) ** 2 / expected).sum().item()
    assert chi_square < 27.9


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 9), min_size=12, max_size=12).filter(any), min_size=1, max_size=3),
       st.floats(0.01, 0.999), st.integers(1, 12))  # fmt: skip
def test_the_head_is_enough_or_the_whole_is_sorted(counts, top_p, head):
    """Rows of small counts, so full of equals; heads that end before, in and behind the nucleus. The definition: a token
    stays if those before it, more probable or equal and of lower id, have not reached top_p."""
    probs = torch.tensor(counts, dtype=torch.float64)
    probs /= probs.sum(-1, keepdim=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "HEAD", head)
        kept = keep_nucleus(probs, top_p)
    order, values = probs.sort(dim=-1, descending=True, stable=True)[::-1]
    stays = values.cumsum(-1) - values < top_p
    expected = torch.zeros_like(probs).scatter(-1, order, values * stays)
    torch.testing.assert_close(kept, expected / expected.sum(-1, keepdim=True))


def test_sample_never_leaves_the_nucleus():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])).expand(2000, -1)
    drawn = sample(logits, 1.0, 0.65, row_generators(range(2000)))
    assert set(drawn.tolist()) == {0, 1}
    assert abs((drawn == 0).float().mean().item() - 4 / 7) < 0.05


def test_a_row_depends_on_its_own_generator_alone():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(4))
    together, alone = row_generators([7, 8, 9, 10, 11]), row_generators([7, 8, 9, 10, 11])
    for _ in range(4):
        batch = sample(logits, 1.0, 0.9, together).tolist()
        assert batch == [sample(logits[i : i + 1], 1.0, 0.9, [alone[i]]).item() for i in range(5)]


def test_equal_seeds_repeat_and_different_seeds_differ():
    first, again, other = (torch.stack([uniforms(g) for _ in range(8)]) for g in map(row_generators, ([1], [1], [2])))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.unique().numel() == 8 and ((first >= 0) & (first < 1)).all()


def test_greedy_sampling_leaves_generators_alone():
    generators = row_generators([5])
    sample(torch.zeros(1, 4), 0.0, 1.0, generators)
    assert torch.equal(uniforms(generators), uniforms(row_generators([5])))


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan])
def test_impossible_temperature_is_named(temperature):
    with pytest.raises(ValueError, match=r"temperature must be finite and >= 0.*got " + str(temperature)):
        check_sampling(temperature, 1.0)


@pytest.mark.parametrize("top_p", [0, -0.5, 1.01, math.nan])
def test_impossible_top_p_is_named(top_p):
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\].*got " + str(top_p)):
        check_sampling(1.0, top_p)


@pytest.mark.parametrize(
    ("knobs", "name"), [(("1", 1.0), "temperature"), ((1.0, None), "top_p"), ((True, 1.0), "temperature")]
)
def test_knobs_must_be_numbers(knobs, name):
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        check_sampling(*knobs)


def test_seeds_are_checked():
    check_seed(0)
    check_seed(MAX_SEED)
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(ValueError, match=rf"seed must be in \[0, {MAX_SEED}\], got {seed}"):
            check_seed(seed)
    with pytest.raises(TypeError, match="seed must be an integer, got 1.5"):
        check_seed(1.5)
