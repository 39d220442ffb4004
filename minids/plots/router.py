"""The figures of notebook 03: how a token finds its experts, how a router collapses, what each strategy does about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

INK, PALE = "#222222", "#cfd6dc"


# ---- one token ---------------------------------------------------------------------------------------------------------


def _write(ax: Axes, values: Sequence[float], shown: Sequence[bool]) -> None:
    for i, value in enumerate(values):
        if shown[i]:
            ax.annotate(f"{value:.2f}", (i, value), (0, 3 if value >= 0 else -11), textcoords="offset points", ha="center",
                        fontsize=8, color=INK)  # fmt: skip


@styled
def routing_steps(scores: Sequence[float], bias: Sequence[float], group_scores: Sequence[float], kept: Sequence[int],
                  gates: Mapping[int, float]) -> Figure:  # fmt: skip
    """One token's way: scores s; s + b with the groups, kept ones shaded; gate values of the chosen. ``gates``: expert ->
    gate value."""
    n, size = len(scores), len(scores) // len(group_scores)
    expert, everyone = np.arange(n), [True] * n
    wish = np.add(scores, bias)
    fig, axes = plt.subplots(1, 3, figsize=(10.2, 3.3))
    titles = ("1  scores s", "2  the choice goes by s + b", "3  the gate values come from s")
    for ax, title in zip(axes, titles, strict=True):
        for g in range(len(group_scores)):
            ax.axvspan(g * size - 0.46, (g + 1) * size - 0.54, color="#e8f3ee" if g in kept else "#f0f0f0", zorder=0)
        ax.set_title(title)
        ax.set_xticks(expert, [str(i) for i in expert])
        ax.set_xlabel("expert (number)")
        ax.grid(False)
    axes[0].bar(expert, scores, color=BLUE, width=0.6)
    _write(axes[0], scores, everyone)
    axes[0].set(ylabel="score (0 to 1)", ylim=(0, 1.12))
    colours = [ORANGE if i in gates else PALE for i in expert]
    axes[1].bar(expert, wish, color=colours, width=0.6)
    axes[1].scatter(expert, scores, marker="_", s=190, color=BLUE, linewidths=2, zorder=3)
    _write(axes[1], wish, everyone)
    for g, total in enumerate(group_scores):
        text = f"group {g}: {total:.1f}\n{'kept' if g in kept else 'out'}"
        axes[1].text((g + 0.5) * size - 0.5, 0.98, text, ha="center", va="center", fontsize=8.5, color=INK)
    axes[1].set(ylabel="score and bias (number)", ylim=(0, 1.12))
    values = [gates.get(i, 0.0) for i in range(n)]
    axes[2].bar(expert, values, color=GREEN, width=0.6)
    _write(axes[2], values, [i in gates for i in range(n)])
    axes[2].set(ylabel="gate value (sums to the scale)", ylim=(0, 2.0))
    return fig


# ---- a router alone ----------------------------------------------------------------------------------------------------


@styled
def collapse(violations: Mapping[str, Sequence[float]], loads: Mapping[str, Sequence[float]], chosen: int) -> Figure:
    """Left MaxVio of each training batch; right the share of all tokens that each expert got at the end, heaviest first, in
    a row for each run. ``chosen`` experts a token."""
    fig = plt.figure(figsize=(10.2, 4.2))
    grid = fig.add_gridspec(len(loads), 2, width_ratios=(1.15, 1))
    ax = fig.add_subplot(grid[:, 0])
    experts = len(next(iter(loads.values())))
    for (name, values), colour in zip(violations.items(), (RED, PURPLE, ORANGE, BLUE, GREEN), strict=False):
        smooth = np.convolve(values, np.ones(5) / 5, mode="valid")
        ax.plot(np.arange(len(smooth)) + 3, smooth, color=colour, label=name)
    ceiling = experts / chosen - 1
    ax.axhline(ceiling, color=GREY, linewidth=1, linestyle=":")
    ax.text(1, ceiling * 1.012, "one expert gets every token", color=GREY, va="bottom")
    ax.set(xlabel="training step", ylabel="MaxVio of the batch (0 is balance)", ylim=(0, ceiling * 1.12))
    ax.legend(loc="center right", bbox_to_anchor=(1, 0.68))
    for row, ((name, load), colour) in enumerate(zip(loads.items(), (RED, PURPLE, ORANGE, BLUE, GREEN), strict=False)):
        part = fig.add_subplot(grid[row, 1])
        load = np.sort(np.asarray(load, float))[::-1]
        share = 100 * chosen * load / load.sum()
        part.bar(np.arange(1, experts + 1), share, color=colour, width=0.75)
        part.axhline(100 * chosen / experts, color=INK, linewidth=0.9, linestyle=":")
        part.set(ylim=(0, 105), yticks=(0, 50, 100))
        part.text(experts + 0.4, 84, name, ha="right", color=INK)
        if row == len(loads) - 1:
            part.set_xlabel("expert, heaviest first (rank)")
        else:
            part.set_xticklabels([])
    fig.supylabel("share of tokens (%)", x=0.512, fontsize=10)
    return fig


# ---- every strategy on one page ----------------------------------------------------------------------------------------


@styled
def strategy_loads(before: Sequence[float], after: Mapping[str, Sequence[float]], columns: int = 4) -> Figure:
    """Load of every expert over that of perfect balance, before (grey) and after each strategy worked alone on the same
    router; all loads are of equally many tokens."""
    rows = -(-len(after) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(10.2, 1.55 * rows + 0.5), sharex=True, sharey=True)
    order = np.argsort(before)[::-1]

    def relative(load: Sequence[float]) -> np.ndarray:
        return np.asarray(load, float)[order] / np.mean(before)  # of the same tokens: what is dropped is missing

    expert = np.arange(1, len(before) + 1)
    top = 1.12 * max(relative(load).max() for load in (before, *after.values()))
    for ax, (name, load) in zip(axes.flat, after.items(), strict=False):
        ax.bar(expert, relative(before), color=PALE, width=0.9)
        ax.bar(expert, relative(load), color=BLUE, width=0.5)
        ax.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        ax.set_title(name, fontsize=9.5)
        ax.text(0.97, 0.84, f"MaxVio {relative(load).max() - 1:.2f}", ha="right", transform=ax.transAxes, color=INK,
                fontsize=8.5)
        ax.set(ylim=(0, top))
        ax.grid(False)
    for ax in axes.flat[len(after) :]:
        ax.axis("off")
    axes.flat[-1].legend(handles=[Patch(color=PALE, label="before"), Patch(color=BLUE, label="after")], loc="center")
    fig.supxlabel("expert, heaviest before first (rank)", fontsize=10)
    fig.supylabel("load / load of perfect balance (ratio)", fontsize=10)
    return fig


@styled
def bias_at_work(loads: np.ndarray, biases: np.ndarray) -> Figure:
    """A router alone under the bias: each expert's load over the mean load, and its bias, over the steps; (steps, E)."""
    fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.3))
    relative = loads / loads.mean(1, keepdims=True)
    rank = np.argsort(relative[0])[::-1]
    for place, e in enumerate(rank):
        colour = plt.get_cmap("viridis")(place / max(1, len(rank) - 1))
        axes[0].plot(relative[:, e], color=colour, linewidth=1)
        axes[1].plot(biases[:, e], color=colour, linewidth=1)
    axes[0].set(xlabel="step", ylabel="load / mean load (ratio)", title="each expert's load")
    axes[1].set(xlabel="step", ylabel="bias (number)", title="each expert's bias")
    return fig


# ---- wires --------------------------------------------------------------------------------------------------------------


@styled
def wire_times(experts: Sequence[int], ib: Sequence[float], nvlink: Sequence[float], used: int, equal: float) -> Figure:
    """Time of each wire for a token over the number of its experts, in microseconds."""
    fig, ax = plt.subplots(figsize=(6.8, 3.3))
    ax.plot(experts, ib, color=ORANGE, label="InfiniBand: a copy for each node")
    ax.plot(experts, nvlink, color=BLUE, label="NVLink: a copy for each expert")
    ax.axvline(used, color=GREY, linestyle=":")
    ax.text(used - 0.15, ax.get_ylim()[1] * 0.98, f"V3: {used} experts", color=INK, ha="right", va="top")
    ax.axvline(equal, color=GREEN, linestyle=":")
    ax.text(equal - 0.15, 0.1, f"equal at {equal:.1f}", color=INK, ha="right", va="bottom")
    ax.set(xlabel="experts of a token, on 4 nodes (count)", ylabel="time on the wire (µs a token)", ylim=(0, None))
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0.74))
    return fig


# ---- mistakes ----------------------------------------------------------------------------------------------------------


@styled
def counting_mistakes(violations: Mapping[str, Sequence[float]]) -> Figure:
    """Global MaxVio over the steps for several ways to count the load that moves the bias."""
    fig, ax = plt.subplots(figsize=(6.8, 3.3))
    for (name, values), colour in zip(violations.items(), COLOURS, strict=False):
        ax.plot(values, color=colour, label=name)
    ax.set_yscale("log")
    ax.set(xlabel="step", ylabel="MaxVio of the whole batch (log scale)")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig
