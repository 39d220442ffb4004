"""The figures of notebook 04: which token enters where, what each depth learns, what MTP costs and what is accepted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

INK, PALE = "#222222", "#cfd6dc"
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 95%, runs - 1 degrees


# ---- the chain ---------------------------------------------------------------------------------------------------------


def _box(ax: Axes, x: float, y: float, text: str, colour: str, width: float = 1.5, height: float = 0.72) -> None:
    shape = dict(xy=(x - width / 2, y - height / 2), width=width, height=height,
                 boxstyle="round,pad=0.02,rounding_size=0.08")  # fmt: skip
    ax.add_patch(FancyBboxPatch(**shape, facecolor=colour, edgecolor="none", alpha=0.18, zorder=1))
    ax.add_patch(FancyBboxPatch(**shape, facecolor="none", edgecolor=colour, linewidth=1.2, zorder=2))
    ax.text(x, y, text, ha="center", va="center", color=INK, fontsize=8.5, zorder=3)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=1.3, shrinkA=0, shrinkB=0))


def _heads(ax: Axes, tokens: Sequence[str], chained: bool) -> None:
    """One position's way through main model and modules: a column each, inputs below, predictions above."""
    columns = [0.0, 2.6, 5.2]
    names = ["main model", "MTP module 1", "MTP module 2"] if chained else ["trunk", "head 2", "head 3"]
    for k, x in enumerate(columns):
        colour = BLUE if k == 0 else GREEN if chained else ORANGE
        low = 1.5 if chained or k == 0 else 2.35
        _box(ax, x, low, names[k], colour)
        _box(ax, x, 3.6, "shared head", PURPLE, height=0.5)
        _arrow(ax, (x, low + 0.38), (x, 3.32))
        _arrow(ax, (x, 3.87), (x, 4.32))
        ax.text(x, 4.62, f"predicts {tokens[k + 1]}", ha="center", va="center", fontsize=9, color=INK, weight="bold")
        ax.text(x + 0.1, 2.95, f"$h_i^{k}$", color=INK, fontsize=10)
        if k == 0 or chained:
            _arrow(ax, (x, 0.42), (x, low - 0.38), RED if k else GREY)
            ax.text(x, 0.12, f"reads {tokens[k]}", ha="center", va="center", fontsize=9, color=INK)
        if k and chained:
            _arrow(ax, (columns[k - 1] + 0.77, 1.5), (x - 0.77, 1.5))
        elif k:
            ax.plot([columns[k - 1] + (0.77 if k == 1 else 0), x], [1.5, 1.5], color=GREY, linewidth=1.3)
            _arrow(ax, (x, 1.5), (x, low - 0.38))
    ax.set(xlim=(-1.1, 6.3), ylim=(-0.25, 5.0))
    ax.axis("off")


@styled
def chain_of_modules(tokens: Sequence[str] = ("$t_i$", "$t_{i+1}$", "$t_{i+2}$", "$t_{i+3}$")) -> Figure:
    """Left parallel heads, right V3's chain: what reads which token at position i, and what it is asked for."""
    fig, axes = plt.subplots(1, 2, figsize=(10.4, 3.9))
    for ax, chained, title in zip(axes, (False, True), ("parallel heads: no later token is read",
                                                       "V3's chain: module k reads token i + k"), strict=True):
        _heads(ax, tokens, chained)
        ax.set_title(title)
    return fig


# ---- training ----------------------------------------------------------------------------------------------------------


@styled
def depth_losses(losses: Mapping[str, Sequence[float]], switch: int, window: int = 15) -> Figure:
    """Loss of each depth over the steps, smoothed; ``switch`` is the step at which lambda falls."""
    fig, ax = plt.subplots(figsize=(6.8, 3.4))
    for (name, values), colour in zip(losses.items(), (BLUE, GREEN, ORANGE), strict=False):
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        ax.plot(np.arange(len(smooth)) + window // 2, smooth, color=colour, label=name)
    ax.axvline(switch, color=GREY, linestyle=":")
    ax.text(switch - 2, ax.get_ylim()[1] * 0.99, "lambda 0.3 to 0.1 ", color=INK, va="top", ha="right")
    ax.set(xlabel="training step", ylabel="loss (nats a byte)")
    ax.legend(loc="lower left")
    return fig


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95% interval of the mean, from Student's t."""
    if len(values) < 2:
        return values[0], 0.0
    t = STUDENT.get(len(values), 2.0)
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


@styled
def with_and_without(result: Mapping) -> Figure:
    """Left validation loss of each run over its compute; right differences to the plain run of the same seed. ``result``:
    what minids.experiments.mtp keeps."""
    runs = result["runs"]
    arms = list(dict.fromkeys(line["arm"] for line in runs))
    plain = {line["seed"]: line["valid"] for line in runs if line["arm"] == "plain"}
    fig, axes = plt.subplots(1, 2, figsize=(10.2, 3.6), width_ratios=(1, 1.15))
    shift = {"parallel, D = 2": 1.012, "MTP, D = 2": 0.988, "MTP, D = 1": 1.012, "plain, longer": 0.988}
    for arm, colour in zip(arms, COLOURS, strict=False):
        found = [line for line in runs if line["arm"] == arm]
        tera = [line["flops"] / 1e12 * shift.get(arm, 1.0) for line in found]
        axes[0].scatter(tera, [line["valid"] for line in found], s=20, color=colour, label=arm, alpha=0.85)
    axes[0].set(xlabel="training compute (TFLOP)", ylabel="validation loss (nats a token)")
    axes[0].legend(fontsize=8)
    others = [arm for arm in arms if arm != "plain"]
    for place, arm in enumerate(others):
        colour = COLOURS[arms.index(arm)]
        values = [line["valid"] - plain[line["seed"]] for line in runs if line["arm"] == arm]
        mean, half = _interval(values)
        axes[1].scatter(values, [place + 0.16] * len(values), s=16, color=colour, alpha=0.6)
        axes[1].errorbar([mean], [place - 0.12], xerr=[half], fmt="o", color=colour, capsize=3)
        right = max(*values, mean + half) + 0.008
        axes[1].text(right, place, f"{mean:+.3f} ± {half:.3f}", va="center", fontsize=8.5, color=INK)
    axes[1].axvline(0, color=INK, linewidth=0.9)
    axes[1].set_yticks(range(len(others)), others)
    axes[1].margins(x=0.22)
    axes[1].invert_yaxis()
    axes[1].set_xlabel("validation loss less that of plain (nats a token)")
    return fig


# ---- acceptance --------------------------------------------------------------------------------------------------------


@styled
def accepted_by_depth(result: Mapping) -> Figure:
    """Accepted share of drafts by depth, chain and parallel heads, best token (bars) and sampling (diamonds); the band is
    what V3 reports for depth 1."""
    runs = result["runs"]
    kinds = {"MTP, D = 2": (GREEN, "chain"), "parallel, D = 2": (ORANGE, "parallel heads")}
    fig, ax = plt.subplots(figsize=(6.8, 3.5))
    ax.axhspan(0.85, 0.90, xmax=0.5, color=BLUE, alpha=0.18, linewidth=0)
    ax.text(0.45, 0.915, "V3: 85 to 90%", color=INK, ha="right", va="bottom", fontsize=8.5)
    for j, (arm, (colour, name)) in enumerate(kinds.items()):
        found = [line for line in runs if line["arm"] == arm]
        for depth in (0, 1):
            place = depth + (j - 0.5) * 0.36
            agree, half = _interval([line["agree"][depth] for line in found])
            overlap, _ = _interval([line["overlap"][depth] for line in found])
            ax.bar(place, agree, width=0.32, color=colour, yerr=half, capsize=3, error_kw={"linewidth": 1},
                   label=f"{name}: same best token" if depth == 0 else None)  # fmt: skip
            ax.scatter(place, overlap, marker="D", s=34, facecolor="white", edgecolor=INK, zorder=3,
                       label="overlap of the distributions" if depth == 0 and j == 1 else None)  # fmt: skip
            ax.text(place, 0.03, f"{agree:.0%}", ha="center", color="white", fontsize=9, weight="bold")
    ax.set_xticks([0, 1], ["depth 1", "depth 2"])
    ax.set(ylabel="accepted drafts (share)", ylim=(0, 1), xlim=(-0.5, 1.5))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


@styled
def overlap_of_two(p: Sequence[float], q: Sequence[float], names: Sequence[str]) -> Figure:
    """Two distributions over a few tokens, and what they share: sum min(p, q)."""
    fig, ax = plt.subplots(figsize=(5.6, 2.9))
    place = np.arange(len(p))
    ax.bar(place - 0.2, p, width=0.36, color=BLUE, label="p, main model")
    ax.bar(place + 0.2, q, width=0.36, color=GREEN, label="q, draft")
    ax.bar(place, np.minimum(p, q), width=0.8, facecolor="none", edgecolor=INK, hatch="///", linewidth=0.8,
           label="min(p, q)")
    ax.set_xticks(place, names)
    ax.set(xlabel="token", ylabel="probability", title=f"shared: {np.minimum(p, q).sum():.2f}")
    ax.legend(loc="upper right")
    return fig
