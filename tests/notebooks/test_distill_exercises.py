"""The checks of notebook 14's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import math

import pytest
import torch
from exercises import Lesson

from minids.rl.supervised import collate


@pytest.fixture(scope="module")
def lesson():
    """The exercises need nothing of the lesson."""
    return Lesson("14_distillation", {"1": "my_labels", "2": "my_steps", "3": "my_soft_loss", "4": "my_shares"}, needed=(),
                  given={"math": math, "torch": torch})  # fmt: skip


# ---- 1, labels -------------------------------------------------------------------------------------------------------


def labels(tokens, given, ends):
    """By the package's own collate, row by row."""
    rows = [(row[:g].tolist(), row[g:e].tolist()) for row, g, e in zip(tokens, given, ends, strict=True)]
    return collate(rows)[1]


def place_by_place(tokens, given, ends, shift=1, question=False, padding=False, eos=True, first=0, last=0, fill=-100):
    out = torch.full((len(tokens), tokens.shape[1] - 1), fill)
    for b in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            of = t + shift
            after = question or of >= given[b] + first
            if after and (padding or of < ends[b] - int(not eos) + last):
                out[b, t] = tokens[b, of]
    return out


# ---- 2, the bill -----------------------------------------------------------------------------------------------------


def steps(f_teacher, f_student, n, y, T, epochs, teacher=True, sft=3, rl=4, answers=128):
    """In passes of the student over a document."""
    passes = epochs * n * sft + teacher * n / y * f_teacher / f_student
    return passes / (rl * answers)


# ---- 3, softened logits ----------------------------------------------------------------------------------------------


def soft(student, teacher, mask, tau, swap=False, scale=2, of_student=True, of_teacher=True, entropy=True, mean="token"):
    rows = []
    for b in range(len(mask)):
        row = []
        for t in mask[b].nonzero().flatten():
            q = torch.softmax(student[b, t] / (tau if of_student else 1), 0)
            p = torch.softmax(teacher[b, t] / (tau if of_teacher else 1), 0)
            p, q = (q, p) if swap else (p, q)
            row.append(tau**scale * sum(a * ((a.log() if entropy else 0) - c.log()) for a, c in zip(p, q, strict=True)))
        rows.append(row)
    flat = torch.stack([value for row in rows for value in row])
    if mean == "answer":
        return torch.stack([torch.stack(row).mean() for row in rows]).mean()
    return {"token": flat.mean(), "sum": flat.sum(), "all": flat.sum() / mask.numel()}[mean]


def masked_too_late(student, teacher, mask, tau):
    q, p = (student / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
    return tau**2 * ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()


# ---- 4, what a filter keeps ------------------------------------------------------------------------------------------


def shares(p):
    kept = torch.tensor(p) / sum(p)
    asked = 1 / torch.tensor(p)
    return torch.cat([kept, asked / asked.sum()]).tolist()


RIGHT = [("1", labels), ("1", place_by_place), ("2", steps), ("3", soft), ("4", shares)]


@pytest.mark.parametrize("number", "1234")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("slip, hint", [
    (dict(shift=0), "the token after it"),
    (dict(question=True), "given tokens are -100"),
    (dict(padding=True), "nothing after the end"),
    (dict(question=True, padding=True), "neither the question nor padding"),
    (dict(eos=False), "learn to stop"),
    (dict(first=1), "first token of the answer"),
    (dict(first=-1), "last token of the question"),
    (dict(fill=0), "0 is a token"),
    (dict(last=1), "a token too many"),
])  # fmt: skip
def test_wrong_labels_are_named(lesson, slip, hint):
    lesson.refuses("1", lambda *given: place_by_place(*given, **slip), hint)


def test_labels_of_another_shape_are_refused(lesson):
    lesson.refuses("1", lambda t, g, e: labels(t, g, e)[:, 1:], r"\(3, 7\) is what came, \(3, 8\)")


@pytest.mark.parametrize("wrong, hint", [
    (lambda **c: steps(**{**c, "f_teacher": c["f_teacher"] * c["y"]}), "rejected answers"),
    (lambda **c: steps(**{**c, "y": 1 / c["y"]}), "n / y"),
    (lambda **c: steps(**c, sft=1), "forward and backward"),
    (lambda **c: steps(**c, sft=2), "two forward passes"),
    (lambda **c: steps(**c, sft=4), "SFT writes nothing"),
    (lambda **c: steps(**c, rl=3), "a pass more"),
    (lambda **c: steps(**c, rl=1), "three passes more"),
    (lambda **c: steps(**c, teacher=False), "the teacher's pass"),
    (lambda **c: steps(**{**c, "epochs": 1}), "each epoch"),
    (lambda **c: steps(**c, answers=1), "128 answers"),
    (lambda **c: 1.1 * steps(**c), "not equal"),
    (lambda **c: round(steps(**c)), "not rounded"),
    (lambda **c: math.ceil(steps(**c)), "not rounded"),
])  # fmt: skip
def test_wrong_bills_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


@pytest.mark.parametrize("slip, hint", [
    (dict(swap=True), "reverse KL"),
    (dict(scale=0), "tau squared is missing"),
    (dict(scale=1), "not tau"),
    (dict(of_teacher=False), "the teacher is softened"),
    (dict(of_student=False), "the student is softened"),
    (dict(entropy=False), "cross entropy"),
    (dict(mean="answer"), "not each answer"),
    (dict(mean="sum"), "not the sum"),
    (dict(mean="all"), "answers' tokens"),
])  # fmt: skip
def test_wrong_soft_losses_are_named(lesson, slip, hint):
    lesson.refuses("3", lambda *given: soft(*given, **slip), hint)


def test_padding_that_becomes_nan_is_named(lesson):
    lesson.refuses("3", masked_too_late, "after arithmetic")


@pytest.mark.parametrize("wrong, hint", [
    (lambda p: p + shares(p)[4:], "add up to 1"),
    (lambda p: shares(p)[:4] * 2, "more often"),
    (lambda p: shares(p)[4:] + shares(p)[:4], "other way round"),
    (lambda p: shares(p)[:4] + shares([1 / (1 - x) for x in p])[4:], "how often it is wrong"),
    (lambda p: shares(p)[:4] + [1 / x for x in p], "add up to 1"),
    (lambda p: [0.25] * 4 + shares(p)[4:], "not kept equally often"),
    (lambda p: [0.25] * 8, "not equal"),
])  # fmt: skip
def test_wrong_shares_are_named(lesson, wrong, hint):
    lesson.refuses("4", wrong, hint)
