"""The figures of notebook 08: tokens on their way to experts and back, what crosses which wire, what hides behind what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

INK = "#222222"
MARKS = "os^Dvx"
# How a block of a time line is filled: one colour for what computes, one for what sends, paler for a second micro-batch.
FILLS = {"compute": "#9fc5e8", "send": "#f5c26b", "compute 2": "#3d85c6", "send 2": "#d98e04", "idle": "#f0f0f0"}


# ---- who sends what ----------------------------------------------------------------------------------------------------


def _token(ax: Axes, x: float, y: float, name: str, colour: str) -> None:
    ax.add_patch(Rectangle((x - 0.16, y - 0.2), 0.32, 0.4, facecolor=colour, edgecolor="white", zorder=3))
    ax.text(x, y, name, ha="center", va="center", color="white", fontsize=9, fontweight="bold", zorder=4)


def _lanes(ax: Axes, centre: float, width: float, labels: Sequence[str], above: str) -> None:
    for rank, label in enumerate(labels):
        ax.add_patch(FancyBboxPatch((centre - width / 2, rank - 0.3), width, 0.6, boxstyle="round,pad=0.05",
                                    facecolor="#f4f6f8", edgecolor=GREY, linewidth=0.8))  # fmt: skip
        ax.text(centre, rank - 0.43, label, ha="center", va="bottom", fontsize=7.5, color=INK, zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    ax.text(centre, -0.75, above, ha="center", va="bottom", fontsize=10, color=INK)


@styled
def round_trip(tokens: Sequence[str], visits: Mapping[str, Sequence[int]], experts_a_rank: int) -> Figure:
    """Dispatch, experts, combine: each token at home, at the ranks of its experts, at home again.

    Args:
        tokens: for each rank the names of its tokens, one letter each.
        visits: token -> the ranks it is sent to, ascending, each once.
        experts_a_rank: rank r has experts r * experts_a_rank and on.
    """
    fig, ax = plt.subplots(figsize=(9.2, 0.95 * len(tokens) + 0.9))
    columns, ranks = (0.0, 4.6, 9.2), range(len(tokens))
    _lanes(ax, columns[0], 1.5, [f"rank {r}" for r in ranks], "at home: attention, router")
    experts = [f"rank {r}: experts {r * experts_a_rank} to {(r + 1) * experts_a_rank - 1}" for r in ranks]
    _lanes(ax, columns[1], 2.6, experts, "at the experts")
    _lanes(ax, columns[2], 1.5, [f"rank {r}" for r in ranks], "home again: sums")
    arrived: list[list[str]] = [[t for row in tokens for t in row if rank in visits[t]] for rank in ranks]
    for rank, row in enumerate(tokens):
        for i, name in enumerate(row):
            colour, dx = COLOURS[rank], (i - (len(row) - 1) / 2) * 0.55
            for column in (columns[0], columns[2]):
                _token(ax, column + dx, rank, name, colour)
            for to in visits[name]:
                x = columns[1] + (arrived[to].index(name) - (len(arrived[to]) - 1) / 2) * 0.55
                _token(ax, x, to, name, colour)
                for home in (columns[0], columns[2]):
                    ax.plot((home + dx, x), (rank, to), color=colour, linewidth=0.9, alpha=0.75, zorder=2)
    for x, what in ((2.2, "dispatch"), (7.0, "combine")):
        ax.text(x, -0.75, what, ha="center", va="bottom", fontsize=10, style="italic", color=INK)
    ax.set(xlim=(-0.95, 10.15), ylim=(len(tokens) - 0.5, -0.95))
    ax.axis("off")
    return fig


@styled
def message_tables(sent: Sequence[Sequence[str]]) -> Figure:
    """What an all-to-all does: ``sent[s][d]`` are the tokens that rank s sends to rank d; beside it what each rank holds
    afterwards, the transpose."""
    fig, axes = plt.subplots(1, 2, figsize=(8.0, 0.5 * len(sent) + 1.3))
    received = list(zip(*sent, strict=True))
    for ax, table, title, column in ((axes[0], sent, "before: what each rank sends", "to"),
                                     (axes[1], received, "after: what each rank holds", "from")):  # fmt: skip
        for i, row in enumerate(table):
            for j, names in enumerate(row):
                colour = COLOURS[i if column == "to" else j]
                ax.add_patch(Rectangle((j + 0.03, i + 0.05), 0.94, 0.9, facecolor=colour, alpha=0.18 if names else 0.04))
                ax.text(j + 0.5, i + 0.5, " ".join(names) or "-", ha="center", va="center", color=colour if names else GREY,
                        fontweight="bold", fontsize=10)  # fmt: skip
        ranks = range(len(table))
        ax.set(xlim=(0, len(table)), ylim=(len(table), 0), title=title, xticks=[r + 0.5 for r in ranks],
               xticklabels=[f"{column} {r}" for r in ranks], yticks=[r + 0.5 for r in ranks],
               yticklabels=[f"rank {r}" for r in ranks])  # fmt: skip
        ax.xaxis.tick_top()
        ax.grid(False)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return fig


# ---- what crosses the wires --------------------------------------------------------------------------------------------


@styled
def nodes_over_groups(parts: Sequence[int], measured: Sequence[float], formula: Sequence[float], chosen: int,
                      limits: Sequence[int], limited: Sequence[float], blind: Sequence[float]) -> Figure:
    """Copies a token needs. Left: over the number of nodes that share the experts, no limit, measured beside the closed
    form. Right: V3's eight nodes and a limit of M of them; ``blind`` is the form for M nodes drawn without looking at the
    scores."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.3), sharey=True)
    left.axhline(chosen, color=GREY, linestyle=":", label="a copy for each expert")
    left.plot(parts, formula, color=BLUE, label="closed form")
    left.plot(parts, measured, "o", color=ORANGE, label="counted", markersize=5)
    left.set_xscale("log", base=2)
    left.set(xlabel="nodes (groups of experts)", ylabel="copies a token, nodes reached", xticks=list(parts),
             xticklabels=[str(p) for p in parts], ylim=(0, chosen + 0.5))  # fmt: skip
    right.axhline(chosen, color=GREY, linestyle=":")
    right.plot(limits, limits, color=GREEN, linestyle="--", label="the limit M")
    right.plot(limits, limited, "o", color=ORANGE, markersize=5, label="counted")
    right.plot(limits, blind, color=BLUE, label="closed form, M nodes drawn blindly")
    right.set(xlabel="limit M of 8 nodes", xticks=list(limits))
    left.legend(fontsize=8, loc="lower right")
    right.legend(fontsize=8, loc="lower right")
    return fig


@styled
def wire_bars(rows: Mapping[str, tuple[float, float]], unit: str) -> Figure:
    """A bar for each way to send: (out to the experts, back), stacked, with its total."""
    fig, ax = plt.subplots(figsize=(8.4, 0.42 * len(rows) + 1.2))
    for y, (out, back) in enumerate(rows.values()):
        ax.barh(y, out, color=BLUE, height=0.62, edgecolor="white", label="dispatch" if y == 0 else None)
        ax.barh(y, back, left=out, color=ORANGE, height=0.62, edgecolor="white", label="combine" if y == 0 else None)
        ax.text(out + back, y, f" {out + back:.0f}", va="center", fontsize=8.5)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=unit)
    ax.set_xlim(0, 1.12 * max(map(sum, rows.values())))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside lower center", ncols=2, fontsize=8)
    return fig


# ---- time lines --------------------------------------------------------------------------------------------------------


@styled
def wire_timelines(strips: Mapping[str, Sequence[tuple[str, str, str, float, float]]], unit: str) -> Figure:
    """Strips of lanes on one time axis. An entry is (lane, label, fill, start, end), ``fill`` a key of FILLS; the lanes of
    a strip keep the order in which they first appear."""
    lanes = {title: list(dict.fromkeys(entry[0] for entry in strip)) for title, strip in strips.items()}
    heights = [len(names) for names in lanes.values()]
    fig, axes = plt.subplots(len(strips), 1, figsize=(9.4, 0.36 * sum(heights) + 0.5 * len(strips) + 0.3), sharex=True,
                             height_ratios=heights, squeeze=False)  # fmt: skip
    last = max(entry[4] for strip in strips.values() for entry in strip)
    for ax, (title, strip) in zip(axes[:, 0], strips.items(), strict=True):
        for lane, label, fill, start, end in strip:
            y = lanes[title].index(lane)
            ax.add_patch(Rectangle((start, y + 0.07), end - start, 0.86, facecolor=FILLS[fill], edgecolor="white",
                                   linewidth=0.8))  # fmt: skip
            if (end - start) / last > 0.0075 * len(label):
                dark = fill in ("compute 2", "send 2")
                ax.text((start + end) / 2, y + 0.5, label, ha="center", va="center", fontsize=7,
                        color="white" if dark else INK)  # fmt: skip
        names = lanes[title]
        ax.set(xlim=(0, last), ylim=(len(names), 0), yticks=[y + 0.5 for y in range(len(names))], yticklabels=names)
        ax.set_title(title, fontsize=9, loc="left", pad=3)
        ax.grid(False)
        ax.tick_params(axis="y", length=0)
    axes[-1, 0].set_xlabel(unit)
    return fig


@styled
def bandwidth_of_sms(sms: Sequence[int], times: Mapping[str, Sequence[float]], used: int, unit: str) -> Figure:
    """Time of a layer over the number of SMs that send, a line a way to order the work."""
    fig, ax = plt.subplots(figsize=(6.2, 3.3))
    for colour, mark, (name, values) in zip((RED, BLUE, GREY), MARKS, times.items(), strict=False):
        ax.plot(sms, values, color=colour, marker=mark, markersize=3.5, label=name)
    ax.axvline(used, color=GREY, linewidth=0.9, linestyle=":")
    ax.set(xlabel="SMs that send and receive, of 132", ylabel=unit, ylim=(0, None))
    ax.legend(fontsize=8)
    return fig


# ---- where experts live ------------------------------------------------------------------------------------------------


@styled
def placement_table(imbalance: Sequence[Sequence[float]], placed: Sequence[str], read: Sequence[str]) -> Figure:
    """Busiest GPU over the mean: a row for each placement, a column for each text that is read with it."""
    values = np.asarray(imbalance, dtype=float)
    fig, ax = plt.subplots(figsize=(1.15 * len(read) + 2.6, 0.5 * len(placed) + 1.1))
    image = ax.imshow(values, cmap="Oranges", vmin=1, vmax=max(2.0, values.max()), aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=10, color=INK)
    ax.set(xticks=range(len(read)), xticklabels=read, yticks=range(len(placed)), yticklabels=placed,
           xlabel="text that is read", ylabel="placement")  # fmt: skip
    ax.grid(False)
    fig.colorbar(image, label="busiest GPU / mean")
    return fig


@styled
def sorted_loads(loads: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """The loads of all GPUs of a layer, the busiest first, a line a placement."""
    fig, ax = plt.subplots(figsize=(7.0, 3.2))
    for colour, style, (name, values) in zip((ORANGE, BLUE, GREEN, PURPLE), ("--", "-", "-.", ":"), loads.items(),
                                             strict=False):  # fmt: skip
        ordered = np.sort(np.asarray(values, dtype=float))[::-1]
        ax.step(range(1, len(ordered) + 1), ordered, where="mid", color=colour, linestyle=style, label=name)
    ax.set(xlabel="GPU, the busiest first", ylabel=unit, ylim=(0, None))
    ax.legend(fontsize=8)
    return fig


@styled
def memory_layouts(rows: Mapping[str, Mapping[str, float]], limit: float, unit: str = "GB a GPU") -> Figure:
    """What a GPU keeps of a model under each layout, stacked. Bars are cut at 3.4 times the ``limit`` (a GPU's memory); the
    total is written beside each."""
    fig, ax = plt.subplots(figsize=(8.6, 0.44 * len(rows) + 1.3))
    cut, colours = 3.4 * limit, (BLUE, GREEN, ORANGE, PURPLE)
    names = list(dict.fromkeys(name for pieces in rows.values() for name in pieces))
    for y, pieces in enumerate(rows.values()):
        start = 0.0
        for colour, name in zip(colours, names, strict=False):
            end = min(start + pieces.get(name, 0.0), cut)
            ax.barh(y, end - start, left=start, color=colour, height=0.62, edgecolor="white")
            start = end
        total = sum(pieces.values())
        ax.text(start, y, f" {total:,.0f}" + (" (cut)" if total > cut else ""), va="center", fontsize=8.5)
    line = ax.axvline(limit, color=RED, linestyle="--", linewidth=1.2, label=f"a GPU's {limit:.0f} GB")
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=unit, xlim=(0, 1.15 * cut))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    handles = [Patch(facecolor=c, label=n) for c, n in zip(colours, names, strict=False)]
    handles.append(line)
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return fig
