"""Figures of notebook 01: what they draw is the data they were given, and no two texts lie on each other."""

import itertools

import pytest
from matplotlib.text import Text

from minids import plots

V3 = dict(heads=128, nope=128, rope=64, value=128, latent=512)
FIGURES = {
    "shared_heads": lambda: plots.shared_heads({"MHA": 40960, "GQA": 2560, "MQA": 320, "MLA": 576}, 128, 8),
    "merged_rank": lambda: plots.merged_rank([1.0] + [1e-16] * 23, [1.0] * 16 + [1e-16] * 8, 16),
    "cheaper_form": lambda: plots.cheaper_form(**V3),
    "roofline": lambda: plots.roofline({"MHA": 1, "GQA, 8 groups": 16, "MQA": 128, "MLA, 1 new token": 241.8,
                                        "MLA, 2 new tokens": 483.6}, 989e12, 3.35e12, "H800"),
    "decode_times": lambda: plots.decode_times([512, 1024], {"naive": [0.1, 0.2], "absorbed": [0.01, 0.02]},
                                               {"naive": [1e9, 2e9], "absorbed": [1e7, 2e7]}),
    "recall_by_cache": lambda: plots.recall_by_cache([("MLA", 3, 0.2), ("MLA", 18, 1.0), ("MHA, narrow heads", 8, 0.7),
                                                      ("MHA", 128, 1.0)], 0.125),
}  # fmt: skip


def visible_texts(fig):
    """(text, box in pixels) of all that is drawn; tick labels beyond an axis' ends exist but are not."""
    fig.draw_without_rendering()
    texts = list(fig.texts) + [t for legend in fig.legends for t in legend.get_texts()]
    for ax in fig.axes:
        texts += [*ax.texts, ax.title]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            texts.append(axis.label)
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=True)
            texts += [label for tick, at in ticks if low <= at <= high for label in (tick.label1, tick.label2)]
    drawn = [t for t in texts if t.get_text() and t.get_visible()]
    return [(t.get_text(), Text.get_window_extent(t)) for t in drawn]  # of an annotation: without its arrow


@pytest.mark.parametrize("name", FIGURES)
def test_texts_do_not_overlap_and_stay_on_the_page(name):
    fig = FIGURES[name]()
    boxes, page = visible_texts(fig), fig.bbox
    assert len(boxes) >= 14
    for text, box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
    for (a, one), (b, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (a, b)


def test_the_curve_is_where_both_forms_cost_the_same():
    (curve, *_) = [line for line in plots.cheaper_form(**V3).axes[0].lines if line.get_linewidth() == 2]
    for s, t in zip(*curve.get_data(), strict=True):
        naive = s * 512 * 256 + t * s * 320
        absorbed = t * 512 * 256 + t * s * 1088
        assert naive == pytest.approx(absorbed, rel=1e-9)
    assert curve.get_ydata()[-1] == pytest.approx(170.4, abs=0.1)


def test_points_lie_on_the_roof():
    ax = plots.roofline({"slow": 10, "fast": 1000}, peak=200e12, bandwidth=2e12, name="GPU").axes[0]
    marks = [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines if line.get_marker() == "o"]
    assert marks == [(10, 20.0), (1000, 200.0)]  # TFLOP/s: under the slope and at the peak


def test_units_of_times_flops_and_accuracy():
    fig = FIGURES["decode_times"]()
    drawn = {ax.get_ylabel(): [list(line.get_ydata()) for line in ax.lines] for ax in fig.axes}
    assert drawn["time a token and layer (ms)"] == [[100, 200], [10, 20]]
    assert drawn["FLOPs a token and layer (MFLOP)"] == [[1000, 2000], [10, 20]]
    ax = FIGURES["recall_by_cache"]().axes[0]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines[:3]] == [
        ([3, 18], [20, 100]), ([8], [70]), ([128], [100])]  # fmt: skip


def test_the_schematic_stores_what_it_says():
    fig = FIGURES["shared_heads"]()
    filled = []
    for ax in fig.axes:
        filled.append(sum(patch.get_facecolor() != (1, 1, 1, 1) for patch in ax.patches))
    assert filled == [16, 4, 2, 2]  # keys and values of 8 heads, of 2 groups, of 1; a latent and a rotated key
