"""The checks of notebook 09's exercises: silent on stubs, right answers pass, the usual mistakes are named.

The notebook's cells run in one namespace, without those tagged 'slow'; answers stand in for the stubs.
"""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "09_dualpipe.ipynb"
# Cells whose names the exercises use: imports, the clock, and 1F1B in words; the others only take time.
NEEDED = ("dualpipe-01", "dualpipe-05", "dualpipe-07", "my_pairs", "my_zb_h2", "my_cut")


@pytest.fixture(scope="module")
def lesson():
    """(namespace of the cells that are needed, {exercise number: source of its check})."""
    space, checks = {}, {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not any(word in cell["id"] + source for word in NEEDED):
            continue
        exec(compile(source, cell["id"], "exec"), space)
        for number in "123":
            if f"exercise {number}" in source:
                checks[number] = source
    return space, checks


def attempt(lesson, number, name, answer):
    space, checks = lesson
    exec(compile(checks[number], f"exercise {number}", "exec"), {**space, name: answer})


def test_stubs_are_not_attempted(lesson, capsys):
    space, checks = lesson
    assert set(checks) == set("123")
    for number, name in (("1", "my_pairs"), ("2", "my_zb_h2"), ("3", "my_cut")):
        attempt(lesson, number, name, space[name])
    assert capsys.readouterr().out.count("not attempted yet") == 3


# ---- 1, pairs --------------------------------------------------------------------------------------------------------


def pairs(rank, ranks, n, half=True, mirror=True, last=True, five=True):
    inward = min(rank, ranks - 1 - rank) if mirror else rank
    own = n // 2 if half else n
    return (2 * (own - ranks + inward + 1) - (last and inward == ranks // 2 - 1)
            + (five and ranks // 2 - inward - 1))  # fmt: skip


def test_pairs(lesson, capsys):
    attempt(lesson, "1", "my_pairs", pairs)
    assert "exercise 1: correct" in capsys.readouterr().out


@pytest.mark.parametrize("mistake,hint", [("half", "one direction"), ("mirror", "mirrors"), ("last", "middle"),
                                          ("five", "step 5")])  # fmt: skip
def test_wrong_pairs_are_named(lesson, mistake, hint):
    with pytest.raises(AssertionError, match=hint):
        attempt(lesson, "1", "my_pairs", lambda *case: pairs(*case, **{mistake: False}))


def test_any_other_answer_is_refused(lesson):
    with pytest.raises(AssertionError, match="not equal"):
        attempt(lesson, "1", "my_pairs", lambda *case: pairs(*case) + 1)


# ---- 2, zero bubble with more memory ---------------------------------------------------------------------------------


def zb_h2(rank, ranks, n, ahead=None, owing=None):
    """2(PP - r) - 1 forwards, then F, I and a W as soon as 2r are owed."""
    ahead = 2 * (ranks - rank) - 1 if ahead is None else ahead
    owing = 2 * rank if owing is None else owing
    row, done = [f"F{m}" for m in range(ahead)], 0
    for m in range(n):
        row.append(f"I{m}")
        if m + 1 - done > owing:
            row.append(f"W{done}")
            done += 1
        if ahead + m < n:
            row.append(f"F{ahead + m}")
    return row + [f"W{m}" for m in range(done, n)]


def test_zb_h2(lesson, capsys):
    attempt(lesson, "2", "my_zb_h2", zb_h2)
    assert "exercise 2: correct" in capsys.readouterr().out


@pytest.mark.parametrize("wrong,message", [
    (lambda r, p, n: zb_h2(r, p, n, owing=0), "waits"),  # every W at once: nothing is left for the gaps
    (lambda r, p, n: zb_h2(r, p, n, ahead=p - r, owing=r), "waits"),  # that is ZB1P
    (lambda r, p, n: zb_h2(r, p, n, owing=n), "holds"),  # all W at the end: memory of all micro-batches
    (lambda r, p, n: zb_h2(r, p, n)[:-1], "each of F, I, W once"),
    (lambda r, p, n: [f"{k}{m}" for k in "IFW" for m in range(n)], "F comes before its I"),
    (lambda r, p, n: [a for m in range(n) for a in (f"F{m}", f"W{m}", f"I{m}")], "I comes before its W"),
    (lambda r, p, n: [a for m in range(n) for a in (f"F{m}", f"I{m}", f"W{m}")], "waits"),
])  # fmt: skip
def test_wrong_zb_h2_is_named(lesson, wrong, message):
    with pytest.raises(AssertionError, match=message):
        attempt(lesson, "2", "my_zb_h2", wrong)


# ---- 3, cutting a model ----------------------------------------------------------------------------------------------


def every_cut(layers, parts):
    if parts == 1:
        return [(layers,)]
    return [(first, *rest) for first in range(1, layers - parts + 2) for rest in every_cut(layers - first, parts - 1)]


def test_the_best_cut(lesson, capsys):
    step_time = lesson[0]["step_time"]

    def search(times, ranks, n):
        return min(every_cut(len(times), ranks), key=lambda counts: step_time(counts, times, n))

    attempt(lesson, "3", "my_cut", search)
    assert "exercise 3: correct" in capsys.readouterr().out


@pytest.mark.parametrize("wrong,message", [
    ((3, 3, 2, 2), "no better than equal"), ((3, 2, 3, 2), "no better than equal"), ((4, 3, 2), "4 stages, 10 layers"),
    ((5, 5, 0, 0), "a stage without a layer"), ((4, 4, 4, 1), "4 stages, 10 layers"), ((2, 3, 4, 1), "is possible"),
])  # fmt: skip
def test_wrong_cuts_are_named(lesson, wrong, message):
    with pytest.raises(AssertionError, match=message):
        attempt(lesson, "3", "my_cut", lambda times, ranks, n: wrong)
