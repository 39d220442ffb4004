"""The checks of notebook 12's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import pytest
import torch
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    return Lesson("12_grpo", {"1": "my_leave_one_out", "2": "my_dapo", "3": "my_kl"})


# ---- 1, leave one out ------------------------------------------------------------------------------------------------


def leave_one_out(rewards):
    """Answer by answer; the notebook's check has the sum less the answer."""
    rows = [[r - sum(row[:i] + row[i + 1 :]) / (len(row) - 1) for i, r in enumerate(row)] for row in rewards.tolist()]
    return torch.tensor(rows)


def z_score(rewards):
    spread = rewards.std(1, keepdim=True, correction=0)
    return torch.where(spread > 1e-6, (rewards - rewards.mean(1, keepdim=True)) / spread.clamp_min(1e-6), 0.0)


# ---- 2, DAPO ---------------------------------------------------------------------------------------------------------


def dapo(logp, old, A, mask, low, high, form="min", by="token", sign=-1):
    """Token by token."""
    total, counted = 0.0, 0
    for i in range(len(A)):
        inner = 0.0
        for t in mask[i].nonzero().flatten().tolist():
            ratio = (logp[i, t] - old[i, t]).exp()
            cut = ratio.clamp(1 - low, 1 + high)
            inner = inner + {"min": torch.minimum(ratio * A[i], cut * A[i]), "free": ratio * A[i],
                             "max": torch.maximum(ratio * A[i], cut * A[i]),
                             "cut": cut * A[i], "one side": ratio.clamp(max=1 + high) * A[i]}[form]  # fmt: skip
        n = int(mask[i].sum())
        total, counted = total + (inner / n if by == "answer" else inner), counted + n
    return sign * total / {"token": counted, "answer": len(A), "answers": len(A), "all": mask.numel(), "sum": 1}[by]


# ---- 3, the KL -------------------------------------------------------------------------------------------------------


def k3(logp, old, ref):
    return (ref - logp).exp() - (ref - logp) - 1


def corrected(logp, old, ref):
    """V3.2's: importance weight of the sample times k3."""
    return (logp - old).exp() * k3(logp, old, ref)


def k2(logp, old, ref):
    return 0.5 * (logp - ref) ** 2


def score_function(logp, old, ref):
    return logp * (logp - ref).detach()


RIGHT = [("1", leave_one_out), ("2", dapo), ("3", corrected), ("3", k2), ("3", score_function)]


@pytest.mark.parametrize("number", "123")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("wrong, hint", [
    (lambda r: r - r.mean(1, keepdim=True), "leave the answer itself out"),
    (z_score, "no deviation here"),
    (lambda r: -leave_one_out(r), "the sign"),
    (lambda r: leave_one_out(r.view(1, -1)).view_as(r), "of its own group"),
    (lambda r: r - r.mean(0), "not over questions"),
    (lambda r: r - (r.sum(1, keepdim=True) - r) / r.shape[1], "G - 1 others"),
    (lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True, correction=0), "NaN|no deviation"),
    (lambda r: leave_one_out(r)[0], "not equal"),
    (lambda r: leave_one_out(r.T).T, "not over questions"),
    (lambda r: r - (r.sum(1, keepdim=True) - r) / 3, "wrong for 6"),
    (lambda r: (r - r.mean(1, keepdim=True)) * 4 / 3, "wrong for 6"),
    (lambda r: r.sub_(r.mean(1, keepdim=True)).mul_(r.shape[1] / (r.shape[1] - 1)), "have been changed"),
])  # fmt: skip
def test_wrong_advantages_are_named(lesson, wrong, hint):
    lesson.refuses("1", wrong, hint)


@pytest.mark.parametrize("slip, hint", [
    (dict(sign=1), "the sign"),
    (dict(form="cut"), "minimum of both"),
    (dict(form="max"), "not max"),
    (dict(form="one side"), "A > 0 only"),
    (dict(by="answer"), "no 1/|o|"),
    (dict(by="all"), "not by all"),
    (dict(form="free"), "the clip is missing"),
    (dict(by="answers"), "not by answers"),
    (dict(by="sum"), "not the sum"),
])  # fmt: skip
def test_wrong_losses_are_named(lesson, slip, hint):
    lesson.refuses("2", lambda *given: dapo(*given, **slip), hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda lp, o, a, m, low, high: dapo(lp, o, a, m, low, low), "1 \\+ high"),
    (lambda lp, o, a, m, low, high: dapo(lp, o, a, m, high, low), "exchanged"),
    (lambda lp, o, a, m, low, high: dapo(lp, o, a, torch.ones_like(m), low, high), "padding takes part"),
    (lambda lp, o, a, m, low, high: dapo(o, lp, a, m, low, high), "new over old"),
    (lambda lp, o, a, m, low, high: (-torch.minimum((lp - o).exp() * a[:, None], (lp - o).exp().clamp(1 - low, 1 + high)
                                                   * a[:, None]) * m).sum() / m.sum(), "padding takes part"),
])  # fmt: skip
def test_wrong_ranges_and_padding_are_found(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda lp, o, r: lp - r, "trap 2"),
    (k3, "as k3 has it"),
    (lambda lp, o, r: -corrected(lp, o, r), "the sign"),
    (lambda lp, o, r: (lp - r) ** 2, "a half before it"),
    (lambda lp, o, r: lp.exp() * (lp - r), "no weight by pi"),
    (lambda lp, o, r: (lp - r).detach(), "no gradient"),
    (lambda lp, o, r: k2(lp, o, r).sum(), "one value for each sample"),
    (lambda lp, o, r: k2(lp, o, r) * 1.1, "not equal"),
    (lambda lp, o, r: (lp - r).exp() - (lp - r) - 1, "q is ref over pi"),
    (lambda lp, o, r: (lp - o).exp().detach() * k3(lp, o, r), "as k3 has it"),
])  # fmt: skip
def test_wrong_divergences_are_named(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)
