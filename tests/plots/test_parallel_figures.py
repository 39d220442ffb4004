"""Figures of notebook 08: what they draw is what they were given."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from minids import plots

HOMES, VISITS = ["ab", "c", "d"], {"a": [0, 2], "b": [1], "c": [0], "d": [1, 2]}


def boxes(ax):
    """(x, y, width) of every rectangle, to nine digits."""
    found = [p for p in ax.patches if type(p) is Rectangle]
    return [tuple(round(float(v), 9) for v in (p.get_x(), p.get_y(), p.get_width())) for p in found]


def test_every_visit_is_a_line_there_and_a_line_back():
    ax = plots.round_trip(HOMES, VISITS, experts_a_rank=2).axes[0]
    visits = sum(map(len, VISITS.values()))
    assert len(ax.lines) == 2 * visits
    starts = [tuple(line.get_xydata()[0]) for line in ax.lines]
    ends = [tuple(line.get_xydata()[1]) for line in ax.lines]
    assert len(set(ends)) == visits  # each copy has a place of its own, and two lines
    assert {y for _, y in starts} == {0, 1, 2} and min(x for x, _ in starts) < 1 < 9 < max(x for x, _ in starts)
    letters = [text.get_text() for text in ax.texts]
    assert [letters.count(t) for t in "abcd"] == [2 + len(VISITS[t]) for t in "abcd"]
    assert "rank 2: experts 4 to 5" in letters


def test_the_second_table_is_the_transpose():
    left, right = plots.message_tables([["a", "b"], ["", "cd"]]).axes
    assert [t.get_text() for t in left.texts] == ["a", "b", "-", "c d"]
    assert [t.get_text() for t in right.texts] == ["a", "-", "b", "c d"]
    assert [t.get_text() for t in right.get_xticklabels()] == ["from 0", "from 1"]


def test_lines_and_dots_are_the_data():
    fig = plots.nodes_over_groups([1, 2, 4], [1, 2, 3.6], [1, 1.9, 3.5], 8, [1, 2], [1, 1.99], [1, 1.98])
    left, right = ([list(line.get_ydata()) for line in ax.lines] for ax in fig.axes)
    assert left[1:] == [[1, 1.9, 3.5], [1, 2, 3.6]] and right[1:] == [[1, 2], [1, 1.99], [1, 1.98]]
    ax = plots.bandwidth_of_sms([8, 20], {"a": [3, 2], "b": [4, 1]}, used=20, unit="ms").axes[0]
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [[3, 2], [4, 1]] and ax.get_ylabel() == "ms"
    ax = plots.sorted_loads({"a": [1, 3, 2]}, "tokens").axes[0]
    assert list(ax.lines[0].get_ydata()) == [3, 2, 1]


def test_bars_are_stacked_and_totals_written():
    ax = plots.wire_bars({"far": (3.0, 4.0), "near": (1.0, 1.5)}, "kB").axes[0]
    assert [(x, width) for x, _, width in boxes(ax)] == [(0, 3), (3, 4), (0, 1), (1, 1.5)]
    assert [t.get_text().strip() for t in ax.texts] == ["7", "2"]
    layouts = {"all": {"weights": 100, "gradients": 500}, "part": {"weights": 20, "activations": 5}}
    ax = plots.memory_layouts(layouts, limit=80).axes[0]
    assert [(x, width) for x, _, width in boxes(ax)] == [(0, 100), (100, 172), (272, 0), (0, 20), (20, 0), (20, 5)]
    assert [t.get_text().strip() for t in ax.texts] == ["600 (cut)", "25"]


def test_a_strip_has_a_box_for_each_entry_in_its_lane():
    strips = {"one": [("computes", "ATTN", "compute", 0.0, 3.0), ("network", "disp", "send", 3.0, 4.5)],
              "two": [("computes", "MoE", "compute 2", 1.0, 10.0)]}  # fmt: skip
    fig = plots.wire_timelines(strips, "ms")
    assert [[(x, int(y), w) for x, y, w in boxes(ax)] for ax in fig.axes] == [[(0, 0, 3), (3, 1, 1.5)], [(1, 0, 9)]]
    assert {ax.get_xlim() for ax in fig.axes} == {(0, 10)} and fig.axes[1].get_xlabel() == "ms"
    with pytest.raises(KeyError):
        plots.wire_timelines({"one": [("computes", "ATTN", "unknown", 0.0, 3.0)]}, "ms")


def test_a_table_shows_its_numbers():
    ax = plots.placement_table([[1.0, 1.5], [1.25, 2.5]], ["in order", "placed"], ["code", "prose"]).axes[0]
    assert [t.get_text() for t in ax.texts] == ["1.00", "1.50", "1.25", "2.50"]
    np.testing.assert_array_equal(ax.images[0].get_array(), [[1.0, 1.5], [1.25, 2.5]])
    assert ax.images[0].get_clim() == (1, 2.5)
