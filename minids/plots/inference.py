"""The figures of notebook 11, first half: what a pass computes and reads; how a server keeps slots and pages busy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

INK, PALE = "#222222", "#dfe5ea"


# ---- computing or reading ----------------------------------------------------------------------------------------------


@styled
def compute_or_read(passes: Mapping[str, tuple[float, float]]) -> Figure:
    """Time that a pass needs to compute and to read, in seconds, as two bars; the longer one, in full colour, decides.
    ``passes``: label -> (computing, reading)."""
    fig, ax = plt.subplots(figsize=(8.0, 0.75 * len(passes) + 1.0))
    for row, (computing, reading) in enumerate(passes.values()):
        pairs = ((computing, ORANGE, row - 0.17, "computing"), (reading, BLUE, row + 0.17, "reading"))
        for seconds, colour, y, name in pairs:
            decides = seconds == max(computing, reading)
            ax.barh(y, 1e3 * seconds, height=0.3, color=colour, alpha=1.0 if decides else 0.35)
            ax.text(1e3 * seconds * 1.06, y, f"{name} {1e3 * seconds:.3g} ms", va="center", color=INK, fontsize=8.5)
    ax.set_yticks(range(len(passes)), list(passes))
    ax.invert_yaxis()
    ax.set_xscale("log")
    longest = max(max(pair) for pair in passes.values())
    ax.set(xlabel="time of the pass if nothing else limited it (ms, log scale)", xlim=(None, 1e3 * longest * 8))
    ax.grid(axis="y", visible=False)
    return fig


# ---- naive and absorbed ------------------------------------------------------------------------------------------------


@styled
def cheaper_map(flop_limit: float, byte_share: float, heads: int, longest: int = 131072) -> Figure:
    """Which form of MLA is cheaper for T new of S cached tokens. FLOPs cross at 1 / (1/S + 1/``flop_limit``), numbers
    moved at S * ``byte_share``."""
    s = np.logspace(4, np.log2(longest), 300, base=2)
    by_flops, by_bytes = 1 / (1 / s + 1 / flop_limit), s * byte_share
    fig, ax = plt.subplots(figsize=(7.2, 4.3))
    low, high = np.minimum(by_flops, by_bytes), np.maximum(by_flops, by_bytes)
    ax.fill_between(s, 1, low, color="#d9ecf7")
    ax.fill_between(s, by_flops, by_bytes, where=by_bytes > by_flops, color="#efe6f5", interpolate=True)
    ax.fill_between(s, high, s, color="#fbe9d7")
    ax.plot(s, by_flops, color=ORANGE, linewidth=2.2, label="equal FLOPs")
    ax.plot(s, by_bytes, color=BLUE, linewidth=2.2, label="equal bytes")
    ax.plot(s, s, color=GREY, linewidth=1)
    ax.text(8192, 6, "absorbed: fewer FLOPs, fewer bytes", ha="center", color=INK)
    ax.text(30000, 850, "naive: fewer FLOPs\nabsorbed: fewer bytes", ha="center", color=INK)
    ax.text(11000, 5500, "naive: fewer of both", ha="center", va="center", color=INK, rotation=23)
    ax.text(80, 6000, "T > S does\nnot occur", color=GREY, ha="center")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ticks = [4**k for k in range(9)]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
    ax.set(xlabel="S, tokens in the cache with the new ones (tokens)", ylabel="T, new tokens in the pass (tokens)",
           xlim=(16, longest), ylim=(1, longest), title=f"one layer, one row, {heads} heads")  # fmt: skip
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0.72))
    return fig


@styled
def form_times(new: Sequence[int], measured: Sequence[float], flops: Sequence[float], cached: int) -> Figure:
    """Naive over absorbed for a growing number of new tokens: the measured times and the counted FLOPs."""
    fig, ax = plt.subplots(figsize=(6.8, 3.4))
    ax.loglog(new, flops, color=ORANGE, label="FLOPs, counted")
    ax.loglog(new, measured, color=PURPLE, marker="o", linestyle="none", label="time, measured here")
    ax.axhline(1, color=INK, linewidth=0.9, linestyle=":")
    ax.text(new[-1], 1.08, "equal", color=INK, ha="right")
    ax.set_xticks(new, [str(n) for n in new])
    ax.minorticks_off()
    ax.set(xlabel=f"T, new tokens in the pass over S = {cached} (tokens)", ylabel="naive / absorbed (ratio)")
    ax.legend()
    return fig


# ---- batches -----------------------------------------------------------------------------------------------------------


@styled
def experts_read(batch: Sequence[int], hit: Sequence[float], drawn: Sequence[float], intensity: Sequence[float],
                 ridge: float, experts: int) -> Figure:  # fmt: skip
    """Left: experts of a layer that a batch of tokens needs, formula and simulation. Right: FLOP per byte of expert
    weights, with the balance of the GPU."""
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.5))
    axes[0].semilogx(batch, hit, color=BLUE, label="formula")
    axes[0].semilogx(batch, drawn, "o", color=ORANGE, markersize=4.5, label="drawn at random")
    axes[0].axhline(experts, color=GREY, linewidth=1, linestyle=":")
    axes[0].text(batch[0], experts * 1.02, f"all {experts}", color=INK)
    axes[0].set(xlabel="tokens in the pass (tokens)", ylabel="experts whose weights are read (count)",
                ylim=(0, experts * 1.13))
    axes[0].legend(loc="lower right")
    axes[1].loglog(batch, intensity, color=BLUE)
    axes[1].axhline(ridge, color=RED, linewidth=1.2, linestyle="--")
    axes[1].text(batch[0], ridge * 1.15, f"balance in FP8: {ridge:.0f}", color=INK)
    axes[1].set(xlabel="tokens in the pass (tokens)", ylabel="FLOP per byte of expert weights")
    for ax in axes:
        ticks = [n for n in batch if np.log2(n) % 3 == 0]
        ax.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
        ax.minorticks_off()
    return fig


@styled
def slot_timelines(plans: Mapping[str, Sequence[tuple[int, int, int, int]]], slots: int, span: int) -> Figure:
    """Each slot of a batch over the steps: a bar is one request. ``plans``: title -> (slot, first step, end, request)."""
    fig, axes = plt.subplots(len(plans), 1, figsize=(9.0, 2.1 * len(plans)), sharex=True)
    for ax, (title, bars) in zip(np.atleast_1d(axes), plans.items(), strict=True):
        ax.add_patch(Rectangle((0, -0.5), span, slots, color="#f1f1f1"))
        for slot, start, end, request in bars:
            ax.barh(slot, end - start, left=start, height=0.8, color=COLOURS[request % 5], edgecolor="white")
        busy = sum(end - start for _, start, end, _ in bars) / (slots * max(end for _, _, end, _ in bars))
        last = max(end for _, _, end, _ in bars)
        ax.axvline(last, color=INK, linewidth=1, linestyle=":")
        ax.set_title(f"{title}: {last} steps, slots busy {busy:.0%} of them", loc="left")
        ax.set(ylabel="slot", ylim=(slots - 0.5, -0.5), xlim=(0, span), yticks=range(slots))
        ax.grid(visible=False)
    np.atleast_1d(axes)[-1].set_xlabel("decoding step")
    return fig


@styled
def page_table(pages: Sequence[int | None], fill: Sequence[int], size: int, tables: Mapping[int, Sequence[int]]) -> Figure:
    """Memory as pages: which request owns each (None: free) and how many of its slots are filled; below, each request's
    table of pages, in the order of its tokens."""
    fig, ax = plt.subplots(figsize=(9.0, 0.42 * len(tables) + 1.9))
    for page, (owner, filled) in enumerate(zip(pages, fill, strict=True)):
        ax.add_patch(Rectangle((page + 0.06, 0), 0.88, 1, facecolor="white", edgecolor=GREY))
        if owner is not None:
            ax.add_patch(Rectangle((page + 0.06, 0), 0.88 * filled / size, 1, color=COLOURS[owner % 5]))
        ax.text(page + 0.5, 1.15, str(page), ha="center", color=INK, fontsize=8.5)
    ax.text(-0.15, 0.5, "memory", ha="right", va="center", color=INK)
    for row, (request, table) in enumerate(tables.items()):
        y = -0.75 - 0.75 * row
        ax.text(-0.15, y, f"request {request}: pages", ha="right", va="center", color=INK)
        for place, page in enumerate(table):
            ax.add_patch(Rectangle((place + 0.06, y - 0.27), 0.88, 0.54, facecolor=COLOURS[request % 5], alpha=0.85))
            ax.text(place + 0.5, y, str(page), ha="center", va="center", color="white", weight="bold")
    ax.set(xlim=(-3.0, len(pages) + 0.1), ylim=(-0.75 * len(tables) - 0.5, 1.7))
    ax.axis("off")
    free = sum(owner is None for owner in pages)
    fig.legend(handles=[Patch(facecolor="white", edgecolor=GREY, label=f"free, or the empty rest of a last page"
                                                                        f" ({free} pages free)")],
               loc="outside lower center")  # fmt: skip
    return fig


# ---- time per token ----------------------------------------------------------------------------------------------------


@styled
def step_parts(rows: Sequence[int], parts: Mapping[str, Sequence[float]], bound: Sequence[str]) -> Figure:
    """Where the time of a decoding step goes, in milliseconds, over the rows in the batch; ``bound`` says for each number
    of rows what the slowest part waits for."""
    fig, ax = plt.subplots(figsize=(7.4, 3.7))
    place, bottom = np.arange(len(rows)), np.zeros(len(rows))
    for (name, seconds), colour in zip(parts.items(), (BLUE, GREEN, ORANGE, GREY), strict=False):
        share = np.asarray(seconds) / np.sum(list(parts.values()), axis=0) * 100
        ax.bar(place, share, bottom=bottom, color=colour, width=0.72, label=name)
        bottom += share
    for x, word in zip(place, bound, strict=True):
        ax.text(x, 101.5, word, ha="center", va="bottom", color=INK, fontsize=8.5)
    ax.set_xticks(place, [f"{n:,}" for n in rows])
    ax.set(xlabel="rows in the batch (conversations)", ylabel="share of the step's time (%)", ylim=(0, 112))
    ax.grid(axis="x", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig
