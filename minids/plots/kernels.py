"""The figures of notebook 06: roofs, who computes what, two ladders, order and cache, a multiprocessor's hours, tails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled

INK, PALE = "#222222", "#dfe5ea"
STEPS = LinearSegmentedColormap.from_list("steps", ["#08306b", "#5b9bd0", "#f2e3b3", "#d9842b"])
WORK = {"copy": BLUE, "product": ORANGE, "scale and add": GREEN, "store": PURPLE}


# ---- limits ----------------------------------------------------------------------------------------------------------


@styled
def kernel_roofline(
    memory: float, peaks: Mapping[str, float], points: Sequence[tuple[str, float, str, float | None]]
) -> Figure:
    """Operations under the roofs of one GPU. memory: bytes/s; peaks: name -> FLOP/s; points: label, FLOP per byte, name
    of its peak, and the measured rate in FLOP/s or None. A ring lies on the roof, a dot where it was measured."""
    fig, ax = plt.subplots(figsize=(9.4, 4.8))
    x = np.logspace(-0.4, 4.2, 300)
    colours = dict(zip(peaks, (BLUE, RED), strict=False))
    for name, peak in peaks.items():
        ax.loglog(x, np.minimum(peak, x * memory) / 1e12, color=colours[name], linewidth=2)
        ax.text(1.5e4, peak / 1e12 * 1.07, f"{name}: {peak / 1e12:,.0f} TFLOP/s", color=colours[name], ha="right")
        ax.axvline(peak / memory, color=colours[name], linewidth=0.9, linestyle=":")
    ax.text(3.4, 2.5 * memory / 1e12, f"memory: {memory / 1e12:.2f} TB/s", color=INK)
    for number, (_, intensity, kind, measured) in enumerate(points, 1):
        roof = min(peaks[kind], intensity * memory)
        ax.plot(intensity, roof / 1e12, "o", color=colours[kind], markersize=8, markerfacecolor="white")
        if measured is not None:
            ax.plot([intensity] * 2, [roof / 1e12, measured / 1e12], color=colours[kind], linewidth=0.9)
            ax.plot(intensity, measured / 1e12, "o", color=colours[kind], markersize=5)
        crowded = any(1 < intensity / other < 1.5 for _, other, *_ in points)  # a neighbour's label is on the left
        ax.annotate(str(number), (intensity, roof / 1e12), (7, -12) if crowded else (-5, 7), textcoords="offset points",
                    color=INK, ha="left" if crowded else "right")  # fmt: skip
    text = "\n".join(f"{number}  {label}" for number, (label, *_) in enumerate(points, 1))
    ax.text(0.985, 0.03, text, transform=ax.transAxes, ha="right", va="bottom", color=INK, linespacing=1.35,
            multialignment="left", bbox={"facecolor": "white", "edgecolor": PALE})  # fmt: skip
    ax.set(xlabel="FLOP per byte of memory traffic", ylabel="rate (TFLOP/s)", xlim=(0.5, 1.6e4), ylim=(1, 3000))
    return fig


@styled
def decode_heads(rows: Sequence[Mapping[str, float]], memory: float, peak: float) -> Figure:
    """MLA decoding over the number of heads: the roof, the package's kernel and the plain one, as TFLOP/s and bytes/s."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.4))
    heads = np.array([row["heads"] for row in rows], float)
    x = np.geomspace(heads[0] / 1.3, heads[-1] * 1.3, 100)
    each = rows[0]["intensity"] / rows[0]["heads"]  # FLOP a byte and head
    left.loglog(x, np.minimum(peak, x * each * memory) / 1e12, color=INK, label="roof")
    right.semilogx(x, np.minimum(memory, peak / (x * each)) / 1e12, color=INK, label="roof")
    for key, colour, label in (("plain_rate", ORANGE, "plain Triton"), ("rate", BLUE, "three roles")):
        rates = np.array([row[key] for row in rows])
        left.loglog(heads, rates, "o-", color=colour, label=label)
        right.semilogx(heads, rates / each / heads, "o-", color=colour, label=label)
    left.set(ylabel="TFLOP/s")
    right.set(ylabel="TB/s of cache", ylim=(0, memory / 1e12 * 1.15))
    for ax in (left, right):
        ax.axvline(peak / memory / each, color=GREY, linestyle=":", linewidth=1)
        ax.set_xticks(heads, [f"{h:.0f}" for h in heads])
        ax.minorticks_off()
        ax.set_xlabel("heads that share the cache (number)")
        ax.legend(loc="upper left" if ax is left else "lower left")
    balance = peak / memory / each
    left.text(balance * 1.06, left.get_ylim()[0] * 1.15, f"{balance:.0f}\nheads", color=INK)
    ticks = [t for t in (20, 50, 100, 200, 500, 1000) if left.get_ylim()[0] < t < left.get_ylim()[1]]
    left.set_yticks(ticks, ticks)
    return fig


@styled
def ladder_bars(rates: Mapping[str, float], unit: str, peers: Sequence[str] = (), ours: str = "minids",
                notes: Mapping[str, str] | None = None, limit: tuple[str, float] | None = None) -> Figure:  # fmt: skip
    """A bar a rung, top to bottom. peers are grey, ``ours`` green; ``notes`` stand behind the figure; ``limit``: a line."""
    fig, ax = plt.subplots(figsize=(9.4, 0.33 * len(rates) + 0.9))
    for row, (name, rate) in enumerate(rates.items()):
        colour = GREY if name in peers else GREEN if name == ours else BLUE
        ax.barh(row, rate, color=colour, height=0.72)
        digits = f"{rate:.2f}" if rate < 10 else f"{rate:,.0f}"
        ax.text(rate, row, f" {digits}  {(notes or {}).get(name, '')}", va="center", color=INK, fontsize=8.5)
    if limit:
        ax.axvline(limit[1], color=RED, linewidth=1.2, linestyle="--")
        ax.text(limit[1], -0.65, f"  {limit[0]}", color=RED, fontsize=8.5)
    ax.set_yticks(range(len(rates)), list(rates))
    top = max([*rates.values(), limit[1] if limit else 0])
    ax.set(xlabel=unit, ylim=(len(rates) - 0.4, -1.0 if limit else -0.6), xlim=(0, top * 1.24))
    ax.grid(False, axis="y")
    return fig


# ---- who computes what -----------------------------------------------------------------------------------------------


@styled
def programs_on_tiles(ways: Mapping[str, np.ndarray]) -> Figure:
    """A corner of a matrix, a cell a tile, coloured and numbered by the program that has it. ways: title -> (rows, tiles)
    program numbers."""
    fig, axes = plt.subplots(1, len(ways), figsize=(9.4, 2.3))
    for ax, (title, owner) in zip(np.atleast_1d(axes), ways.items(), strict=True):
        ax.imshow(owner % 6, cmap=ListedColormap([*COLOURS[:5], "#b9b9b9"]), vmin=0, vmax=5, alpha=0.55, aspect="auto")
        for (row, column), program in np.ndenumerate(owner):
            ax.text(column, row, int(program), ha="center", va="center", fontsize=8, color=INK)
        ax.set_xticks(np.arange(owner.shape[1] + 1) - 0.5, labels=[])
        ax.set_yticks(np.arange(owner.shape[0] + 1) - 0.5, labels=[])
        ax.grid(True, color="white", linewidth=1.5)
        ax.tick_params(length=0)
        ax.set(xlabel="tiles of 128 channels", ylabel="tokens", title=title)
    return fig


@styled
def product_tiles(m: int, n: int, k: int, shapes: Sequence[tuple[int, int]]) -> Figure:
    """For tiles of some shapes: the rows of A and of B that one program reads for its tile of C, at a common scale."""
    fig, axes = plt.subplots(1, len(shapes), figsize=(9.4, 3.3))
    gap, deep = 0.12 * m, k * 0.5
    for ax, (bm, bn) in zip(np.atleast_1d(axes), shapes, strict=True):
        row, column = (m // bm // 2) * bm, (n // bn // 3) * bn
        for x, y, w, h in ((0, 0, deep, m), (deep + gap, 0, n, m), (deep + gap, -gap - deep, n, deep)):
            ax.add_patch(Rectangle((x, y), w, h, facecolor=PALE, edgecolor=GREY, linewidth=0.8))
        ax.add_patch(Rectangle((0, row), deep, bm, facecolor=BLUE))
        ax.add_patch(Rectangle((deep + gap + column, -gap - deep), bn, deep, facecolor=GREEN))
        ax.add_patch(Rectangle((deep + gap + column, row), bn, bm, facecolor=ORANGE))
        for x, y, name in ((deep / 2, m, "A"), (deep + gap + n / 2, m, "C")):
            ax.text(x, y + 0.04 * m, name, ha="center", va="top", color=INK)
        ax.text(deep + gap + n * 1.03, -gap - deep / 2, "B", va="center", color=INK)
        reads = m * n * k * (1 / bm + 1 / bn)
        ax.set(title=f"{bm} x {bn}: {reads:,.0f} reads", xlim=(-0.03 * n, (deep + gap + n) * 1.1), aspect="equal",
               ylim=(m * 1.2, -gap - deep - 0.03 * m))  # fmt: skip
        ax.axis("off")
    return fig


# ---- order and cache -------------------------------------------------------------------------------------------------


@styled
def visit_orders(orders: Mapping[str, np.ndarray], wave: int) -> Figure:
    """When each tile of C is computed, and which tiles run together first. orders: title -> (m_tiles, n_tiles) numbers."""
    fig, axes = plt.subplots(1, len(orders), figsize=(9.4, 3.0))
    for ax, (title, order) in zip(np.atleast_1d(axes), orders.items(), strict=True):
        image = ax.imshow(order, cmap=STEPS, aspect="auto", interpolation="nearest")
        ax.contour((order < wave).astype(float), levels=[0.5], colors="white", linewidths=2.2)
        ax.grid(False)
        ax.set(title=title, xlabel="column of tiles", ylabel="row of tiles")
    fig.colorbar(image, ax=axes, label="computed as number", shrink=0.9)
    return fig


@styled
def cache_traffic(capacities: Sequence[float], traffic: Mapping[str, Sequence[float]], least: float, real: float) -> Figure:
    """Bytes read from memory over the size of an L2 cache, a line an order. All in MB; ``least``: each factor once;
    ``real``: the size of the device's L2."""
    fig, ax = plt.subplots(figsize=(9.4, 3.2))
    for (name, values), colour, mark in zip(traffic.items(), COLOURS, "os^Dv", strict=False):
        ax.plot(capacities, values, marker=mark, markersize=4.5, color=colour, label=name)
    ax.axhline(least, color=INK, linewidth=1)
    ax.text(capacities[0], least * 0.96, "each factor once", va="top", color=INK)
    ax.axvline(real, color=GREY, linewidth=1, linestyle=":")
    ax.text(real * 1.03, ax.get_ylim()[1] * 0.9, "H200", color=INK)
    ax.set_xscale("log", base=2)
    ax.set_xticks(capacities, [f"{c:g}" for c in capacities])
    ax.set(xlabel="L2 cache (MB)", ylabel="read from memory (MB)", ylim=(0, None))
    ax.legend()
    return fig


# ---- inside a multiprocessor -----------------------------------------------------------------------------------------


@styled
def warp_timelines(ways: Mapping[str, Mapping[str, Sequence[tuple[float, float, str]]]], until: float) -> Figure:
    """Who works when. ways: title -> {lane: [(start, end, kind of WORK)]}, in cycles."""
    lanes = [len(rows) for rows in ways.values()]
    fig, axes = plt.subplots(len(ways), 1, figsize=(9.4, 0.3 * sum(lanes) + 0.55 * len(ways) + 0.8), sharex=True,
                             height_ratios=[count + 0.4 for count in lanes])  # fmt: skip
    for ax, (title, rows) in zip(np.atleast_1d(axes), ways.items(), strict=True):
        for place, spans in enumerate(rows.values()):
            for start, end, kind in spans:
                if start < until:
                    width = min(end, until) - start
                    ax.barh(place, width, left=start, height=0.76, color=WORK[kind], edgecolor="white", linewidth=0.7,
                            alpha=0.45 if kind == "copy" else 1)  # several copies are under way at once
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, until))
        ax.set_title(title, loc="left", fontsize=9.5)
        ax.grid(False, axis="y")
    ax.set_xlabel("time (cycles)")
    used = {kind for rows in ways.values() for spans in rows.values() for *_, kind in spans}
    handles = [Patch(color=colour, label=kind) for kind, colour in WORK.items() if kind in used]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


@styled
def sums_lost(
    lengths: Sequence[int], measured: Mapping[str, Sequence[float]], simulated: Mapping[str, Sequence[float]]
) -> Figure:
    """The share of a sum that is lost, over its length: measured (lines with marks) and simulated (dotted)."""
    fig, ax = plt.subplots(figsize=(9.4, 3.6))
    for (name, values), colour, mark in zip(measured.items(), (RED, ORANGE, BLUE), "os^", strict=False):
        ax.loglog(lengths, values, marker=mark, color=colour, label=f"measured: {name}")
    for (name, values), colour in zip(simulated.items(), (INK, GREY, PURPLE), strict=False):
        ax.loglog(lengths, values, linestyle=":", marker=".", color=colour, label=f"simulated: {name}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{k:,}" for k in lengths])
    ax.set(xlabel="K, products in a sum (number)", ylabel="mean loss (share of the sum)")
    ax.legend(fontsize=8.5, loc="upper left", ncols=2)
    ax.set_ylim(top=max(max(v) for v in [*measured.values(), *simulated.values()]) * 12)
    return fig


# ---- tails -----------------------------------------------------------------------------------------------------------


@styled
def tail_waves(tiles: Sequence[int], measured: Mapping[str, Sequence[float]], processors: int, scale: float) -> Figure:
    """The rate of a product over its number of tiles, and what full waves of ``processors`` tiles would make of it
    (``scale``: the rate without a tail)."""
    fig, ax = plt.subplots(figsize=(9.4, 3.4))
    x = np.arange(tiles[0], tiles[-1] + 1)
    saw = x / (processors * np.ceil(x / processors))
    ax.plot(x, scale * saw, color=GREY, linewidth=1.2, label="tiles / (waves x processors)")
    for (name, values), colour, mark in zip(measured.items(), (BLUE, ORANGE), "os", strict=False):
        ax.plot(tiles, values, marker=mark, markersize=4.5, color=colour, label=name)
    for edge in range(processors, tiles[-1] + 1, processors):
        ax.axvline(edge, color=INK, linewidth=0.7, linestyle=":")
    ax.set(xlabel=f"tiles of 128 x 128 (number); dotted: multiples of {processors}", ylabel="TFLOP/s", ylim=(0, None))
    ax.legend(loc="lower right")
    return fig


@styled
def expert_tails(tokens: Sequence[float], useful: Mapping[str, Sequence[float]]) -> Figure:
    """Which part of the computed rows belongs to a token, over the tokens that an expert has in the mean."""
    fig, ax = plt.subplots(figsize=(9.4, 3.2))
    for (name, values), colour, mark in zip(useful.items(), COLOURS, "os^D", strict=False):
        ax.plot(tokens, np.asarray(values) * 100, marker=mark, markersize=4.5, color=colour, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, [f"{t:,.0f}" for t in tokens])
    ax.set(xlabel="tokens of an expert, in the mean (number)", ylabel="rows that are tokens (%)", ylim=(0, 102))
    ax.legend(loc="lower right")
    return fig
