"""The checks of notebook 13's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import math

import pytest
import torch
import torch.nn.functional as F
from exercises import Lesson

from minids.rl.tasks import LANGUAGES


@pytest.fixture(scope="module")
def lesson():
    """The exercises need nothing of the lesson."""
    return Lesson("13_r1_pipeline", {"1": "my_language", "2": "my_judge_loss", "3": "my_yield"}, needed=("mistakes2 =",),
                  given={"math": math, "torch": torch, "F": F, "LANGUAGES": LANGUAGES})  # fmt: skip


def language(chain, ours, theirs, empty, signs=False, other=False, strict=False):
    mine = [letter for letter in chain if letter in (theirs if other else ours)]
    words = [letter for letter in chain if signs or letter in ours or letter in theirs]
    if not words:
        return empty
    return float(len(mine) == len(words)) if strict else len(mine) / len(words)


def judge(better, worse, total=1.0, slope=1.0):
    gaps = [b - w for b, w in zip(better, worse, strict=True)]
    each = [max(0.0, -g) + math.log1p(math.exp(-abs(g))) for g in gaps]
    low = [math.exp(-max(0.0, g)) / (math.exp(-max(0.0, g)) + math.exp(min(0.0, g))) for g in gaps]
    return [total * sum(each) / len(gaps), *(-slope * x / len(gaps) for x in low)]


def naive(better, worse):
    """The formula as it stands."""
    odds = [math.exp(w - b) for b, w in zip(better, worse, strict=True)]
    return [sum(math.log(1 + o) for o in odds) / len(odds), *(-o / (1 + o) / len(odds) for o in odds)]


def overflowing(better, worse):
    gaps = [b - w for b, w in zip(better, worse, strict=True)]
    odds = [math.exp(min(-g, 700.0)) for g in gaps]  # what is left of a naive exponential that overflows
    return [sum(math.log(1 + o) for o in odds) / len(gaps), *(-o / (1 + o) / len(gaps) for o in odds)]


def reported(p, n, at_least_one=None, of=1.0, cap=False):
    found = [1 - math.pow(1 - q, n) for q in p] if at_least_one is None else at_least_one
    kept = [n * q for q in p]
    return [sum(kept) / of, sum(found) / len(p), max(found) / sum(found) if cap else max(kept) / sum(kept)]


RIGHT = [("1", language), ("2", judge), ("3", reported)]


@pytest.mark.parametrize("number", "123")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


WRONG = [
    ("1", lambda c, o, t, e: language(c, o, t, 1.0), "empty is a parameter"),
    ("1", lambda c, o, t, e: language(c, o, t, 0.0), "empty is a parameter"),
    ("1", lambda c, o, t, e: language(c, o, t, e, signs=True) if c else e, "signs belong to no language"),
    ("1", lambda c, o, t, e: language(c, o, t, e, other=True), "the other language"),
    ("1", lambda c, o, t, e: language(c, o, t, e, strict=True), "not all or nothing"),
    ("1", lambda c, o, t, e: language("".join(sorted(set(c))), o, t, e), "as often as it stands there"),
    ("2", lambda b, w: judge(b, w)[0], "no list of 5 numbers"),
    ("2", lambda b, w: (judge(b, w)[0], judge(b, w)[1:]), "no list of 5 numbers"),
    ("2", lambda b, w: judge(b, w, total=len(b)), "a mean as well"),
    ("2", naive, "a gap of -1000 .* OverflowError"),
    ("3", lambda p, n: [*reported(p, n)[:2], p[0] / sum(p)], "need not come first"),
    ("3", lambda p, n: [reported(p, n)[0], reported(p, n)[1] * len(p) / n, reported(p, n)[2]], "not by n"),
    ("3", lambda p, n: reported(p, n, [1 - q**n for q in p]), "not all are right"),
    ("3", lambda p, n: sum(p) * n, "no list of 3 numbers"),
    ("2", lambda b, w: judge(w, b), "wrong way round"),
    ("2", lambda b, w: judge(b, w, total=len(b), slope=len(b)), "not the sum"),
    ("2", lambda b, w: judge(b, w, slope=len(b)), "1/n"),
    ("2", lambda b, w: judge(b, w, slope=-1), "the sign"),
    ("2", lambda b, w: [judge(b, w)[0], *(judge(w, b)[1:])], "sigma of worse"),
    ("2", overflowing, "a gap of -1000 must give"),
    ("2", lambda b, w: [0.0] * (len(b) + 1), "is what came"),
    ("3", lambda p, n: [reported(p, 1)[0], *reported(p, n)[1:]], "asked n times"),
    ("3", lambda p, n: reported(p, n, of=n * len(p)), "a number, not a share"),
    ("3", lambda p, n: [reported(p, n)[0], reported(p, n)[1] * len(p), reported(p, n)[2]], "share of the questions"),
    ("3", lambda p, n: reported(p, n, p), "one of n answers is enough"),
    ("3", lambda p, n: reported(p, n, [q**n for q in p]), "all n are right"),
    ("3", lambda p, n: reported(p, n, cap=True), "one answer a question"),
    ("3", lambda p, n: [*reported(p, n)[:2], max(p)], "not of the asked"),
]


@pytest.mark.parametrize("number, answer, hint", WRONG)
def test_mistakes_are_named(lesson, number, answer, hint):
    lesson.refuses(number, answer, hint)
