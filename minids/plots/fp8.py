"""The figures of notebook 05: which numbers a format has, what scales do, how sums go wrong, and the training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

INK, PALE = "#222222", "#cfd6dc"


# ---- formats ---------------------------------------------------------------------------------------------------------


@styled
def number_lines(numbers: Mapping[str, Sequence[float]], smallest_normal: Mapping[str, float], upto: float = 2.0) -> Figure:
    """Above, every number of each format from 0 to ``upto``; below, its whole range in powers of two, the subnormal part
    hatched. ``numbers``: name -> all non-negative numbers in order."""
    fig, (near, whole) = plt.subplots(2, 1, figsize=(9.4, 4.6), height_ratios=(1, 1))
    for row, ((name, values), colour) in enumerate(zip(numbers.items(), COLOURS, strict=False)):
        values = np.asarray(values)
        shown = values[values <= upto]
        near.vlines(shown, row - 0.32, row + 0.32, color=colour, linewidth=1.1)
        low, normal, high = np.log2(values[1]), np.log2(smallest_normal[name]), np.log2(values[-1])
        whole.barh(row, high - normal, left=normal, height=0.5, color=colour)
        whole.barh(row, normal - low, left=low, height=0.5, color="white", edgecolor=colour, hatch="////")
        whole.text(high + 0.5, row, f"{values[-1]:,.6g}", va="center", color=INK)
        whole.text(low - 0.5, row, f"$2^{{{round(low)}}}$", va="center", ha="right", color=INK)
    for ax in (near, whole):
        ax.set_yticks(range(len(numbers)), list(numbers))
        ax.set_ylim(len(numbers) - 0.4, -0.6)
        ax.grid(False, axis="y")
    near.set(xlabel="value (number)", xlim=(-0.01, upto * 1.01))
    whole.set(xlabel="value (power of two); hatched: subnormal", xlim=(-23.5, 20.5))
    return fig


@styled
def rounding_errors(x: Sequence[float], errors: Mapping[str, Sequence[float]], bounds: Mapping[str, float]) -> Figure:
    """Relative error of rounding over the size of the number: for each format the largest error in each quarter of a power
    of two, and half a unit in the last place as a dotted line. ``x``: many sizes, evenly spread over powers of two."""
    fig, ax = plt.subplots(figsize=(9.4, 3.4))
    quarter = np.floor(4 * np.log2(x))
    starts = np.flatnonzero(np.diff(quarter, prepend=quarter[0] - 1))
    for (name, values), colour in zip(errors.items(), COLOURS[1:], strict=False):
        worst = np.maximum.reduceat(np.asarray(values), starts)
        ax.stairs(worst[:-1], 2 ** (quarter[starts] / 4), color=colour, linewidth=1.5, label=name, baseline=None)
        ax.axhline(bounds[name], color=colour, linestyle=":", linewidth=1.2)
        ax.text(x[-1], bounds[name], f" $2^{{{round(np.log2(bounds[name]))}}}$", color=INK, va="center")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set(xlabel="size of the number (power of two)", ylabel="largest relative error (ratio)", ylim=(2.0**-9, 3))
    ax.legend(loc="upper center", ncol=len(errors))
    return fig


@styled
def value_histograms(panels: Mapping[str, Mapping[str, Sequence[float]]], low: float, high: float) -> Figure:
    """Histograms of log2 |x / s|, a panel for each granularity and a line for each tensor; the range that the format holds
    is green, what lies left of it becomes 0. ``low``, ``high``: log2 of the smallest and the largest number."""
    fig, (axes,) = plt.subplots(1, len(panels), figsize=(10.2, 3.3), sharex=True, sharey=True, squeeze=False)
    bins = np.arange(low - 16, high + 1.01, 0.5)
    for ax, (title, tensors) in zip(axes, panels.items(), strict=True):
        ax.axvspan(low, high, color="#e3f1ea", zorder=0)
        ax.axvspan(bins[0], low - 1, color="#f7e4dc", zorder=0)
        for (name, values), colour in zip(tensors.items(), (BLUE, ORANGE, PURPLE), strict=False):
            values = np.asarray(values)
            share, edges = np.histogram(values.clip(bins[0]), bins)
            lost = 100 * np.mean(values < low - 1)
            ax.stairs(100 * share / len(values), edges, color=colour, label=f"{name}: {lost:.2g}% lost", linewidth=1.4)
        ax.set_title(title)
        ax.set(xlabel="|x / s| (power of two)", xlim=(bins[0], bins[-1]))
        ax.legend(loc="upper left", fontsize=8)
    axes[0].set_ylabel("share of the numbers (%)")
    axes[0].set_ylim(0, axes[0].get_ylim()[1] * 1.35)
    return fig


@styled
def outlier_maps(x: np.ndarray, lost: Mapping[str, np.ndarray], tile: int) -> Figure:
    """Left |x| of a matrix with outliers, the largest of four neighbouring channels; then, for each granularity, which
    numbers lost more than half a unit in the last place (red). All (T, K), K a multiple of 4."""
    fig, axes = plt.subplots(1, 1 + len(lost), figsize=(10.6, 2.9), sharey=True)
    tokens, channels = x.shape
    largest = np.log2(np.abs(x).reshape(tokens, -1, 4).max(-1))
    picture = axes[0].imshow(largest, aspect="auto", cmap="viridis", interpolation="nearest",
                             extent=(-0.5, channels - 0.5, tokens - 0.5, -0.5))  # fmt: skip
    axes[0].set_title("log2 |x|")
    fig.colorbar(picture, ax=axes[0], location="left", pad=0.02, shrink=0.9)
    for ax, (name, bad) in zip(axes[1:], lost.items(), strict=True):
        ax.imshow(bad, aspect="auto", cmap="Reds", vmin=0, vmax=1.15, interpolation="nearest")
        ax.set_title(f"{name}: {100 * bad.mean():.1f}%")
    for ax in axes:
        ax.set_xticks(np.arange(0, x.shape[1] + 1, tile) - 0.5, [str(i) for i in range(0, x.shape[1] + 1, tile)])
        ax.set_xlabel("channel (number)")
        ax.grid(False)
    axes[0].yaxis.set_ticks_position("right")
    axes[0].tick_params(labelright=False)
    fig.supylabel("token (number)", fontsize=10)
    return fig


# ---- the three products ------------------------------------------------------------------------------------------------

UNIT = 0.9  # one stretch of 128 on paper


def _matrix(ax: Axes, x: float, y: float, rows: float, columns: float, group: tuple[float, float] | None, name: str,
            sides: tuple[str, str], colour: str) -> None:  # fmt: skip
    """A matrix of ``rows`` by ``columns`` stretches with its top left corner at (x, y), cut into groups of a scale."""
    ax.add_patch(Rectangle((x, y - rows * UNIT), columns * UNIT, rows * UNIT, facecolor=colour + "2b", edgecolor=colour))
    if group is not None:
        high, wide = group
        for i in range(1, round(rows / high)):
            ax.plot([x, x + columns * UNIT], [y - i * high * UNIT] * 2, color=colour, linewidth=0.6)
        for j in range(1, round(columns / wide)):
            ax.plot([x + j * wide * UNIT] * 2, [y - rows * UNIT, y], color=colour, linewidth=0.6)
        ax.add_patch(Rectangle((x, y - high * UNIT), wide * UNIT, high * UNIT, facecolor=colour, edgecolor="none"))
    ax.text(x + columns * UNIT / 2, y + 0.42, name, ha="center", va="bottom", color=INK, fontsize=10)
    ax.text(x + columns * UNIT / 2, y + 0.06, sides[1], ha="center", va="bottom", color=GREY, fontsize=8)
    ax.text(x - 0.08, y - rows * UNIT / 2, sides[0], ha="right", va="center", color=GREY, fontsize=8)


@styled
def three_products() -> Figure:
    """Fprop, Dgrad and Wgrad of one linear layer with the groups that share a scale: tokens T, inputs K, outputs N, all a
    few stretches of 128. The first group of each operand is filled."""
    fig, axes = plt.subplots(1, 3, figsize=(11.4, 2.3))
    t, k, n, thin = 2, 3, 2, 1 / 8
    row, column, block = (thin, 1), (1, thin), (1, 1)
    plans = {
        "Fprop   y = x Wᵀ   (sum over K)": [
            ("x", t, k, row, ("T", "K"), BLUE), ("Wᵀ", k, n, block, ("K", "N"), GREEN),
            ("y", t, n, None, ("T", "N"), GREY)],
        "Dgrad   dx = dy W   (sum over N)": [
            ("dy", t, n, row, ("T", "N"), ORANGE), ("W", n, k, block, ("N", "K"), GREEN),
            ("dx", t, k, None, ("T", "K"), GREY)],
        "Wgrad   dW = dyᵀ x   (sum over T)": [
            ("dyᵀ", n, t, row, ("N", "T"), ORANGE), ("x", t, k, column, ("T", "K"), BLUE),
            ("dW", n, k, None, ("N", "K"), GREY)],
    }  # fmt: skip
    for ax, (title, operands) in zip(axes, plans.items(), strict=True):
        x = 0.0
        for i, (name, rows, columns, group, sides, colour) in enumerate(operands):
            _matrix(ax, x, 0, rows, columns, group, name, sides, colour)
            if i < 2:
                ax.text(x + columns * UNIT + 0.26, -0.9, "·="[i], ha="center", va="center", fontsize=14, color=INK)
            x += columns * UNIT + 0.88
        ax.set(xlim=(-0.4, 9.2), ylim=(-2.8, 1.1))
        ax.set_title(title, fontsize=10)
        ax.set_aspect("equal")
        ax.axis("off")
    return fig


# ---- accumulation ------------------------------------------------------------------------------------------------------


@styled
def accumulation(trace: Mapping[str, Sequence[float]], step: int, errors: Mapping[str, Mapping[int, float]]) -> Figure:
    """Left: one sum on its way along K, its distance from the exact partial sum, a value every ``step`` products. Right:
    error over K; a single point is drawn as a star."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.2, 3.5))
    for (name, values), colour in zip(trace.items(), (RED, BLUE), strict=False):
        left.plot(step * np.arange(1, len(values) + 1), 100 * np.asarray(values), color=colour, label=name)
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="products added so far (count)", ylabel="error (% of the final sum)", title="one sum along K")
    left.legend(loc="lower left")
    for (name, points), colour in zip(errors.items(), (RED, BLUE, GREY), strict=False):
        alone = len(points) == 1
        right.plot(list(points), [100 * v for v in points.values()], color=INK if alone else colour,
                   linestyle="none" if alone else "-", marker="*" if alone else "o", markersize=12 if alone else 4,
                   label=name)  # fmt: skip
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set(xlabel="K (count, powers of two)", ylabel="error (%)", title="many sums, over K")
    right.legend(loc="upper left")
    return fig


# ---- scales, formats ---------------------------------------------------------------------------------------------------


@styled
def landing(amax: Sequence[float], largest: Mapping[str, Sequence[float]], limit: float) -> Figure:
    """Where the largest number of a group lands, |x| / s, over that number, for each rule of the scale."""
    fig, ax = plt.subplots(figsize=(7.6, 3.2))
    for (name, values), colour, dashes in zip(largest.items(), (BLUE, GREEN, RED), ("-", "-", (0, (4, 3))), strict=False):
        values = np.array(values, float)
        jumps = np.abs(np.diff(values)) > 0.3 * limit
        values[1:][jumps] = np.nan
        ax.plot(amax, values, color=colour, label=name, linestyle=dashes)
    ax.axhline(limit, color=GREY, linestyle=":")
    ax.text(amax[0], limit * 1.17, f"dotted: the largest number of the format, {limit:g}", color=INK, va="bottom")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="largest number of the group (power of two)", ylabel="where it lands (number)", ylim=(0, limit * 1.35))
    ax.legend(loc="lower center", ncol=3)
    return fig


@styled
def format_costs(points: Sequence[tuple[str, str, float, float]]) -> Figure:
    """Signal over quantisation noise against the bits that a number takes with its share of the scale. ``points``:
    (format, family, bits, decibels)."""
    fig, ax = plt.subplots(figsize=(8.4, 4.0))
    families = list(dict.fromkeys(p[1] for p in points))
    for family, colour, marker in zip(families, (BLUE, GREEN, ORANGE, PURPLE), "osDv", strict=False):
        mine = [p for p in points if p[1] == family]
        ax.scatter([p[2] for p in mine], [p[3] for p in mine], color=colour, marker=marker, s=38, label=family, zorder=3)
    named: list[tuple[str, float, float]] = []
    for label, _, bits, decibels in sorted(points, key=lambda p: -p[2]):  # a heap of one format is named once
        if not any(label == other and abs(bits - b) < 1 and abs(decibels - d) < 3 for other, b, d in named):
            ax.annotate(label, (bits, decibels), (8, 0), textcoords="offset points", va="center", color=INK)
            named.append((label, bits, decibels))
    ax.set(xlabel="bits a number, with its share of the scale (bits)", ylabel="signal over noise (dB)")
    ax.set_xlim(3.8, 13.2)
    ax.legend(loc="upper left")
    return fig


# ---- memory and training -----------------------------------------------------------------------------------------------


@styled
def memory_bars(parts: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """Stacked horizontal bars, one for each way to train: run -> {part: amount}."""
    fig, ax = plt.subplots(figsize=(9.4, 0.62 * len(parts) + 1.5))
    names = list(dict.fromkeys(part for run in parts.values() for part in run))
    left = np.zeros(len(parts))
    for name, colour in zip(names, (BLUE, ORANGE, GREEN, PURPLE, RED, GREY, PALE, "#555555"), strict=False):
        width = np.array([run.get(name, 0.0) for run in parts.values()])
        ax.barh(range(len(parts)), width, left=left, color=colour, label=name, height=0.62)
        left += width
    for y, total in enumerate(left):
        ax.text(total + left.max() * 0.01, y, f"{total:,.0f}", va="center", color=INK)
    ax.set_yticks(range(len(parts)), list(parts))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlabel=unit, xlim=(0, left.max() * 1.12))
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.28), ncol=4)
    return fig
