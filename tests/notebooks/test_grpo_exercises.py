"""The checks of notebook 12's exercises: silent on stubs, right answers pass, the usual mistakes are named.

The notebook's cells run in one namespace, without those tagged 'slow', which no other cell needs.
"""

import json
import os
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "12_grpo.ipynb"


@pytest.fixture(scope="module")
def lesson():
    """(namespace after all quick cells, {exercise number: source of its check})."""
    space, checks = {"display": lambda figure: None}, {}
    here = os.getcwd()
    os.chdir(NOTEBOOK.parent)  # cells read ../figures
    try:
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or "slow" in cell["metadata"].get("tags", []):
                continue
            exec(compile(source, cell["id"], "exec"), space)
            for number in "123":
                if f'grade("exercise {number}' in source:
                    checks[number] = source
    finally:
        os.chdir(here)
    assert sorted(checks) == ["1", "2", "3"]
    return space, checks


def attempt(lesson, number: str, name: str, answer) -> None:
    space, checks = lesson
    exec(compile(checks[number], f"exercise {number}", "exec"), {**space, name: answer})


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
            inner = inner + {"min": torch.minimum(ratio * A[i], cut * A[i]), "max": torch.maximum(ratio * A[i], cut * A[i]),
                             "cut": cut * A[i], "one side": ratio.clamp(max=1 + high) * A[i]}[form]  # fmt: skip
        n = int(mask[i].sum())
        total, counted = total + (inner / n if by == "answer" else inner), counted + n
    return sign * total / {"token": counted, "answer": len(A), "all": mask.numel()}[by]


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


RIGHT = [("1", "my_leave_one_out", leave_one_out), ("2", "my_dapo", dapo), ("3", "my_kl", corrected), ("3", "my_kl", k2),
         ("3", "my_kl", score_function)]  # fmt: skip


@pytest.mark.parametrize("number, name, answer", RIGHT[:3])
def test_a_stub_is_not_a_failure(lesson, capsys, number, name, answer):
    attempt(lesson, number, name, lambda *_: None)
    assert capsys.readouterr().out == f"exercise {number}: not attempted yet\n"


@pytest.mark.parametrize("number, name, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, name, answer):
    attempt(lesson, number, name, answer)
    assert capsys.readouterr().out.startswith(f"exercise {number}: correct")


@pytest.mark.parametrize("wrong, hint", [
    (lambda r: r - r.mean(1, keepdim=True), "leave the answer itself out"),
    (z_score, "no deviation here"),
    (lambda r: -leave_one_out(r), "the sign"),
    (lambda r: leave_one_out(r.view(1, -1)).view_as(r), "of its own group"),
    (lambda r: r - r.mean(0), "not over questions"),
    (lambda r: r - (r.sum(1, keepdim=True) - r) / r.shape[1], "G - 1 others"),
    (lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True, correction=0), "NaN|no deviation"),
    (lambda r: leave_one_out(r)[0], "not equal"),
])  # fmt: skip
def test_wrong_advantages_are_named(lesson, wrong, hint):
    with pytest.raises(AssertionError, match=hint):
        attempt(lesson, "1", "my_leave_one_out", wrong)


@pytest.mark.parametrize("slip, hint", [
    (dict(sign=1), "the sign"),
    (dict(form="cut"), "minimum of both"),
    (dict(form="max"), "not max"),
    (dict(form="one side"), "A > 0 only"),
    (dict(by="answer"), "no 1/|o|"),
    (dict(by="all"), "not by all"),
])  # fmt: skip
def test_wrong_losses_are_named(lesson, slip, hint):
    with pytest.raises(AssertionError, match=hint):
        attempt(lesson, "2", "my_dapo", lambda *given: dapo(*given, **slip))


@pytest.mark.parametrize("wrong, hint", [
    (lambda lp, o, a, m, low, high: dapo(lp, o, a, m, low, low), "1 \\+ high"),
    (lambda lp, o, a, m, low, high: dapo(lp, o, a, m, high, low), "exchanged"),
    (lambda lp, o, a, m, low, high: dapo(lp, o, a, torch.ones_like(m), low, high), "not equal|NaN"),
    (lambda lp, o, a, m, low, high: (-torch.minimum((lp - o).exp() * a[:, None], (lp - o).exp().clamp(1 - low, 1 + high)
                                                   * a[:, None]) * m).sum() / m.sum(), "NaN"),
])  # fmt: skip
def test_wrong_ranges_and_padding_are_found(lesson, wrong, hint):
    with pytest.raises(AssertionError, match=hint):
        attempt(lesson, "2", "my_dapo", wrong)


@pytest.mark.parametrize("wrong, hint", [
    (lambda lp, o, r: lp - r, "trap 2"),
    (k3, "as k3 has it"),
    (lambda lp, o, r: -corrected(lp, o, r), "the sign"),
    (lambda lp, o, r: (lp - r) ** 2, "a half before it"),
    (lambda lp, o, r: lp.exp() * (lp - r), "no weight by pi"),
    (lambda lp, o, r: (lp - r).detach(), "no gradient"),
    (lambda lp, o, r: k2(lp, o, r).sum(), "one value for each sample"),
    (lambda lp, o, r: k2(lp, o, r) * 1.1, "not equal"),
])  # fmt: skip
def test_wrong_divergences_are_named(lesson, wrong, hint):
    with pytest.raises(AssertionError, match=hint):
        attempt(lesson, "3", "my_kl", wrong)
