"""Figures of notebook 09: what they draw is what they were given."""

import pytest
from matplotlib.patches import Rectangle

from minids import plots
from minids.pipeline import build_schedule
from minids.pipeline.chunk import exposed, forward_jobs, pair_jobs, run_queues, span, v3_times
from minids.pipeline.dualpipe import STEPS, dualpipe_steps


@pytest.fixture(scope="module")
def dualpipe():
    return build_schedule("dualpipe", ranks=4, micro_batches=8).simulate()


def boxes(ax):
    """(start, end) of every rectangle, to nine digits."""
    found = (p for p in ax.patches if isinstance(p, Rectangle) and p.get_width() > 0)
    return [rounded((p.get_x(), p.get_x() + p.get_width())) for p in found]


def rounded(ends):
    return tuple(round(float(end), 9) for end in ends)


def test_steps_cover_every_cell_once(dualpipe):
    lengths = [[len(step) for step in dualpipe_steps(rank, 4, 8)] for rank in range(2)]
    fig = plots.eight_steps(dualpipe, lengths, STEPS)
    cells = [(cell.start, cell.end) for row in dualpipe.cells[:2] for cell in row]
    assert sorted(boxes(fig.axes[0])) == sorted(map(rounded, cells))
    numbers = [int(text.get_text()) for text in fig.axes[0].texts]
    assert numbers == [step + 1 for row in lengths for step, length in enumerate(row) for _ in range(length)]
    assert len(fig.legends[0].get_texts()) == 8


def test_memory_lines_reach_the_peaks(dualpipe):
    timelines = {"1f1b": build_schedule("1f1b", ranks=4, micro_batches=8).simulate(), "dualpipe": dualpipe}
    for ax, rank in zip(plots.memory_over_time(timelines).axes, (0, 2), strict=True):
        assert [max(line.get_ydata()) for line in ax.lines] == [t.peak_shares[rank] for t in timelines.values()]
        assert [line.get_ydata()[-1] for line in ax.lines] == [0, 0]


def test_a_strip_shows_every_entry_of_both_queues():
    rows = {"alone": run_queues(forward_jobs(2), v3_times()), "pair": run_queues(pair_jobs(2), v3_times())}
    fig = plots.chunk_overlap(rows, 1e3, "ms")
    for ax, entries in zip(fig.axes, rows.values(), strict=True):
        assert sorted(boxes(ax)) == sorted(rounded((1e3 * e.start, 1e3 * e.end)) for e in entries)
    assert fig.axes[0].get_xlim()[1] == pytest.approx(1e3 * max(map(span, rows.values())))
    assert exposed(rows["alone"]) > 0


def test_rows_share_one_time_axis_and_lines_their_data(dualpipe):
    long = build_schedule("gpipe", ranks=4, micro_batches=16).simulate()
    fig = plots.side_by_side([dualpipe, long], ["a", "b"])
    assert {ax.get_xlim()[1] for ax in fig.axes} == {float(long.makespan)}
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["a", "b"]
    assert plots.schedule_rows(dualpipe, width=7).get_figwidth() == 7
    fig = plots.bubbles_by_ranks([2, 4], {"1f1b": [3, 9], "zbv": [0.5, 1.5]})
    assert [list(line.get_ydata()) for line in fig.axes[0].lines] == [[3, 9], [0.5, 1.5]]
    fig = plots.formula_limits({"x": ([1, 2], {"a": [3, 4]}), "y": ([5, 6], {"a": [7, 8]})})
    assert [list(ax.lines[0].get_ydata()) for ax in fig.axes] == [[3, 4], [7, 8]]
    assert [ax.get_xlabel() for ax in fig.axes] == ["x", "y"]


def test_shares_in_percent_and_bars_that_add_up():
    fig = plots.overlap_limits([1, 2], {"pair": [0.1, 0.0]}, [10, 20], {"pair": [3.0, 2.0]})
    assert list(fig.axes[0].lines[0].get_ydata()) == [10, 0] and list(fig.axes[1].lines[0].get_ydata()) == [3, 2]
    fig = plots.makespan_bars({"1f1b": {"a": 3.0, "b": 2.0, "c": 1.0}, "zb1p": {"a": 1.0, "b": 1.0, "c": 0.5}}, "s")
    assert [text.get_text().strip() for text in fig.axes[0].texts] == ["6.00", "2.50"]
    assert boxes(fig.axes[0])[:3] == [(0, 3), (3, 5), (5, 6)]
