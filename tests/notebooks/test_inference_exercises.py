"""The checks of notebook 11's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

from fractions import Fraction

import pytest
import torch
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    return Lesson("11_inference", {"1": "my_rule", "2": "my_mask", "3": "my_two"})


# ---- 1, the rule -----------------------------------------------------------------------------------------------------


def rule(p, q):
    """Token by token, with Python's numbers."""
    pairs = list(zip(p.tolist(), q.tolist(), strict=True))
    chance = torch.tensor([min(1.0, a / b) if b else 1.0 for a, b in pairs], dtype=torch.float64)
    missing = [max(0.0, a - b) for a, b in pairs]
    rest = missing if sum(missing) else p.tolist()
    return chance, torch.tensor(rest, dtype=torch.float64) / sum(rest)


def otherwise(chance=None, rest=None):
    """The rule with one of its halves replaced."""

    def answer(p, q):
        right = rule(p, q)
        return (chance(p, q) if chance else right[0]), (rest(p, q) if rest else right[1])

    return answer


# ---- 2, the mask -----------------------------------------------------------------------------------------------------


def mask(lengths, new, slots, shift=0, causal=True, own=True):
    """Cell by cell."""
    out = torch.zeros(len(lengths), 1, new, slots, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist() if own else [int(lengths.max())] * len(lengths)):
        for t in range(new):
            for s in range(slots):
                out[row, 0, t, s] = s <= length + (t if causal else new - 1) + shift
    return out


def past_only(lengths, new, slots):
    return mask(lengths, 1, slots, shift=-1).expand(-1, 1, new, slots)


# ---- 3, two drafts for one place -------------------------------------------------------------------------------------


def two(p, q, x1, x2):
    """The first by the rule; after a rejection the second by the rule again, with the residual in place of p."""
    out, left, target = [Fraction(0)] * len(p), Fraction(1), list(p)
    for x in (x1, x2):
        accepted = left * min(Fraction(1), target[x] / q[x]) if q[x] else Fraction(0)
        out[x] += accepted
        left -= accepted
        missing = [max(Fraction(0), a - b) for a, b in zip(target, q, strict=True)]
        target = [m / sum(missing) for m in missing] if sum(missing) else target
    return [o + left * t for o, t in zip(out, target, strict=True)]


def first_only(p, q, x1, x2):
    chance = min(Fraction(1), p[x1] / q[x1]) if q[x1] else Fraction(0)
    missing = [max(Fraction(0), a - b) for a, b in zip(p, q, strict=True)]
    rest = [m / sum(missing) for m in missing] if sum(missing) else list(p)
    return [chance * (x == x1) + (1 - chance) * r for x, r in enumerate(rest)]


def same_p_twice(p, q, x1, x2):
    """The second draft judged by p, not by the residual."""
    first, second = first_only(p, q, x1, x2), first_only(p, q, x2, x2)
    chance = min(Fraction(1), p[x1] / q[x1]) if q[x1] else Fraction(0)
    return [chance * (x == x1) + (1 - chance) * second[x] for x in range(len(first))]


RIGHT = [("1", rule), ("2", mask), ("3", two)]


@pytest.mark.parametrize("number", "123")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("wrong, hint", [
    (otherwise(rest=lambda p, q: p), "p itself is biased"),
    (otherwise(rest=lambda p, q: (p - q).clamp(min=0)), "not normalised"),
    (otherwise(rest=lambda p, q: (q - p).clamp(min=0) / (q - p).clamp(min=0).sum()), "that is q - p"),
    (otherwise(rest=lambda p, q: (p - q).abs() / (p - q).abs().sum()), "max, not abs"),
    (otherwise(chance=torch.minimum), "divide by q"),
    (otherwise(chance=lambda p, q: (q / p).clamp(max=1).nan_to_num(1.0)), "p / q"),
    (otherwise(chance=lambda p, q: p), "q is forgotten"),
    (otherwise(chance=lambda p, q: (p == p.max()).double()), "no argmax"),
    (otherwise(chance=lambda p, q: torch.where(q > 0, p / q, 1.0)), "at most 1"),
    (otherwise(chance=lambda p, q: (p / q).clamp(max=1)), "1 where q is 0"),
    (otherwise(rest=lambda p, q: (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()), "exercise 1: p = q"),
    (otherwise(rest=lambda p, q: p - q), "cut p - q at 0"),
    (otherwise(chance=lambda p, q: (p >= q).double()), "yes or no"),
])  # fmt: skip
def test_wrong_rules_are_named(lesson, wrong, hint):
    lesson.refuses("1", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda *a: mask(*a, causal=False), "causal among themselves"),
    (lambda *a: mask(*a, shift=-1), "sees itself"),
    (lambda *a: mask(*a, shift=1), "one slot too many"),
    (lambda *a: mask(*a, own=False), "lengths of their own"),
    (lambda *a: ~mask(*a), "True where it may look"),
    (past_only, "not the past only"),
    (lambda *a: mask(*a)[:, 0], "\\(B, 1, T, S\\)"),
    (lambda *a: mask(*a).float(), "bool"),
    (lambda *a: mask(*a).transpose(1, 2), "\\(B, 1, T, S\\)"),
    (lambda *a: mask(*a).tril(), "not equal"),
])  # fmt: skip
def test_wrong_masks_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (first_only, "no more than one draft"),
    (same_p_twice, "is not p"),
    (lambda p, q, x1, x2: [Fraction(x == x1) for x in range(4)], "is not p"),
    (lambda p, q, x1, x2: list(p), "no more than one draft"),
    (lambda p, q, x1, x2: [2 * x for x in two(p, q, x1, x2)], "not a distribution"),
])  # fmt: skip
def test_wrong_pairs_of_drafts_fail(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)
