"""The figures of notebook 13: R1's four stages, who writes in which language, and judges that are optimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

# name, what it is made of, x, y, colour
BOXES = (("base", "has read the world", 0.0, 0.0, GREY), ("R1-Zero", "RL, rules alone", 1.45, 1.0, RED),
         ("cold", "1 SFT, few\nreadable chains", 1.45, 0.0, BLUE),
         ("reasoner", "2 RL: accuracy, form,\nlanguage", 2.9, 0.0, BLUE),
         ("sft", "3 SFT of the base:\nfiltered answers + chat", 4.35, 0.0, GREEN),
         ("R1", "4 RL for everything,\njudges at the end", 5.8, 0.0, PURPLE))  # fmt: skip


@styled
def stage_flow() -> Figure:
    """The pipeline as boxes: checkpoints, and what makes each of them."""
    fig, ax = plt.subplots(figsize=(10.4, 2.9))
    for name, how, x, y, colour in BOXES:
        ax.add_patch(FancyBboxPatch((x - 0.5, y - 0.3), 1.0, 0.6, boxstyle="round,pad=0.04", edgecolor=colour,
                                    facecolor="white", linewidth=1.8))  # fmt: skip
        ax.text(x, y + 0.17, name, ha="center", va="center", fontweight="bold", color=colour, fontsize=11)
        ax.text(x, y - 0.12, how, ha="center", va="center", fontsize=8)
    arrow = {"arrowstyle": "-|>", "color": "#444444", "linewidth": 1.3}
    for x in (0.0, 1.45, 4.35):
        ax.annotate("", (x + 0.91, 0), (x + 0.55, 0), arrowprops=arrow)
    ax.annotate("", (0.91, 0.95), (0.3, 0.36), arrowprops=arrow)
    ax.annotate("", (3.81, 0), (3.45, 0), arrowprops=arrow | {"linestyle": "--"})
    ax.text(3.63, 0.42, "data only", ha="center", fontsize=8, color="#444444")
    ax.plot([0.0, 0.0, 4.35], [-0.36, -0.62, -0.62], color="#444444", linewidth=1.3)
    ax.annotate("", (4.35, -0.34), (4.35, -0.64), arrowprops=arrow)
    ax.text(2.2, -0.8, "weights: stage 3 starts from the base again", ha="center", fontsize=8, color="#444444")
    ax.set(xlim=(-0.65, 6.45), ylim=(-1.0, 1.45))
    ax.axis("off")
    return fig


@styled
def language_strips(groups: Mapping[str, Sequence[str]], chinese: str, width: int = 30) -> Figure:
    """Chains as rows of squares, a character each: digits blue, Chinese digits orange, signs grey."""
    fig, axes = plt.subplots(1, len(groups), figsize=(3.5 * len(groups), 2.7), sharey=True)
    colours = {"digits": BLUE, "chinese": ORANGE, "sign": "#c9c9c9"}
    for ax, (name, chains) in zip(np.atleast_1d(axes), groups.items(), strict=True):
        for row, chain in enumerate(chains):
            for column, letter in enumerate(chain[:width]):
                kind = "chinese" if letter in chinese else "digits" if letter.isdigit() else "sign"
                ax.add_patch(plt.Rectangle((column, row), 0.86, 0.72, color=colours[kind], linewidth=0))
        ax.set(xlim=(0, width), ylim=(len(chains), -0.3), xlabel="place in the chain (characters)", title=name)
        ax.grid(False)
        ax.set_yticks([])
    np.atleast_1d(axes)[0].set_ylabel("answer")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    fig.legend(handles, ["digits", "Chinese digits", "signs"], ncols=3, loc="outside lower center")
    return fig


PANELS = (("accuracy", "right answers (0 to 1)", GREEN), ("mixed", "chains in two languages (0 to 1)", ORANGE),
          ("helpful", "helpfulness by the rule (0 to 1)", BLUE),
          ("harmless", "harmlessness by the rule (0 to 1)", PURPLE))  # fmt: skip


@styled
def stage_dots(runs: Sequence[Mapping[str, Mapping[str, float]]], names: Mapping[str, str]) -> Figure:
    """Held-out figures of each stage, {key of a stage: its label}: a dot a seed, a bar their mean."""
    fig, axes = plt.subplots(1, 4, figsize=(12.4, 3.2), sharey=True)
    for ax, (key, label, colour) in zip(axes, PANELS, strict=True):
        for row, stage in enumerate(names):
            values = [run[stage][key] for run in runs]
            ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.5, markersize=5)
            ax.plot([np.mean(values)], [row], "|", color="#222222", markersize=17, markeredgewidth=2)
        ax.set(xlabel=label, xlim=(-0.04, 1.04))
    axes[0].set_yticks(range(len(names)), list(names.values()))
    axes[0].invert_yaxis()
    return fig


@styled
def judged_run(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """For each run the judge's reward and the rule's over steps of RL on the judge; where they part, it is cheated."""
    fig, axes = plt.subplots(1, len(runs), figsize=(4.3 * len(runs), 3.2), sharey=True)
    for ax, (title, lines) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        for (name, values), colour in zip(lines.items(), (RED, GREEN, GREY), strict=False):
            ax.plot(range(1, len(values) + 1), values, color=colour, label=name, linewidth=2)
        ax.set(xlabel="step of RL on the judge", title=title, ylim=(0, 1.03))
    np.atleast_1d(axes)[0].set_ylabel("mean over answers (0 to 1)")
    fig.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return fig


@styled
def paper_stages(table: Mapping[str, Sequence[float]], stages: Sequence[str]) -> Figure:
    """Benchmarks over the paper's checkpoints, a line each."""
    fig, ax = plt.subplots(figsize=(8.0, 3.6))
    for (name, values), colour in zip(table.items(), COLOURS, strict=False):
        ax.plot(range(len(values)), values, color=colour, marker="o", label=name)
    ax.set_xticks(range(len(stages)), list(stages))
    ax.set(ylabel="score (%)", ylim=(0, 100), xlabel="checkpoint")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig
