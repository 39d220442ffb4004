"""The figures of notebook 14 show the numbers that they are given, on the axes that they name."""

import numpy as np
import pytest

from minids.plots import distill as draw


def test_a_race_has_thin_runs_and_the_median_in_gflop():
    runs = [[(1e9, 0.1), (2e9, 0.3)], [(3e9, 0.5), (4e9, 0.7)], [(5e9, 0.6), (9e9, 0.8)]]
    ax = draw.race({"distilled": runs}, spent=1.5e9).axes[0]
    assert len(ax.lines) == 4 and "GFLOP" in ax.get_xlabel()
    assert list(ax.lines[0].get_xdata()) == [1, 2] and list(ax.lines[0].get_ydata()) == [0.1, 0.3]
    assert list(ax.lines[3].get_xdata()) == [3, 4] and list(ax.lines[3].get_ydata()) == [0.5, 0.7]
    assert ax.patches[0].get_width() == 1.5


def test_one_run_is_no_median():
    ax = draw.race({"distilled": [[(1e9, 0.1), (2e9, 0.3)]]}).axes[0]
    assert len(ax.lines) == 1 and ax.get_legend().get_texts()[0].get_text() == "distilled" and not ax.patches


def test_the_sample_curve_has_its_mean():
    ax = draw.sample_curve([20, 80], [[0.2, 0.6], [0.4, 1.0]]).axes[0]
    assert ax.lines[2].get_ydata() == pytest.approx([0.3, 0.8]) and ax.get_xscale() == "log"


def test_the_guide_of_gradient_errors_falls_with_the_root():
    ax = draw.gradient_errors([1, 4, 100], {"samples": [2.0, 1.1, 0.3]}).axes[0]
    assert list(ax.lines[1].get_ydata()) == [2.0, 1.0, 0.2]


def test_each_way_is_a_row_with_a_dot_a_seed_and_their_mean():
    found = {"a": {"x": [0.1, 0.3], "y": [7, 9]}, "b": {"x": [0.5, 0.7], "y": [30, 32]}}
    left, right = draw.arms(found, {"x": "share (0 to 1)", "y": "tokens"}).axes
    assert left.get_xlim() == (0, 1.04) and right.get_xlim()[1] > 32
    assert [tuple(line.get_ydata()) for line in right.lines] == [(0, 0), (0,), (1, 1), (1,)]
    assert [line.get_xdata()[0] for line in right.lines[1::2]] == [8, 31]
    assert left.yaxis_inverted() and [text.get_text() for text in left.get_yticklabels()] == ["a", "b"]


def test_published_students_stand_at_their_size_and_score():
    ax = draw.published({"Qwen 1.5B": (1.5, 28.9), "Llama 8B": (8.0, 50.4)}, {"R1": 79.8}).axes[0]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines[:2]] == [(1.5, 28.9), (8.0, 50.4)]
    assert set(ax.lines[2].get_ydata()) == {79.8}


def test_a_teacher_and_its_fits_share_the_axis():
    ax = draw.two_fits([0.2, 0.8], {"student": [0.5, 0.5]}, ["yes", "no"]).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.2, 0.8] and np.allclose(ax.lines[0].get_ydata(), 0.5)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["yes", "no"]
    assert len(draw.two_ways().axes[0].patches) >= 8
