"""The clock: by hand, against a second way to compute it, and against the papers' bubbles on the whole grid."""

import random
from fractions import Fraction

import pytest

from minids.pipeline import NAMES, build_schedule
from minids.pipeline.formulas import clock_bubble, holds, paper_bubble, unmet
from minids.pipeline.poster import compare, share_times
from minids.pipeline.schedules import FAMILIES
from minids.pipeline.simulate import simulate

EVEN = range(2, 33, 2)


def some_micro_batches(name, ranks):
    """The fewest with which the formula can hold, a few more, and many."""
    family = FAMILIES[name]
    few, step = max(family.fewest(ranks), ranks), family.multiple(ranks)
    numbers = (few, few + step, 3 * ranks, 4 * ranks + 2 * step) if ranks <= 12 else (few, 3 * ranks)
    return [n for n in numbers if n % step == 0 and n >= few]


# ---- by hand ---------------------------------------------------------------------------------------------------------


def times_of(timeline):
    return [[(cell.start, cell.end) for cell in row] for row in timeline.cells]


def test_two_ranks_one_micro_batch():
    timeline = build_schedule("1f1b", ranks=2, micro_batches=1).simulate(f=1, b=2)
    assert times_of(timeline) == [[(0, 1), (4, 6)], [(1, 2), (2, 4)]]
    assert (timeline.makespan, timeline.bubble, timeline.waits) == (6, [3, 3], [3, 0])


def test_a_hand_over_takes_time_and_an_exposed_one_stops_the_sender():
    schedule = build_schedule("gpipe", ranks=2, micro_batches=2)
    beside = schedule.simulate(f=2, b=2, comm=1)
    assert times_of(beside) == [[(0, 2), (2, 4), (10, 12), (12, 14)], [(3, 5), (5, 7), (7, 9), (9, 11)]]
    stopped = schedule.simulate(f=2, b=2, comm=1, comm_mode="exposed")
    assert times_of(stopped) == [[(0, 2), (3, 5), (11, 13), (14, 16)], [(3, 5), (6, 8), (8, 10), (11, 13)]]
    assert stopped.exposed == [2, 2]


def test_a_link_carries_one_hand_over_at_a_time():
    """Forwards of 1, hand-overs of 5: the second waits for the link, not for its forward."""
    timeline = build_schedule("gpipe", ranks=2, micro_batches=3).simulate(f=1, b=1, comm=5)
    assert [cell.start for cell in timeline.cells[1][:3]] == [6, 11, 16]


def test_stages_on_one_rank_hand_over_for_nothing():
    schedule = build_schedule("dualpipe_v", ranks=1, micro_batches=4)
    assert schedule.simulate(comm=100).makespan == schedule.simulate().makespan


def test_unequal_stages_and_ranks():
    """The slowest sets the pace: 8 more micro-batches cost 8 of its times."""
    def makespan(n, **options):
        return build_schedule("1f1b", ranks=4, micro_batches=n).simulate(**options).makespan

    slow_stage = dict(f=[1, 1, 3, 1], b=[2, 2, 6, 2], w=[1, 1, 3, 1])
    assert makespan(16, **slow_stage) - makespan(8, **slow_stage) == 8 * 9
    assert makespan(16, slowdown=[1, 1, 3, 1]) == makespan(16, **slow_stage)


# ---- against a second way --------------------------------------------------------------------------------------------


def relaxed_ends(schedule, duration):
    """End of every (rank, position) as the least fixed point of "after the one before and after what it needs"."""
    producers, ends = {}, {}
    for rank, row in enumerate(schedule.actions):
        for k, action in enumerate(row):
            ends[rank, k] = 0
            for part in action.parts():
                if part.kind != "W":
                    producers[part.kind == "F", part.stage, part.micro_batch] = (rank, k)
    changed = True
    while changed:
        changed = False
        for rank, row in enumerate(schedule.actions):
            for k, action in enumerate(row):
                start = ends[rank, k - 1] if k else 0
                for part in action.parts():
                    forward = part.kind == "F"
                    before = producers.get((forward, part.stage + (-1 if forward else 1), part.micro_batch))
                    if part.kind != "W" and before is not None:
                        start = max(start, ends[before])
                end = start + duration(action)
                changed |= end != ends[rank, k]
                ends[rank, k] = end
    return ends


@pytest.mark.parametrize("name", NAMES)
def test_the_clock_agrees_with_relaxation(name):
    generator = random.Random(0)
    for ranks, n in ((2, 6), (4, 12)):
        schedule = build_schedule(name, ranks=ranks, micro_batches=n)
        f, b, w = ([generator.randint(1, 9) + extra for _ in range(schedule.stages)] for extra in (0, 9, 0))
        w = [min(pair) for pair in zip(b, w, strict=True)]

        def duration(a, f=f, b=b, w=w):
            pair = max(f[a.stage], b[a.with_.stage]) + 1 if a.kind == "FB" else 0
            return {"F": f[a.stage], "B": b[a.stage], "I": b[a.stage] - w[a.stage], "W": w[a.stage], "FB": pair}[a.kind]

        timeline = simulate(schedule, f=f, b=b, w=w, fb=lambda one, two: max(one, two) + 1)
        ends = relaxed_ends(schedule, duration)
        assert {(rank, k): cell.end for rank, row in enumerate(timeline.cells) for k, cell in enumerate(row)} == ends


# ---- the papers' bubbles ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_papers_bubble_comes_out_exactly(name):
    """Every even PP from 2 to 32, several numbers of micro-batches; F = I = W, and other times where the formula is for
    them. Exact: integers and fractions, compared with ==."""
    sets = [(1, 2, 1, None), (Fraction(1, 3), Fraction(2, 3), Fraction(1, 3), None)]
    if name in ("gpipe", "1f1b", "interleaved_1f1b"):
        sets += [(3, 10, 4, None), (7, 5, 1, None)]
    if name == "zb1p":
        sets += [(5, 9, 4, None), (9, 6, 3, None), (3, 8, 3, None)]
    if name.startswith("dualpipe"):
        sets += [(4, 7, 3, None), (4, 4, 0, None), (Fraction(5, 2), 4, Fraction(3, 2), None)]
    for ranks in EVEN:
        for n in some_micro_batches(name, ranks):
            schedule = build_schedule(name, ranks=ranks, micro_batches=n)
            for f, b, w, fb in sets:
                assert holds(schedule, f, b, w, fb)
                bubble = schedule.simulate(f=f, b=b, w=w, fb=fb).bubble
                assert bubble == [paper_bubble(name, ranks, f, b, w, fb)] * ranks, (ranks, n, f, b, w)


def test_table_2_written_out():
    """The spec's table, its words typed again, for 16 ranks with B = 2F and a pair that costs F + B."""
    pp, f, b, w = 16, 1, 2, 1
    assert paper_bubble("1f1b", pp, f, b, w) == (pp - 1) * (f + b) == 45
    assert paper_bubble("zb1p", pp, f, b, w) == (pp - 1) * (f + b - 2 * w) == 15
    assert paper_bubble("dualpipe", pp, f, b, w) == (pp // 2 - 1) * ((f + b) + b - 3 * w) == 14
    assert paper_bubble("dualpipe_v", pp // 2, f, b, w) == 14


@pytest.mark.parametrize("ranks", EVEN)
def test_pairs_cheaper_than_their_parts(ranks):
    """F&B < F + B: the formula on the ranks with most pairs, less towards the ends, where fewer are overlapped."""
    for n in (2 * ranks, 3 * ranks, 5 * ranks + 2):
        n += n % 2
        schedule = build_schedule("dualpipe", ranks=ranks, micro_batches=n)
        f, b, w, fb = 4, 7, 3, 8
        bubble = schedule.simulate(f=f, b=b, w=w, fb=fb).bubble
        assert holds(schedule, f, b, w, fb) and max(bubble) == paper_bubble("dualpipe", ranks, f, b, w, fb)
        assert bubble[ranks // 2] == max(bubble)
        half = ranks // 2
        assert bubble == [max(bubble) - (f + b - fb) * max(half - 2 - min(r, ranks - 1 - r), 0) for r in range(ranks)]


def test_where_the_formulas_stop():
    """The closed forms of the clock, for times at random; and `holds` is true exactly when the paper's is among them."""
    generator = random.Random(1)
    wrong = 0
    for _ in range(400):
        ranks = generator.choice((2, 4, 6, 8, 12))
        f, w = generator.randint(1, 9), generator.randint(0, 9)
        b = w + generator.randint(1, f)  # I <= F, for the DualPipes' closed form
        fb = generator.randint(max(f, b), f + b)
        n = 2 * ranks + 2 * generator.randint(0, 6)
        for name in ("zb1p", "dualpipe", "dualpipe_v"):
            schedule = build_schedule(name, ranks=ranks, micro_batches=n)
            bubble = schedule.simulate(f=f, b=b, w=w, fb=fb).bubble
            assert bubble == [clock_bubble(name, ranks, rank, f, b, w, fb) for rank in range(ranks)], (name, f, b, w, fb)
            paper = paper_bubble(name, ranks, f, b, w, fb)
            if holds(schedule, f, b, w, fb):
                assert max(bubble) == paper
            wrong += max(bubble) != paper
    assert wrong > 300  # most times at random are not the papers'


def test_every_broken_assumption_is_named():
    """And where none is, formula and clock agree: the two lists are each other's test."""
    line, pair = build_schedule("zb1p", ranks=4, micro_batches=3), build_schedule("dualpipe", ranks=4, micro_batches=8)
    assert unmet(line, 1, 2, 1) == ["micro-batches must be at least 4, they are 3"]
    assert "W must not exceed" in unmet(line, 1, 4, 2)[1]
    assert unmet(pair, [1, 1, 2, 1], 2, 1) == ["stages and ranks must take equal times"]
    assert unmet(pair, 1, 2, 1, slowdown=[1, 1, 1, 2]) == ["stages and ranks must take equal times"]
    assert unmet(pair, [1] * 4, [2] * 4, [1] * 4, slowdown=[1] * 4) == []
    assert unmet(pair, 1, 2, 1, comm=0.5) == ["hand-overs must be free, they take 0.5"]
    assert "F must equal B - W" in unmet(pair, 2, 3, 2)[0] and "F&B must be one time" in unmet(pair, 1, 2, 1, fb=4)[0]
    assert "F, B - W and W must be equal: 1, 2, 1" in unmet(build_schedule("zbv", ranks=4, micro_batches=8), 1, 3, 1)[0]
    assert unmet(build_schedule("gpipe", ranks=4, micro_batches=1), 3, 9, 8) == []


def test_too_few_micro_batches_for_zb1p():
    """Below PP micro-batches there is not enough to put into the gaps; and 1F1B's bubble stays what it was."""
    for n in range(1, 8):
        assert min(build_schedule("zb1p", ranks=8, micro_batches=n).simulate().bubble) > paper_bubble("zb1p", 8, 1, 2, 1)
        assert build_schedule("1f1b", ranks=8, micro_batches=n).simulate().bubble == [21] * 8
    assert not holds(build_schedule("zb1p", ranks=8, micro_batches=7), 1, 2, 1)


def test_slow_links_and_one_slow_rank_break_every_formula():
    for name in NAMES:
        schedule = build_schedule(name, ranks=4, micro_batches=16)
        quiet = schedule.simulate()
        assert max(schedule.simulate(comm=1).bubble) > max(quiet.bubble)
        assert max(schedule.simulate(comm=1, comm_mode="exposed").bubble) > max(quiet.bubble)
        assert max(schedule.simulate(slowdown=[1, 1, 2, 1]).bubble) > max(quiet.bubble)


def test_zbv_waits_for_nothing_inside():
    for ranks in EVEN:
        timeline = build_schedule("zbv", ranks=ranks, micro_batches=2 * ranks).simulate()
        assert timeline.waits == [0] * ranks


# ---- sizes, memory, input --------------------------------------------------------------------------------------------


def test_the_poster_compares_one_model():
    """Half stages get half times, so everybody computes the same."""
    timelines = compare(8, 24)
    assert list(timelines) == list(NAMES)
    assert {busy for timeline in timelines.values() for busy in timeline.busy} == {72}
    assert [float(max(t.bubble)) for t in timelines.values()] == [21, 21, 10.5, 7, 3.5, 6, 7]
    assert share_times(timelines["zbv"].schedule, 1, 2.0, 1, None) == {"f": Fraction(1, 2), "b": 1.0, "w": Fraction(1, 2),
                                                                      "fb": None}  # fmt: skip
    assert list(compare(7, 20)) == ["gpipe", "1f1b", "zb1p", "zbv", "dualpipe_v"]
    with pytest.raises(ValueError, match="got 3"):
        compare(8, 3, names=("dualpipe",))


@pytest.mark.parametrize("wrong,message", [
    (dict(f=-1), "f must be a time of at least 0, got -1"), (dict(f=float("nan")), "f must be a time"),
    (dict(b=float("inf")), "b must be a time"), (dict(w=3), "w must not exceed b.*w=3 and b=2"),
    (dict(f=[1, 2]), "f must be one time or one for each of the 4 stages, got 2"), (dict(comm=-1), "comm must be a time"),
    (dict(fb="x"), "fb must be a time"), (dict(comm_mode="hidden"), "comm_mode must be one of overlapped, exposed"),
    (dict(slowdown=[1, 1]), "slowdown must be 4 positive factors"), (dict(slowdown=[1, 1, 0, 1]), "positive factors"),
    (dict(i=-2), "i must be a time"),
])  # fmt: skip
def test_impossible_times_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        build_schedule("dualpipe", ranks=4, micro_batches=8).simulate(**wrong)
