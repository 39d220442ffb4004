"""The checks of notebook 07's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import math

import numpy as np
import pytest
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    """The exercises need nothing of the lesson but what stands among them."""
    return Lesson("07_pretraining", {"1": "bits_per_byte", "2": "bias_change", "3": "runs_needed"}, needed=("def signs(",),
                  given={"math": math, "np": np})  # fmt: skip


def per_byte(nats, size):
    return nats / math.log(2) / size


def change(loads, gamma):
    total = [sum(column) for column in zip(*loads, strict=True)]
    return [gamma * ((x * len(total) < sum(total)) - (x * len(total) > sum(total))) for x in total]


def runs(effect, spread):
    n = 1
    while spread * math.sqrt(2 / n) > effect / 2 * (1 + 1e-12):
        n += 1
    return n


RIGHT = [("1", per_byte), ("2", change), ("3", runs)]


@pytest.mark.parametrize("number", "123")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


def in_place(loads, gamma):
    """Adds the other micro-batches to the first."""
    first = loads[0]
    for load in loads[1:]:
        for i, x in enumerate(load):
            first[i] += x
    return change([first], gamma)


def test_an_answer_may_write_to_what_it_was_given(lesson, capsys):
    lesson.accepts("2", in_place, capsys)


WRONG = [
    ("1", lambda nats, size: nats / size, "ln 2"),
    ("1", lambda nats, size: nats * math.log(2) / size, "more than a bit"),
    ("1", lambda nats, size: nats / math.log(2) * size, "several bytes"),
    ("1", lambda nats, size: 1.0, "not \\["),
    ("2", lambda loads, gamma: [sum(x) for x in zip(*(change([load], gamma) for load in loads),
                                                                 strict=True)], "sum the loads first"),
    ("2", lambda loads, gamma: [-x for x in change(loads, gamma)], "less attractive"),
    ("2", lambda loads, gamma: change(loads[-1:], gamma), "last micro-batch"),
    ("2", lambda loads, gamma: change(loads[:1], gamma), "not \\[\\["),
    ("2", lambda loads, gamma: change(loads, 1.0), "times gamma"),
    ("2", lambda loads, gamma: [x or -gamma for x in change(loads, gamma)], "just the mean load"),
    ("2", lambda loads, gamma: [x or gamma for x in change(loads, gamma)], "with the mean load"),
    ("2", lambda loads, gamma: change([[x / sum(load) for x in load] for load in loads], gamma), "larger micro-batch"),
    ("2", lambda loads, gamma: [gamma * (sum(map(sum, loads)) / len(loads[0]) - sum(x)) for x in zip(*loads, strict=True)],
     "only the sign"),
    ("3", lambda e, s: math.ceil((2 * s / e) ** 2), "both arms"),
    ("3", lambda e, s: math.ceil(2 * (s / e) ** 2), "half of the effect"),
    ("3", lambda e, s: 8 * (s / e) ** 2, "whole number"),
    ("3", lambda e, s: round(8 * (s / e) ** 2), "nor to the nearest"),
    ("3", lambda e, s: math.floor(8 * (s / e) ** 2), "up: not down"),
    ("3", lambda e, s: math.ceil(math.sqrt(8) * s / e), "root of n"),
    ("3", lambda e, s: 42, "42\\], not"),
]  # fmt: skip


@pytest.mark.parametrize("number, answer, hint", WRONG)
def test_wrong_answers_are_named(lesson, number, answer, hint):
    lesson.refuses(number, answer, hint)
