"""The checks of notebook 09's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import pytest
from exercises import Lesson

NEEDED = ("dualpipe-01", "dualpipe-05", "dualpipe-07")  # imports, the clock, and 1F1B in words; others only take time


@pytest.fixture(scope="module")
def lesson():
    return Lesson("09_dualpipe", {"1": "my_pairs", "2": "my_zb_h2", "3": "my_cut"}, needed=NEEDED)


@pytest.mark.parametrize("number", "123")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


# ---- 1, pairs --------------------------------------------------------------------------------------------------------


def pairs(rank, ranks, n, half=True, mirror=True, last=True, five=True, two=True):
    inward = min(rank, ranks - 1 - rank) if mirror else rank
    own = n // 2 if half else n
    return ((1 + two) * (own - ranks + inward + 1) - (last and inward == ranks // 2 - 1)
            + (five and ranks // 2 - inward - 1))  # fmt: skip


def test_pairs(lesson, capsys):
    lesson.accepts("1", pairs, capsys)


@pytest.mark.parametrize("mistake,hint", [("half", "one direction"), ("mirror", "mirrors"), ("last", "middle"),
                                          ("five", "step 5"), ("two", "two at a time")])  # fmt: skip
def test_wrong_pairs_are_named(lesson, mistake, hint):
    lesson.refuses("1", lambda *case: pairs(*case, **{mistake: False}), hint)


def test_any_other_answer_is_refused(lesson):
    lesson.refuses("1", lambda *case: pairs(*case) + 1, "not equal")


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
    lesson.accepts("2", zb_h2, capsys)


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
    lesson.refuses("2", wrong, message)


# ---- 3, cutting a model ----------------------------------------------------------------------------------------------


def every_cut(layers, parts):
    if parts == 1:
        return [(layers,)]
    return [(first, *rest) for first in range(1, layers - parts + 2) for rest in every_cut(layers - first, parts - 1)]


def test_the_best_cut(lesson, capsys):
    step_time = lesson.space["step_time"]

    def search(times, ranks, n):
        return min(every_cut(len(times), ranks), key=lambda counts: step_time(counts, times, n))

    lesson.accepts("3", search, capsys)


def lightest(times, ranks, n):
    """The first cut whose heaviest stage is as light as can be."""
    def heaviest(counts):
        ends = [sum(counts[: k + 1]) for k in range(ranks)]
        return max(sum(times[end - count : end]) for count, end in zip(counts, ends, strict=True))

    return min(every_cut(len(times), ranks), key=heaviest)


def test_neither_the_lightest_heaviest_stage_nor_one_answer_for_all_is_enough(lesson):
    lesson.refuses("3", lightest, "102 where 96 is possible")
    lesson.refuses("3", lambda times, ranks, n: (3, 3, 3, 1), "3 stages, 10 layers")


@pytest.mark.parametrize("wrong,message", [
    ((3, 3, 2, 2), "no better than equal"), ((3, 2, 3, 2), "no better than equal"), ((4, 3, 2), "4 stages, 10 layers"),
    ((5, 5, 0, 0), "a stage without a layer"), ((4, 4, 4, 1), "4 stages, 10 layers"), ((2, 3, 4, 1), "is possible"),
])  # fmt: skip
def test_wrong_cuts_are_named(lesson, wrong, message):
    lesson.refuses("3", lambda times, ranks, n: wrong, message)
