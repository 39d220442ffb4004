"""The checks of notebook 07's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "07_pretraining.ipynb"
SPACE = {"math": math, "np": np}  # the exercises need nothing of the lesson


def checks():
    """{exercise number: source of its check}; the first one defines ``grade`` for all."""
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
             if cell["cell_type"] == "code"]  # fmt: skip
    return {number: next(cell for cell in cells if f'grade("exercise {number}"' in cell) for number in "123"}


def attempt(number, name, answer):
    found, space = checks(), {**SPACE, "bits_per_byte": lambda *_: None}
    exec(compile(found["1"], "exercise 1", "exec"), space)
    exec(compile(found[number], f"exercise {number}", "exec"), {**space, name: answer})


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


RIGHT = [("1", "bits_per_byte", per_byte), ("2", "bias_change", change), ("3", "runs_needed", runs)]


@pytest.mark.parametrize("number, name, answer", RIGHT)
def test_a_stub_is_not_a_failure(capsys, number, name, answer):
    attempt(number, name, lambda *_: None)
    assert capsys.readouterr().out.endswith(f"exercise {number}: not attempted yet\n")


@pytest.mark.parametrize("number, name, answer", RIGHT)
def test_right_answers_pass(capsys, number, name, answer):
    attempt(number, name, answer)
    assert capsys.readouterr().out.endswith(f"exercise {number}: correct\n")


WRONG = [
    ("1", "bits_per_byte", lambda nats, size: nats / size, "ln 2"),
    ("1", "bits_per_byte", lambda nats, size: nats * math.log(2) / size, "more than a bit"),
    ("1", "bits_per_byte", lambda nats, size: nats / math.log(2) * size, "several bytes"),
    ("1", "bits_per_byte", lambda nats, size: 1.0, "not \\["),
    ("2", "bias_change", lambda loads, gamma: [sum(x) for x in zip(*(change([load], gamma) for load in loads),
                                                                 strict=True)], "sum the loads first"),
    ("2", "bias_change", lambda loads, gamma: [-x for x in change(loads, gamma)], "less attractive"),
    ("2", "bias_change", lambda loads, gamma: change(loads[-1:], gamma), "last micro-batch"),
    ("2", "bias_change", lambda loads, gamma: change(loads[:1], gamma), "not \\[\\["),
    ("3", "runs_needed", lambda e, s: math.ceil((2 * s / e) ** 2), "both arms"),
    ("3", "runs_needed", lambda e, s: math.ceil(2 * (s / e) ** 2), "half of the effect"),
    ("3", "runs_needed", lambda e, s: 8 * (s / e) ** 2, "whole number"),
    ("3", "runs_needed", lambda e, s: math.ceil(math.sqrt(8) * s / e), "root of n"),
    ("3", "runs_needed", lambda e, s: 42, "42\\], not"),
]  # fmt: skip


@pytest.mark.parametrize("number, name, answer, hint", WRONG)
def test_wrong_answers_are_named(number, name, answer, hint):
    with pytest.raises(AssertionError, match=hint):
        attempt(number, name, answer)
