"""The figures of notebook 09: schedules, the eight steps, memory, the inside of a chunk, and where formulas end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minids.pipeline.chunk import COMPUTE, Entry
from minids.pipeline.draw import PALETTE, TITLES, paint, picture
from minids.pipeline.simulate import Timeline
from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

INK = "#222222"
STEP_COLOURS = ("#fff2c2", "#f5c26b", "#9fd3c7", "#4f9d8f", "#b9c9e8", "#7f9fd1", "#d3b3dd", "#9b6bb0")
MARKS = "os^Dvx*"


# ---- schedules -------------------------------------------------------------------------------------------------------


def schedule_rows(timeline: Timeline, width: float = 8.6, legend: bool = True, title: str | None = None) -> Figure:
    """One schedule, a row a rank, as wide as a notebook."""
    return picture(timeline, width=width, legend=legend, title=title, row_inch=0.27)


@styled
def eight_steps(timeline: Timeline, steps: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """The upper half of DualPipe's ranks, cells coloured by step. steps[rank]: how many actions each step has."""
    ranks = len(steps)
    fig, ax = plt.subplots(figsize=(9.6, 0.42 * ranks + 1.1))
    end = float(timeline.makespan)
    for rank, lengths in enumerate(steps):
        row = iter(timeline.cells[rank])
        for step, length in enumerate(lengths):
            for cell in [next(row) for _ in range(length)]:
                width = float(cell.end - cell.start)
                ax.add_patch(Rectangle((float(cell.start), rank + 0.06), width, 0.88, facecolor=STEP_COLOURS[step],
                                       edgecolor="white", linewidth=0.6))  # fmt: skip
                ax.text(float(cell.start) + width / 2, rank + 0.5, str(step + 1), ha="center", va="center", fontsize=6.5,
                        color="white" if step in (3, 7) else INK)
    ax.set(xlim=(0, end), ylim=(ranks, 0), xlabel="time", yticks=[r + 0.5 for r in range(ranks)],
           yticklabels=[f"rank {r}" for r in range(ranks)])
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    handles = [Patch(facecolor=colour, label=f"{k + 1}: {name}")
               for k, (colour, name) in enumerate(zip(STEP_COLOURS, names, strict=True))]  # fmt: skip
    fig.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=7.5, columnspacing=1.2, handlelength=1.2)
    return fig


@styled
def memory_over_time(timelines: Mapping[str, Timeline]) -> Figure:
    """Activations that rank 0 and a rank in the middle hold, in units of one micro-batch through 1/ranks of the model."""
    fig, axes = plt.subplots(1, 2, figsize=(9.0, 2.9), sharey=True)
    for ax, rank in zip(axes, (0, next(iter(timelines.values())).schedule.ranks // 2), strict=True):
        for colour, style, (name, timeline) in zip(COLOURS, ("-", "--", "-.", ":", "-"), timelines.items(), strict=False):
            share = timeline.schedule.ranks / timeline.schedule.stages
            moments, live = [0.0], [0.0]
            for cell in timeline.cells[rank]:
                for moment, change in ((cell.start, cell.action.kind in ("F", "FB")),
                                       (cell.end, -(cell.action.kind in ("B", "W", "FB")))):
                    moments.append(float(moment))
                    live.append(live[-1] + change * share)
            ax.step(moments, live, where="post", color=colour, linestyle=style, label=TITLES[name], linewidth=1.3)
        ax.set(xlabel="time (F = 1)", title=f"rank {rank}")
    axes[0].set_ylabel("activations held")
    axes[1].legend(fontsize=8, loc="upper right")
    return fig


@styled
def bubbles_by_ranks(ranks: Sequence[int], bubbles: Mapping[str, Sequence[float]]) -> Figure:
    """Bubble over the number of ranks, one line a schedule."""
    fig, ax = plt.subplots(figsize=(5.8, 3.1))
    for colour, mark, (name, values) in zip((*COLOURS, INK), MARKS, bubbles.items(), strict=False):
        ax.plot(ranks, values, color=colour, marker=mark, markersize=4, label=name, linewidth=1.2)
    ax.set(xlabel="pipeline ranks PP", ylabel="bubble (forwards of 1/PP of the model)")
    ax.legend(fontsize=8)
    return fig


# ---- inside a chunk --------------------------------------------------------------------------------------------------


def _colour(entry: Entry) -> str:
    kind = {"F": "F", "B": "B" if entry.queue != COMPUTE else "I", "W": "W"}[entry.part]
    return PALETTE[kind][0] if entry.queue == COMPUTE else {"F": "#e0a43c", "B": "#3f8fb8"}[entry.part]


def _queues(ax: Axes, entries: Sequence[Entry], scale: float, end: float) -> None:
    short = {"attention": "ATTN", "mlp": "MLP", "dispatch": "disp", "combine": "comb"}
    for entry in entries:
        y = 0 if entry.queue == COMPUTE else 1
        start, width = entry.start * scale, (entry.end - entry.start) * scale
        ax.add_patch(Rectangle((start, y + 0.06), width, 0.88, facecolor=_colour(entry), edgecolor="white", linewidth=0.8))
        if width > 0.022 * end:
            ax.text(start + width / 2, y + 0.5, f"{short[entry.name]}\n{entry.part}", ha="center", va="center",
                    fontsize=6.5, color=INK, linespacing=0.95)
    ax.set(xlim=(0, end), ylim=(2, 0), yticks=[0.5, 1.5], yticklabels=["computes", "network"])
    ax.grid(False)
    ax.tick_params(axis="y", length=0)


@styled
def chunk_overlap(rows: Mapping[str, Sequence[Entry]], scale: float = 1.0, unit: str = "time") -> Figure:
    """One strip of two queues for each of the rows, on one time axis."""
    fig, axes = plt.subplots(len(rows), 1, figsize=(9.6, 0.2 + 0.95 * len(rows)), sharex=True)
    end = scale * max(entry.end for entries in rows.values() for entry in entries)
    for ax, (title, entries) in zip(axes, rows.items(), strict=True):
        _queues(ax, entries, scale, end)
        ax.set_title(title, fontsize=8.5, loc="left", pad=2)
    axes[-1].set_xlabel(unit)
    return fig


@styled
def overlap_limits(ratios: Sequence[float], shares: Mapping[str, Sequence[float]], sms: Sequence[int],
                   milliseconds: Mapping[str, Sequence[float]]) -> Figure:
    """Left: share of the time without computation, over computation : communication. Right: a layer's pair over SMs."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.0))
    for colour, style, (name, values) in zip((RED, BLUE, GREEN), ("-", "--", "-."), shares.items(), strict=False):
        left.plot(ratios, [100 * v for v in values], color=colour, linestyle=style, label=name)
    left.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    left.set(xlabel="computation : communication", ylabel="% of the time not computing", ylim=(-2, None))
    left.legend(fontsize=8)
    for colour, mark, (name, values) in zip((RED, BLUE, GREEN), MARKS, milliseconds.items(), strict=False):
        right.plot(sms, values, color=colour, marker=mark, markersize=3.5, label=name)
    right.axvline(20, color=GREY, linewidth=0.8, linestyle=":")
    right.set(xlabel="SMs that communicate, of 132", ylabel="ms a layer, forward and backward", ylim=(0, None))
    right.legend(fontsize=8)
    return fig


@styled
def makespan_bars(parts: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """Stacked horizontal bars: what a step's time consists of, a bar a schedule."""
    fig, ax = plt.subplots(figsize=(8.6, 0.42 * len(parts) + 1.2))
    colours = (BLUE, ORANGE, GREY)
    for row, (_, pieces) in enumerate(parts.items()):
        start = 0.0
        for colour, value in zip(colours, pieces.values(), strict=True):
            ax.barh(row, value, left=start, color=colour, height=0.62, edgecolor="white")
            start += value
        ax.text(start, row, f" {start:.2f}", va="center", fontsize=8)
    ax.set(yticks=range(len(parts)), yticklabels=list(parts), xlabel=unit)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    names = next(iter(parts.values()))
    fig.legend(handles=[Patch(facecolor=c, label=n) for c, n in zip(colours, names, strict=True)],
               loc="outside lower center", ncols=3, fontsize=8)  # fmt: skip
    return fig


# ---- where formulas end ----------------------------------------------------------------------------------------------


@styled
def formula_limits(panels: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]]) -> Figure:
    """One panel for each thing that the formulas leave out: x values, and the bubble of each schedule over its formula."""
    fig, axes = plt.subplots(1, len(panels), figsize=(9.0, 2.9))
    for ax, (label, (values, lines)) in zip(axes, panels.items(), strict=True):
        for colour, mark, (name, ys) in zip((GREY, ORANGE, PURPLE, BLUE), MARKS, lines.items(), strict=False):
            ax.plot(values, ys, color=colour, marker=mark, markersize=3.5, label=name, linewidth=1.2)
        ax.set(xlabel=label)
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("bubble (F = 1)")
    axes[-1].legend(fontsize=7.5)
    return fig


@styled
def side_by_side(timelines: Sequence[Timeline], titles: Sequence[str], unit: str = "time (F = 1)") -> Figure:
    """Some schedules below each other on one time axis, without legends."""
    longest = max(float(timeline.makespan) for timeline in timelines)
    rows = [timeline.schedule.ranks for timeline in timelines]
    size = (9.0, 0.25 * sum(rows) + 0.42 * len(rows))
    fig, axes = plt.subplots(len(timelines), 1, figsize=size, sharex=True, height_ratios=rows)
    for ax, timeline, title in zip(axes, timelines, titles, strict=True):
        paint(ax, timeline, inch=8.2 / longest, size=7)
        ax.set_title(title, fontsize=9, loc="left", pad=2)
        ax.set_xlim(0, longest)
        ax.grid(False)
    axes[-1].set_xlabel(unit)
    return fig


# ---- measured --------------------------------------------------------------------------------------------------------


@styled
def steps_measured(steps: Mapping[str, tuple[float, float]]) -> Figure:
    """A row a schedule, fastest on top: milliseconds of a step, (measured, simulated)."""
    fig, ax = plt.subplots(figsize=(7.0, 0.3 * len(steps) + 1.0))
    rows = sorted(steps, key=lambda name: steps[name][0])
    for row, name in enumerate(rows):
        measured, simulated = steps[name]
        ax.plot((measured, simulated), (row, row), color=GREY, linewidth=1.2, zorder=1)
        ax.scatter(measured, row, color=BLUE, s=36, zorder=3, label="measured" if row == 0 else None)
        ax.scatter(simulated, row, facecolor="white", edgecolor=ORANGE, linewidth=1.6, s=36, zorder=2,
                   label="simulated" if row == 0 else None)  # fmt: skip
    ax.set(yticks=range(len(rows)), yticklabels=[TITLES[name] for name in rows], xlabel="ms a step", xlim=(0, None))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(fontsize=8, loc="lower left")
    return fig
