"""The map: its data are sound, its texts fit their boxes, and the squares of a count add up."""

import copy
import json
from pathlib import Path

import pytest
from matplotlib.patches import FancyBboxPatch

from minids import plots
from minids.plots.course_map import BOX_HEIGHT, BOX_WIDTH, COLUMN, ROW, _squares

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data():
    return json.loads((ROOT / "figures" / "map.json").read_text(encoding="utf-8"))


def test_finished_on_the_map_are_the_notebooks_that_exist(data):
    boxes = [box for row in data["rows"] for box in row["boxes"]]
    present = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    finished = {box["notebook"] for box in boxes if box["ready"]}
    assert finished == present, "set 'ready' in figures/map.json, draw figures/map.png anew and link it in 00_map"


def test_texts_stay_inside_their_boxes(data):
    fig = plots.system_map(data)
    fig.draw_without_rendering()
    ax = fig.axes[0]
    frames = [p.get_window_extent() for p in ax.patches if isinstance(p, FancyBboxPatch) and p.get_width() == BOX_WIDTH]
    inside = 0
    for text in (text for text in ax.texts if text.get_text()):  # an arrow is an annotation without text
        extent = text.get_window_extent()
        for frame in frames:
            if frame.overlaps(extent):
                assert frame.x0 <= extent.x0 and extent.x1 <= frame.x1, text.get_text()
                assert frame.y0 <= extent.y0 and extent.y1 <= frame.y1, text.get_text()
                inside += 1
    boxes = sum(len(row["boxes"]) for row in data["rows"])
    assert len(frames) == boxes and inside >= 4 * boxes  # number, label, detail and section of each


def test_boxes_do_not_touch(data):
    assert BOX_WIDTH < COLUMN and BOX_HEIGHT < ROW
    for row in data["rows"]:
        columns = [box["column"] for box in row["boxes"]]
        assert len(set(columns)) == len(columns), row["title"]


def test_a_box_without_a_field_is_named(data):
    broken = copy.deepcopy(data)
    del broken["rows"][0]["boxes"][1]["section"]
    with pytest.raises(ValueError, match="'pretraining'.*lacks section"):
        plots.system_map(broken)


def test_an_arrow_to_nowhere_is_named(data):
    with pytest.raises(ValueError, match="no box atlantis"):
        plots.system_map({**data, "arrows": [["text", "atlantis"]]})


@pytest.mark.parametrize("parts", [{"a": 3.4, "b": 2.3, "c": 0.3}, {"a": 0.5, "b": 0.5}, {"a": 7.0}, {"a": 0.2, "b": 0.2}])
def test_squares_add_up_to_the_rounded_total(parts):
    squares = _squares({name: value * 1e9 for name, value in parts.items()}, 1e9)
    assert sum(squares.values()) == round(sum(parts.values()))
    assert all(abs(squares[name] - value) < 1 for name, value in parts.items())
