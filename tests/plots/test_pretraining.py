"""Figures of notebook 07: they draw the data they were given, and no two texts lie on each other."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from minids import plots
from minids.train.recipe import Recipe

SWEEP = json.loads((Path(__file__).parents[2] / "figures" / "pretraining" / "seeds.json").read_text())
WORDS = "^ red fish swim $ ^ blue whale $".split()
MTP = ["fish", "swim", "$", None, None, "whale", "$"]


def records(count, jump=()):
    """A run that learns, as metrics.jsonl has it."""
    return [{"step": i + 1, "tokens": 1000 * (i + 1), "loss": (9.0 if i in jump else 7 - 2.5 * i / count),
             "mtp_loss": [7 - 2.4 * i / count], "valid_loss": 5.0 if i % 40 == 39 else None, "maxvio_max": 2.5,
             "maxvio_mean": 2.0, "lr": 4e-3, "lambda": 0.3, "grad_norm": float("nan") if i == 60 else 0.8 + 2 * (i in jump),
             "bias_spread": 0.001 * i} for i in range(count)]  # fmt: skip


def groups():
    return {kind: [run["valid"] for run in SWEEP["runs"] if run["group"] == kind] for kind in ("init", "order", "both")}


FIGURES = {
    "recipe_phases": lambda: plots.recipe_phases(Recipe.v3()),
    "packed_row": lambda: plots.packed_row(WORDS, [0] * 5 + [1] * 4, MTP),
    "training_run": lambda: plots.training_run(records(200), np.log(1024)),
    "seed_spread": lambda: plots.seed_spread([run["losses"] for run in SWEEP["runs"] if run["losses"]], groups(), 1024),
    "seed_effects": lambda: plots.seed_effects({"micro-batches of 2, not 8": (-0.002, 0.005), "no MTP": (-0.007, 0.031),
                                                "half the peak rate": (0.051, 0.022)}, 0.045, 8),
    "spike_watch": lambda: plots.spike_watch(records(110), records(110, (44,)), [44], {
        "junk batch": 44, "NaN gradient": 59, "rate x 30, 3 steps": 74}),
    "gradient_ranges": lambda: plots.gradient_ranges(np.random.default_rng(0).normal(-15, 3, 10_000),
                                                     {"FP16": (-24, -14, 16), "BF16": (-133, -126, 128)}),
}  # fmt: skip


def visible_texts(fig):
    """(text, box in pixels) of all that is drawn; tick labels beyond an axis' ends exist but are not."""
    fig.draw_without_rendering()
    texts = list(fig.texts)
    for ax in fig.axes:
        texts += [*ax.texts, ax.title]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            texts.append(axis.label)
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=True)
            texts += [label for tick, at in ticks if low <= at <= high for label in (tick.label1, tick.label2)]
    drawn = [t for t in texts if t.get_text() and t.get_visible()]
    return [(t.get_text(), Text.get_window_extent(t)) for t in drawn]


@pytest.mark.parametrize("name", FIGURES)
def test_texts_do_not_overlap_and_stay_on_the_page(name):
    fig = FIGURES[name]()
    boxes, page = visible_texts(fig), fig.bbox
    assert len(boxes) >= 10
    for text, box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
    for (a, one), (b, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (a, b)


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"packed_row"}))
def test_every_axis_that_shows_numbers_names_their_unit(name):
    for ax in FIGURES[name]().axes:
        for axis, shared in ((ax.xaxis, ax.get_shared_x_axes()), (ax.yaxis, ax.get_shared_y_axes())):
            numbers = any(t.get_text().lstrip("\u2212").replace(".", "").isdigit() for t in axis.get_ticklabels())
            last = len(shared.get_siblings(ax)) == 1 or axis is ax.yaxis or ax.get_subplotspec().is_last_row()
            if numbers and last:
                assert "(" in axis.label.get_text(), (name, axis.label.get_text())


def test_the_rate_drawn_is_the_recipe():
    recipe = Recipe.v3()
    (line,) = [line for line in plots.recipe_phases(recipe).axes[0].lines if len(line.get_xdata()) > 2]
    for x, y in zip(*line.get_data(), strict=True):
        assert y * 1e-4 == pytest.approx(recipe.lr(x * 1e12), rel=1e-9)


def test_a_label_that_is_not_asked_is_drawn_as_such():
    texts = [t.get_text() for t in plots.packed_row(WORDS, [0] * 5 + [1] * 4, MTP).axes[0].texts]
    assert texts.count("not asked") == 2 and texts.count("whale") == 3 and texts.count("swim") == 3


def test_the_luckiest_run_is_the_one_with_the_lowest_validation_loss():
    fig = FIGURES["seed_spread"]()
    curves = [run["losses"] for run in SWEEP["runs"] if run["losses"]]
    best = int(np.argmin(groups()["both"]))
    (green,) = [line for line in fig.axes[0].lines if line.get_label() == "luckiest"]
    assert green.get_ydata() == pytest.approx(plots.smooth(curves[best], 0.93))


def test_spikes_and_effects_lie_where_they_were_found():
    fig = FIGURES["spike_watch"]()
    (dots,) = [line for line in fig.axes[0].lines if line.get_label() == "called a spike"]
    assert dots.get_xdata() == [45] and dots.get_ydata() == [9.0]
    band = 0.045 * 2**0.5
    patch = FIGURES["seed_effects"]().axes[0].patches[0]
    assert patch.get_x() == pytest.approx(-band) and patch.get_width() == pytest.approx(2 * band)
