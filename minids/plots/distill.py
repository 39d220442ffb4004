"""The figures of notebook 14: two ways to a small reasoner, two divergences, and what each way costs and reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

# ---- the idea ---------------------------------------------------------------------------------------------------------

# name, what it is or does, x, y, colour
BOXES = (("teacher", "large, after RL", 0.0, 1.1, PURPLE), ("answers", "sampled, once", 1.7, 1.1, PURPLE),
         ("kept", "right ones, by rule", 3.4, 1.1, GREEN), ("student", "SFT: next token", 5.1, 1.1, BLUE),
         ("student", "small, a base", 0.0, 0.0, GREY), ("answers", "its own, each step", 1.7, 0.0, ORANGE),
         ("rewards", "by the same rule", 3.4, 0.0, GREEN),
         ("student", "GRPO: policy gradient", 5.1, 0.0, ORANGE))  # fmt: skip


@styled
def two_ways() -> Figure:
    """Above, distillation: answers travel one way. Below, RL on the student: a loop through its own answers."""
    fig, ax = plt.subplots(figsize=(9.4, 3.2))
    for name, how, x, y, colour in BOXES:
        ax.add_patch(FancyBboxPatch((x - 0.58, y - 0.25), 1.16, 0.5, boxstyle="round,pad=0.04", edgecolor=colour,
                                    facecolor="white", linewidth=1.8))  # fmt: skip
        ax.text(x, y + 0.1, name, ha="center", va="center", fontweight="bold", color=colour, fontsize=11)
        ax.text(x, y - 0.13, how, ha="center", va="center", fontsize=8)
    arrow = {"arrowstyle": "-|>", "color": "#444444", "linewidth": 1.3}
    for y in (0.0, 1.1):
        for x in (0.0, 1.7, 3.4):
            ax.annotate("", (x + 1.08, y), (x + 0.62, y), arrowprops=arrow)
    ax.plot([5.1, 5.1, 1.7], [-0.3, -0.55, -0.55], color="#444444", linewidth=1.3)
    ax.annotate("", (1.7, -0.28), (1.7, -0.57), arrowprops=arrow)
    ax.text(3.4, -0.72, "again, from the changed policy", ha="center", fontsize=8, color="#444444")
    ax.set(xlim=(-0.75, 5.85), ylim=(-0.85, 1.5))
    ax.axis("off")
    return fig


# ---- two divergences --------------------------------------------------------------------------------------------------


@styled
def two_fits(teacher: Sequence[float], fits: Mapping[str, Sequence[float]], words: Sequence[str] | None = None) -> Figure:
    """A teacher's distribution as bars, and students that were fitted to it as lines."""
    fig, ax = plt.subplots(figsize=(7.2, 3.2))
    places = np.arange(len(teacher))
    ax.bar(places, teacher, color="#cfcfcf", width=0.85, label="teacher, p")
    for (name, values), colour, marker in zip(fits.items(), (BLUE, RED, GREEN), "osv", strict=False):
        ax.plot(places, values, color=colour, marker=marker, markersize=4, label=name)
    if words is not None:
        ax.set_xticks(places, list(words))
    ax.set(xlabel="answer", ylabel="probability (0 to 1)")
    ax.legend()
    return fig


@styled
def gradient_errors(counts: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Figure:
    """The distance of an estimated gradient from the exact one over the number of samples, both logarithmic."""
    fig, ax = plt.subplots(figsize=(6.4, 3.4))
    for (name, values), colour in zip(errors.items(), (BLUE, GREEN, RED), strict=False):
        ax.plot(counts, values, color=colour, marker="o", label=name)
    first = next(iter(errors.values()))[0]
    ax.plot(counts, [first * (counts[0] / n) ** 0.5 for n in counts], color=GREY, linestyle=":", label="1/sqrt(samples)")
    ax.set(xscale="log", yscale="log", xlabel="samples of the teacher (number)",
           ylabel="error of the gradient\n(relative to its norm)")  # fmt: skip
    ax.legend()
    return fig


# ---- what it costs and reaches ----------------------------------------------------------------------------------------


@styled
def race(lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]], spent: float | None = None) -> Figure:
    """Held-out accuracy over computation: for each way a list of runs, a run being (FLOPs, accuracy) points; thin the
    runs, thick their median. ``spent``: FLOPs that went into the teacher's answers before the first step."""
    fig, ax = plt.subplots(figsize=(7.6, 3.8))
    for (name, runs), colour in zip(lines.items(), (BLUE, ORANGE, GREEN), strict=False):
        for run in runs:
            ax.plot([x / 1e9 for x, _ in run], [y for _, y in run], color=colour, alpha=0.35 if len(runs) > 1 else 1.0,
                    linewidth=0.9 if len(runs) > 1 else 2.2, label=name if len(runs) == 1 else None)  # fmt: skip
        if len(runs) > 1:
            steps = min(len(run) for run in runs)
            middle = np.median([run[:steps] for run in runs], axis=0)
            ax.plot(middle[:, 0] / 1e9, middle[:, 1], color=colour, linewidth=2.4, label=f"{name}, median of {len(runs)}")
    if spent is not None:
        ax.axvspan(0, spent / 1e9, color="#efe9f3", zorder=0, label="the teacher writes its answers")
    ax.set(xlabel="computation (GFLOP)", ylabel="right answers, held out (0 to 1)", ylim=(0, 1.03))
    ax.set_xlim(left=0)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


@styled
def sample_curve(counts: Sequence[int], runs: Sequence[Sequence[float]]) -> Figure:
    """Accuracy over the number of samples, logarithmic; thin the seeds, thick their mean."""
    fig, ax = plt.subplots(figsize=(6.4, 3.4))
    for run in runs:
        ax.plot(counts, run, color=BLUE, alpha=0.35, linewidth=0.9)
    ax.plot(counts, np.mean(runs, axis=0), color=BLUE, marker="o", linewidth=2.4, label=f"mean of {len(runs)} seeds")
    ax.set(xscale="log", xlabel="different samples of the teacher (number)", ylabel="right answers, held out (0 to 1)",
           ylim=(0, 1.03))  # fmt: skip
    ax.set_xticks(list(counts), [str(n) for n in counts])
    ax.minorticks_off()
    ax.legend(loc="lower right")
    return fig


def _dots(ax: Axes, row: int, values: Sequence[float], colour: str) -> None:
    ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.55, markersize=5)
    ax.plot([np.mean(values)], [row], "|", color="#222222", markersize=16, markeredgewidth=2)


@styled
def arms(found: Mapping[str, Mapping[str, Sequence[float]]], labels: Mapping[str, str]) -> Figure:
    """{way: {figure: a value a seed}} and {figure: its axis}: a row for each way, a dot a seed, a bar their mean."""
    fig, axes = plt.subplots(1, len(labels), figsize=(3.2 + 3.2 * len(labels), 0.4 * len(found) + 1.0), sharey=True)
    for ax, (key, label), colour in zip(np.atleast_1d(axes), labels.items(), COLOURS, strict=False):
        for row, values in enumerate(found.values()):
            _dots(ax, row, values[key], colour)
        ax.set_xlabel(label)
        ax.set_xlim(0, 1.04 if "(0 to 1)" in label else None)
    np.atleast_1d(axes)[0].set_yticks(range(len(found)), list(found))
    np.atleast_1d(axes)[0].invert_yaxis()
    return fig


@styled
def published(students: Mapping[str, tuple[float, float]], others: Mapping[str, float]) -> Figure:
    """{student: (parameters in 1e9, score)} as dots over size, {other: score} as level lines."""
    fig, ax = plt.subplots(figsize=(7.4, 3.8))
    for name, (size, score) in students.items():
        ax.plot([size], [score], "o", color=GREEN if "Llama" in name else BLUE, markersize=7)
        beside = "Llama" in name  # two students have nearly the same size
        ax.annotate(name, (size, score), (8, -3) if beside else (0, 7), textcoords="offset points", fontsize=8,
                    ha="left" if beside else "center")  # fmt: skip
    for (name, score), colour in zip(others.items(), (PURPLE, ORANGE, GREY, RED), strict=False):
        ax.axhline(score, color=colour, linestyle="--", linewidth=1.2)
        ax.annotate(name, (1.0, score), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                    va="center", fontsize=8, color=colour, annotation_clip=False)  # fmt: skip
    ax.set(xscale="log", xlabel="parameters of the student (billions)", ylabel="AIME 2024, pass@1 (%)", ylim=(0, 100),
           xlim=(1, 160))  # fmt: skip
    ax.set_xticks([1.5, 7, 14, 32, 70], ["1.5", "7", "14", "32", "70"])
    ax.minorticks_off()
    return fig
