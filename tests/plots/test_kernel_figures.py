"""What the figures of notebook 06 draw, read back from the axes."""

import numpy as np
import pytest

from minids.plots import kernels


def test_roofline_puts_rings_on_the_roof_and_dots_where_it_was_measured():
    points = [("slope", 2.0, "A", 1.5e12), ("flat", 900.0, "B", None)]
    (ax,) = kernels.kernel_roofline(1e12, {"A": 1e14, "B": 2e14}, points).axes
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    at = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in marks]
    assert at == [(2.0, 2.0), (2.0, 1.5), (900.0, 200.0)]  # TFLOP/s
    assert any("1  slope\n2  flat" in text.get_text() for text in ax.texts)


def test_decode_heads_draws_the_balance():
    rows = [{"heads": h, "intensity": 2.0 * h, "rate": 1.5 * h, "plain_rate": h} for h in (8, 128)]
    left, right = kernels.decode_heads(rows, 1e12, 1e14).axes
    assert left.lines[3].get_xdata()[0] == pytest.approx(50) and "50" in left.texts[0].get_text()
    assert [list(line.get_ydata()) for line in right.lines[1:3]] == [pytest.approx([0.5, 0.5]), pytest.approx([0.75, 0.75])]
    assert right.lines[0].get_ydata()[0] == pytest.approx(1) and right.lines[0].get_ydata()[-1] < 0.4


def test_ladder_bars_keep_order_and_colours():
    (ax,) = kernels.ladder_bars({"a": 1.0, "minids": 3.0, "peer": 2.0}, "TB/s", ["peer"], notes={"a": "exact"}).axes
    assert [bar.get_width() for bar in ax.patches] == [1, 3, 2]
    assert len({bar.get_facecolor() for bar in ax.patches}) == 3
    assert "1.00" in ax.texts[0].get_text() and "exact" in ax.texts[0].get_text()


def test_tiles_of_a_product_say_what_is_read():
    one, two = kernels.product_tiles(64, 64, 32, [(16, 16), (32, 64)]).axes
    assert one.get_title() == "16 x 16: 16,384 reads" and two.get_title() == "32 x 64: 6,144 reads"
    assert [(bar.get_width(), bar.get_height()) for bar in two.patches[3:]] == [(16, 32), (64, 16), (64, 32)]


def test_programs_are_numbered_in_their_tiles():
    (ax,) = kernels.programs_on_tiles({"two": np.arange(8).reshape(2, 4) // 2}).axes
    assert [text.get_text() for text in ax.texts] == ["0", "0", "1", "1", "2", "2", "3", "3"]


def test_orders_and_traffic():
    order = np.arange(12).reshape(3, 4)
    ax = kernels.visit_orders({"rows": order}, 4).axes[0]
    assert (np.asarray(ax.images[0].get_array()) == order).all()
    (ax,) = kernels.cache_traffic([1, 2], {"rows": [30, 20]}, 10, 2).axes
    assert ax.lines[0].get_ydata().tolist() == [30, 20] and ax.lines[1].get_ydata()[0] == 10


def test_timelines_end_where_they_are_cut():
    lanes = {"tensor core": [(0, 10, "product"), (15, 40, "product"), (50, 60, "product")]}
    (ax,) = kernels.warp_timelines({"one": lanes}, 30).axes
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 10), (15, 15)]


def test_sums_tails_and_experts():
    (ax,) = kernels.sums_lost([1, 2], {"m": [0.1, 0.2]}, {"s": [0.3, 0.4]}).axes
    assert [line.get_label() for line in ax.lines] == ["measured: m", "simulated: s"]
    (ax,) = kernels.tail_waves([2, 6], {"m": [50, 60]}, 4, 100.0).axes
    assert ax.lines[0].get_ydata().tolist() == [50, 75, 100, 62.5, 75]  # 2 to 6 tiles on 4 places
    (ax,) = kernels.expert_tails([1, 2], {"t": [0.25, 0.5]}).axes
    assert ax.lines[0].get_ydata().tolist() == [25, 50]
