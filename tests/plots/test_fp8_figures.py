"""What the figures of notebook 05 draw, read back from the axes."""

import numpy as np
import pytest

from minids.plots import fp8


def test_number_lines_draw_every_number():
    numbers = {"A": [0.0, 0.5, 1.0, 2.0, 4.0], "B": [0.0, 1.0, 3.0]}
    near, whole = fp8.number_lines(numbers, {"A": 1.0, "B": 1.0}, upto=2.0).axes
    assert [len(c.get_segments()) for c in near.collections] == [4, 2]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in whole.patches]
    assert spans == [(0, 2), (-1, 0), (0, pytest.approx(np.log2(3))), (0, 0)]  # normal and subnormal part of each


def test_rounding_errors_keep_the_worst_of_each_quarter():
    x = np.exp2(np.linspace(0, 1, 400, endpoint=False))
    error = np.zeros(400)
    error[[7, 150, 399]] = [0.1, 0.2, 0.3]
    (ax,) = fp8.rounding_errors(x, {"A": error}, {"A": 0.25}).axes
    assert ax.patches[0].get_data().values.tolist() == [0.1, 0.2, 0.0]  # the last quarter closes the line


def test_histograms_count_what_is_lost():
    values = np.array([-30.0, -11.0, -9.5, 0.0])
    (ax,) = fp8.value_histograms({"one": {"x": values}}, low=-9, high=8.8).axes
    assert ax.get_legend().get_texts()[0].get_text() == "x: 50% lost"
    assert ax.patches[-1].get_data().values.sum() == 100


def test_outlier_maps_show_single_channels():
    x = np.ones((3, 16))
    x[:, 5] = 1024
    axes = fp8.outlier_maps(x, {"tile": x > 1}, tile=8).axes
    assert axes[0].images[0].get_array().tolist() == [[0, 10, 0, 0]] * 3
    assert axes[1].get_title() == "tile: 6.2%"


def test_formats_of_a_heap_are_named_once():
    points = [("E4M3", "a", 8.0, 31.5), ("E4M3", "b", 8.25, 31.8), ("E5M2", "a", 8.0, 25.0), ("E4M3", "c", 8.0, 10.0)]
    (ax,) = fp8.format_costs(points).axes
    assert sorted(t.get_text() for t in ax.texts) == ["E4M3", "E4M3", "E5M2"]
    assert [len(c.get_offsets()) for c in ax.collections] == [2, 1, 1]


def test_memory_bars_add_up():
    (ax,) = fp8.memory_bars({"BF16": {"kept": 1000.0, "weights": 200.0}, "FP8": {"kept": 500.0}}, "KiB").axes
    assert [t.get_text() for t in ax.texts] == ["1,200", "500"]
    assert [bar.get_width() for bar in ax.patches] == [1000, 500, 200, 0]


def test_a_single_point_is_a_star():
    left, right = fp8.accumulation({"a": [0.0, -0.1]}, 32, {"a": {256: 0.1, 512: 0.2}, "V3": {512: 0.02}}).axes
    assert left.lines[0].get_xdata().tolist() == [32, 64]
    assert [line.get_marker() for line in right.lines] == ["o", "*"]
    assert right.lines[1].get_ydata()[0] == 2.0


def test_landing_breaks_at_jumps():
    (ax,) = fp8.landing([1.0, 2.0, 4.0], {"up": [400.0, 224.0, 440.0]}, 448).axes
    assert np.isnan(ax.lines[0].get_ydata()[1:]).all()


def test_three_products_cut_every_matrix_along_the_sum():
    axes = fp8.three_products().axes
    assert [ax.get_title().split()[0] for ax in axes] == ["Fprop", "Dgrad", "Wgrad"]
    # Of each panel: three matrices and the two first groups, filled. Width and height of these in stretches of 128.
    groups = [[(round(p.get_width() / fp8.UNIT, 3), round(p.get_height() / fp8.UNIT, 3)) for p in ax.patches[1:4:2]]
              for ax in axes]  # fmt: skip
    assert groups == [[(1, 0.125), (1, 1)], [(1, 0.125), (1, 1)], [(1, 0.125), (0.125, 1)]]


def test_the_controls_band_never_shrinks_and_dots_are_held_out_losses():
    from minids.plots.fp8_training import loss_differences

    found = {"curve": [0.5, 0.001, -0.003, 0.002], "start": 1, "largest": 0.003, "valid": [[1, 0.2], [4, 0.001]]}
    variants = {v: {"losses": [4.0, 3.0, 2.5, 2.0]} for v in ("bf16", "bf16_split")}
    result = {"ema": 0.9, "claim": 0.0025, "variants": variants,
              "differences": {"bf16_split": found}}  # fmt: skip
    left, right = loss_differences(result).axes
    assert len(left.lines) == 2 and right.lines[0].get_ydata() == pytest.approx([0.1, -0.3, 0.2])
    assert list(right.lines[1].get_xdata()) == [4] and list(right.lines[1].get_ydata()) == pytest.approx([0.1])
    corners = right.collections[0].get_paths()[0].vertices
    assert {round(float(y), 6) for _, y in corners} == {0.1, -0.1, 0.3, -0.3}
