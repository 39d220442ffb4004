"""The checks of notebook 02's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import math

import pytest
import torch
from exercises import Lesson

from minids.model.rope import rope_frequencies

WORDS = ("rope-01", "rope-25", "def frequencies(", "def mscale(")


class Reading:
    """Stands for the notebook's trained model: a loss that is least where frequencies are 0.9 times YaRN's."""

    def __init__(self, model, frequencies, mscale=1.0):
        self.frequencies = frequencies


@pytest.fixture(scope="module")
def lesson():
    stubs = {"1": "turns_within", "2": "ntk_base", "3": "my_frequencies"}
    made = Lesson("02_rope_yarn", stubs, needed=WORDS, missing=("q", "k", "steps", "theta", "mine", "share"))
    toy = made.space["toy"]
    best = 0.9 * rope_frequencies(toy.toy_config().replace(rope_scaling=toy.YARN))

    class Toy:
        Extended = Reading

        @staticmethod
        def token_losses(reading, rows):
            return (reading.frequencies / best).log().abs().sum() + torch.zeros(2)

    made.space |= {"toy": Toy, "model": None, "readings": {"YaRN": Reading(None, best / 0.9)},
                   "long": type("Rows", (), {"scored": torch.tensor([1, 2])})}  # fmt: skip
    made.best = best
    return made


def turns(c, length, base=None, dims=None, power=2, first=0, unit=2 * math.pi):
    dims = dims or c.qk_rope_head_dim
    return [length * (base or c.rope_theta) ** (-power * j / dims) / unit for j in range(first, first + dims // 2)]


def ntk(base, dims, factor, power=None):
    return base * factor ** (dims / (dims - 2) if power is None else power)


@pytest.mark.parametrize("number", "123")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", [
    ("1", turns),
    ("1", lambda c, n: torch.tensor(turns(c, n))),
    ("2", ntk),
    ("2", lambda b, d, s: math.exp(math.log(b) + d / (d - 2) * math.log(s))),
])  # fmt: skip
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("wrong, hint", [
    (lambda c, n: turns(c, n, unit=1), "divide by 2 pi"),
    (lambda c, n: turns(c, n, unit=math.pi / 180), "not degrees"),
    (lambda c, n: turns(c, n, power=1), "not -j/R"),
    (lambda c, n: turns(c, n, power=-2), "negative"),
    (lambda c, n: turns(c, n, first=1), "first pair is 0"),
    (lambda c, n: turns(c, n, dims=c.qk_head_dim), "only the qk_rope_head_dim"),
    (lambda c, n: [x for x in turns(c, n) for _ in "ab"], "one number a pair"),
    (lambda c, n: [n / x for x in turns(c, n)], "tokens a turn"),
    (lambda c, n: turns(c, n, base=10000.0), "not always 10,000"),
    (lambda c, n: rope_frequencies(c) * n / (2 * math.pi), "without YaRN"),
    (lambda c, n: turns(c, n - 1), "no known mistake"),
    (lambda c, n: [float(int(x)) for x in turns(c, n)], "no known mistake"),
    (lambda c, n: None if n == 64 else turns(c, n), "nothing is returned"),
])  # fmt: skip
def test_wrong_turns_are_named(lesson, wrong, hint):
    lesson.refuses("1", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda b, d, s: ntk(b, d, s, 1), "R/2 - 1, not R/2"),
    (lambda b, d, s: ntk(b, d, s, (d - 2) / d), "invert it"),
    (lambda b, d, s: ntk(b, d, s, d / 2), "the more pairs"),
    (lambda b, d, s: ntk(b, d, s, d / (d - 1)), "dims / 2 pairs"),
    (lambda b, d, s: ntk(b, d, s, -d / (d - 2)), "when the base grows"),
    (lambda b, d, s: ntk(b, d, s, d / (d - 4)), "counts numbers"),
    (lambda b, d, s: ntk(1, d, s), "not the ratio"),
    (lambda b, d, s: 1.01 * ntk(b, d, s), "no known mistake"),
])  # fmt: skip
def test_wrong_bases_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


def test_better_frequencies_pass_and_others_do_not(lesson, capsys):
    lesson.accepts("3", lambda theta, length, factor: lesson.best, capsys)
    lesson.refuses("3", lambda theta, length, factor: lesson.best / 0.9, "YaRN has")
    lesson.refuses("3", lambda theta, length, factor: theta[:4], "8 frequencies")
    lesson.refuses("3", lambda theta, length, factor: -theta, "positive")
