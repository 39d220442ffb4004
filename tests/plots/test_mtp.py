"""Figures of notebook 04: the chain reads what V3's chain reads, and the numbers drawn are those of the data."""

import itertools
import json
from pathlib import Path

import pytest

from minids import plots

DATA = Path(__file__).parents[2] / "figures" / "mtp" / "mtp.json"


@pytest.fixture(scope="module")
def result():
    return json.loads(DATA.read_text(encoding="utf-8"))


def figures(result):
    return {
        "chain_of_modules": plots.chain_of_modules(),
        "depth_losses": plots.depth_losses({"main model": [3.0, 2.5] * 20, "depth 1": [3.1, 2.6] * 20}, 27),
        "with_and_without": plots.with_and_without(result),
        "accepted_by_depth": plots.accepted_by_depth(result),
        "overlap_of_two": plots.overlap_of_two([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], "abc"),
    }


def test_texts_do_not_overlap_and_stay_on_the_page(result):
    for name, fig in figures(result).items():
        fig.draw_without_rendering()
        texts = [t for ax in fig.axes for t in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label] if t.get_text()]
        texts += [t for ax in fig.axes if ax.get_legend() for t in ax.get_legend().get_texts()]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
        assert len(boxes) >= 5, name
        for text, box in boxes:
            inside = fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1
            assert inside, (name, text)
        for (a, one), (b, other) in itertools.combinations(boxes, 2):
            assert not one.overlaps(other), (name, a, b)


def test_the_chain_reads_the_token_before_the_one_it_predicts():
    parallel, chain = plots.chain_of_modules().axes
    def said(ax, word):
        return [t.get_text().split(maxsplit=1)[1] for t in ax.texts if t.get_text().startswith(word)]

    tokens = ["$t_i$", "$t_{i+1}$", "$t_{i+2}$", "$t_{i+3}$"]
    assert said(chain, "reads") == tokens[:3] and said(chain, "predicts") == tokens[1:]
    assert said(parallel, "reads") == tokens[:1] and said(parallel, "predicts") == tokens[1:]


def test_every_run_is_a_point_and_every_interval_is_students(result):
    left, right = plots.with_and_without(result).axes
    drawn = sorted(float(y) for dots in left.collections for _, y in dots.get_offsets())
    assert drawn == pytest.approx(sorted(line["valid"] for line in result["runs"]))
    runs = {arm: [r["valid"] for r in result["runs"] if r["arm"] == arm] for arm in ("plain", "MTP, D = 1")}
    d = [a - b for a, b in zip(runs["MTP, D = 1"], runs["plain"], strict=True)]
    mean = sum(d) / 5
    half = 2.776 * (sum((x - mean) ** 2 for x in d) / 4) ** 0.5 / 5**0.5
    (text,) = [t.get_text() for t in right.texts if t.get_text().startswith(f"{mean:+.3f}")]
    assert len(d) == 5 and abs(float(text.split("± ")[1]) - half) < 1e-3


def test_bars_are_the_accepted_shares(result):
    (ax,) = plots.accepted_by_depth(result).axes
    heights = [bar.get_height() for container in ax.containers for bar in getattr(container, "patches", [])]
    expected = []
    for arm in ("MTP, D = 2", "parallel, D = 2"):
        found = [r["agree"] for r in result["runs"] if r["arm"] == arm]
        expected += [sum(values) / len(values) for values in zip(*found, strict=True)]
    assert heights == pytest.approx(expected)
