"""The rejection rule draws from the model's distribution, whatever the drafts: chi-square against the exact one."""

from itertools import product

import pytest
import torch

from minids.infer import SpeculationStats, generate, speculate
from minids.infer.sampling import draw, probabilities
from minids.infer.speculate import accept

# name -> vocabulary, tokens written, drafts, temperature, top_p
CASES = {"one_draft": ("plain_query", 5, 3, 1, 1.0, 1.0), "two_drafts": ("groups_yarn", 4, 4, 2, 1.0, 1.0),
         "shaped": ("groups_yarn", 4, 4, 2, 0.7, 0.8), "three_drafts": ("softmax_depth3", 3, 5, 3, 1.3, 0.95)}  # fmt: skip
PROMPT, BATCH = [1, 2, 0], 3_000


def chi_square_limit(cells: int) -> float:
    """The 99.99% quantile of chi-square with ``cells - 1`` degrees of freedom (Wilson and Hilferty)."""
    k = cells - 1
    return k * (1 - 2 / (9 * k) + 3.719 * (2 / (9 * k)) ** 0.5) ** 3


@torch.no_grad()
def exact(model, vocab: int, length: int, temperature: float, top_p: float) -> dict[tuple, float]:
    """The probability of every continuation, by the model without a cache."""
    texts = list(product(range(vocab), repeat=length))
    logits = model(torch.tensor([[*PROMPT, *text] for text in texts]), mtp=False).logits[:, len(PROMPT) - 1 : -1]
    p = probabilities(logits, temperature, top_p).double().gather(-1, torch.tensor(texts).unsqueeze(-1)).squeeze(-1)
    return dict(zip(texts, p.prod(1).tolist(), strict=True))


def distance(model, case: tuple, samples: int, stats: SpeculationStats | None = None) -> tuple[float, float]:
    """Chi-square of the speculated texts, and its limit. Cells expected fewer than 5 times are joined into one."""
    _, vocab, length, drafts, temperature, top_p = case
    counts: dict[tuple, int] = {}
    for start in range(0, samples, BATCH):
        for row in generate(model, [PROMPT] * BATCH, length, temperature=temperature, top_p=top_p, seed=start,
                            speculate=drafts, stats=stats):  # fmt: skip
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    expected = {text: samples * p for text, p in exact(model, vocab, length, temperature, top_p).items()}
    cells = [(counts.get(text, 0), e) for text, e in expected.items() if e >= 5]
    rest = [(counts.get(text, 0), e) for text, e in expected.items() if e < 5]
    cells.append((sum(c for c, _ in rest), sum(e for _, e in rest)))
    if any(expected[text] == 0 for text in counts):
        return float("inf"), 0.0
    return sum((c - e) ** 2 / e for c, e in cells if e), chi_square_limit(sum(e > 0 for _, e in cells))


def model_of(small, case: tuple):
    return small.random(case[0], seed=1, vocab_size=case[1], initializer_range=0.3)


@pytest.mark.parametrize("name", CASES)
def test_speculated_texts_follow_the_models_distribution(small, name):
    stats = SpeculationStats()
    got, limit = distance(model_of(small, CASES[name]), CASES[name], 12_000, stats)
    assert got < limit
    assert len(stats.acceptance) == CASES[name][3] and all(0.05 < share < 0.95 for share in stats.acceptance), str(stats)


def wrong_always(p, q, drafts, u):
    """Every draft is taken."""
    last = [draw(p[row, len(tokens)].unsqueeze(0), u[row][-1:]).item() for row, tokens in enumerate(drafts)]
    return [[*tokens, token] for tokens, token in zip(drafts, last, strict=True)]


def wrong_residual(p, q, drafts, u):
    """A rejected draft is replaced by a draw from p, not from what is missing to p."""
    found = []
    for row, tokens in enumerate(accept(p, q, drafts, u)):
        kept = len(tokens) - 1
        found.append([*tokens[:kept], draw(p[row, kept].unsqueeze(0), u[row][-1:]).item()])
    return found


def wrong_ratio(p, q, drafts, u):
    """Accepted with probability p, not p / q, and replaced by a draw from p."""
    return accept(p, torch.ones_like(q), drafts, u)


@pytest.mark.parametrize("rule", [wrong_always, wrong_residual, wrong_ratio])
def test_a_wrong_rule_is_found_out(small, monkeypatch, rule):
    """The test above can fail: three rules that are often written instead."""
    monkeypatch.setattr(speculate, "accept", rule)
    got, limit = distance(model_of(small, CASES["two_drafts"]), CASES["two_drafts"], 6_000)
    assert got > 1.5 * limit


def one_row(p: list, q: list, drafts: list[int], u: list[float]) -> list[int]:
    p, q = (torch.tensor([rows], dtype=torch.float32) for rows in (p, q))
    return accept(p, q, [drafts], [torch.tensor(u, dtype=torch.float64)])[0]


def test_the_rule_by_hand():
    p, q = [[0.5, 0.3, 0.2], [0.1, 0.9, 0.0], [0.2, 0.2, 0.6]], [[0.2, 0.6, 0.2], [0.1, 0.9, 0.0]]
    assert one_row(p, q, [1, 1], [0.49, 0.99, 0.1]) == [1, 1, 0]  # p/q = 1/2 and 1; then the last p
    assert one_row(p, q, [1, 1], [0.51, 0.0, 0.99]) == [0]  # rejected: all that is missing to p is at token 0
    assert one_row(p, q, [0, 1], [0.99, 0.99, 0.99]) == [0, 1, 2]  # p > q: always accepted
    assert one_row(p, q, [0], [0.99, 0.05]) == [0, 0]  # one draft where others have two: the second p
    assert one_row(p, q, [], [0.6]) == [1]
    # A draft that p cannot write is always rejected, even at u = 0.
    assert one_row([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0]], [0], [0.0, 0.5]) == [1]
    # Equal but for rounding, and rejected all the same: a draw from p.
    assert one_row([[0.5, 0.49999997], [1, 0]], [[0.5, 0.5]], [1], [1 - 2**-53, 0.2]) == [0]
