"""The figures of notebook 01: what attention keeps in its cache, and what each way of computing MLA costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minids.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, styled

INK = "#222222"
HEADS = 8  # drawn in the schematic, whatever the model has


# ---- who shares what -------------------------------------------------------------------------------------------------


def _box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, kept: bool) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour if kept else "white", edgecolor=colour,
                           linewidth=1.2, linestyle="-" if kept else (0, (2, 1.5))))  # fmt: skip


def _heads(ax: Axes, shared_by: int, kept: bool) -> None:
    """Queries above, then the keys and values of groups of ``shared_by`` heads, each under its group's middle."""
    for head in range(HEADS):
        _box(ax, head + 0.25, 5.0, 0.5, 1.0, GREY, kept=False)
        group = head // shared_by
        middle = (group + 0.5) * shared_by
        ax.plot([head + 0.5, middle], [5.0, 4.2], color=GREY, linewidth=0.8)
    for group in range(HEADS // shared_by):
        middle = (group + 0.5) * shared_by
        _box(ax, middle - 0.38, 3.0, 0.34, 1.2, BLUE, kept)
        _box(ax, middle + 0.04, 3.0, 0.34, 1.2, ORANGE, kept)


def _latent(ax: Axes) -> None:
    """MLA: keys and values of every head exist, but only as expansions of the latent below."""
    _heads(ax, 1, kept=False)
    for head in range(HEADS):
        ax.plot([head + 0.5, 4], [3.0, 1.9], color=GREY, linewidth=0.8)
    _box(ax, 2.4, 1.0, 2.2, 0.9, GREEN, kept=True)
    _box(ax, 4.75, 1.0, 0.85, 0.9, PURPLE, kept=True)


@styled
def shared_heads(elements: Mapping[str, int], heads: int, groups: int) -> Figure:
    """Schematic of MHA, GQA, MQA and MLA; ``elements`` maps each of the four to its cached numbers a token and layer in
    a model of ``heads`` heads, ``groups`` groups in GQA. The drawing has fewer heads."""
    fig, axes = plt.subplots(1, 4, figsize=(10.4, 3.4))
    for ax, (name, shared_by) in zip(axes, (("MHA", 1), ("GQA", 4), ("MQA", HEADS), ("MLA", None)), strict=True):
        if shared_by is None:
            _latent(ax)
        else:
            _heads(ax, shared_by, kept=True)
        ax.set(xlim=(-0.2, HEADS + 0.2), ylim=(-0.9, 6.3))
        ax.axis("off")
        ax.set_title(f"GQA, {groups} groups" if name == "GQA" else name, weight="bold")
        ax.text(HEADS / 2, -0.6, f"{heads} heads: {elements[name]:,} numbers\na token and layer", ha="center", fontsize=9.5,
                color=INK)
    legend = [Patch(facecolor="white", edgecolor=GREY, linestyle="--", label="query of a head"),
              Patch(color=BLUE, label="key"), Patch(color=ORANGE, label="value"), Patch(color=GREEN, label="latent"),
              Patch(color=PURPLE, label="rotated key"),
              Patch(facecolor="white", edgecolor=INK, linestyle="--", label="dashed: not cached")]  # fmt: skip
    fig.legend(handles=legend, loc="outside lower center", ncols=6, handlelength=1.2, columnspacing=1.4)
    return fig


# ---- why rotation and absorption exclude each other ------------------------------------------------------------------


@styled
def merged_rank(without: Sequence[float], rotated: Sequence[float], rope_dim: int) -> Figure:
    """Singular values, largest first, of the stack of merged matrices of one head: one matrix a distance."""
    fig, ax = plt.subplots(figsize=(6.8, 3.4))
    floor = 1e-8
    for values, colour, marker, label in ((without, GREEN, "o", "without rotation"),
                                          (rotated, RED, "s", "with RoPE between")):  # fmt: skip
        shares = np.maximum(np.asarray(values) / values[0], floor)
        ax.semilogy(np.arange(1, len(shares) + 1), shares, color=colour, marker=marker, markersize=3.5, label=label)
    ax.axvline(rope_dim + 0.5, color=GREY, linewidth=1, linestyle=":")
    ax.text(rope_dim + 1, 0.12, f"{rope_dim} = R", color=INK)
    ax.set(xlabel="number of the independent matrix (count)", ylabel="size, relative to the largest (ratio)",
           ylim=(floor / 2, 6))
    ax.set_title("independent matrices needed to serve all distances")
    ax.legend(loc="center right")
    return fig


# ---- what each form costs --------------------------------------------------------------------------------------------


@styled
def cheaper_form(heads: int, nope: int, rope: int, value: int, latent: int, longest: int = 131072) -> Figure:
    """Where the absorbed form takes fewer FLOPs than the naive one: new tokens T in a pass over tokens S in the cache."""
    s = np.logspace(0, np.log2(longest), 200, base=2)
    t = np.logspace(0, np.log2(longest), 200, base=2)
    tokens, new = np.meshgrid(s, t)
    expand = latent * (nope + value)
    naive = heads * (tokens * expand + new * tokens * (nope + rope + value))
    absorbed = heads * (new * expand + new * tokens * (2 * latent + rope))
    ratio = np.where(new <= tokens, naive / absorbed, np.nan)
    fig, ax = plt.subplots(figsize=(7.2, 4.3))
    levels = [0.25, 0.3, 0.5, 1, 3, 10, 30, 200]
    colours = ["#e7a977", "#f3cda9", "#fbe9d7", "#d9ecf7", "#aed6ec", "#7fbcdd", "#64abd1"]
    shade = ax.contourf(s, t, ratio, levels=levels, colors=colours)
    bound = expand / (2 * latent - nope - value)
    ax.plot(s, s * bound / (s + bound), color=INK, linewidth=2)
    ax.axhline(bound, color=INK, linewidth=1, linestyle=":")
    ax.text(1.3, bound * 1.15, f"T = {bound:.0f}, the limit for long S", color=INK)
    ax.plot(s, s, color=GREY, linewidth=1.2)
    ax.text(70, 6000, "T > S does\nnot occur", color=GREY, ha="center")
    ax.text(9000, 6, "absorbed is cheaper", color=INK, ha="center", weight="bold")
    ax.text(26000, 1500, "naive is\ncheaper", color=INK, ha="center", weight="bold")
    ax.annotate("prefill: T = S", (16384, 16384), (1100, 50000), color=INK,
                arrowprops={"arrowstyle": "->", "color": INK})
    ax.text(600, 1.18, "decoding: T = 1", color=INK)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set(xlabel="S, tokens in the cache with the new ones (tokens)", ylabel="T, new tokens in the pass (tokens)",
           xlim=(1, longest), ylim=(1, longest))
    ticks = [4**k for k in range(9)]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
    bar = fig.colorbar(shade, ax=ax, ticks=levels, label="FLOPs of naive / FLOPs of absorbed (ratio)")
    bar.ax.set_yticklabels([f"{level:g}" for level in levels])
    return fig


@styled
def roofline(points: Mapping[str, float], peak: float, bandwidth: float, name: str) -> Figure:
    """Attention while decoding under the roof of one GPU. ``points``: label -> FLOP per byte of cache; ``peak`` in
    FLOP/s, ``bandwidth`` in bytes/s."""
    fig, ax = plt.subplots(figsize=(7.2, 4.0))
    x = np.logspace(-0.5, 3.3, 200)
    ax.loglog(x, np.minimum(peak, x * bandwidth) / 1e12, color=INK, linewidth=2)
    ridge = peak / bandwidth
    ax.axvline(ridge, color=GREY, linewidth=1, linestyle=":")
    ax.text(ridge * 1.08, 1.15, f"balance of the {name}:\n{ridge:.0f} FLOP a byte", color=INK)
    places = (((-9, 3), "right", "bottom"), ((10, -3), "left", "top"))  # in turn above and below the roof
    marks = zip(points.items(), (GREY, ORANGE, PURPLE, BLUE, GREEN, RED), strict=False)
    for i, ((label, intensity), colour) in enumerate(marks):
        y = min(peak, intensity * bandwidth) / 1e12
        ax.plot(intensity, y, "o", color=colour, markersize=9)
        offset, ha, va = ((0, 9), "left", "bottom") if intensity > ridge else places[i % 2]
        text = ax.annotate(f"{label}\n{intensity:.0f} FLOP a byte", (intensity, y), offset, color=INK, ha=ha, va=va,
                           textcoords="offset points")  # fmt: skip
        if ridge / 2 < intensity < ridge:  # its label crosses the line of the balance
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.set(xlabel="arithmetic intensity (FLOP per byte of cache read)", ylabel="attainable rate (TFLOP/s)",
           xlim=(0.18, 2500), ylim=(0.8, 6000))
    return fig


@styled
def decode_times(lengths: Sequence[int], seconds: Mapping[str, Sequence[float]],
                 flops: Mapping[str, Sequence[float]]) -> Figure:  # fmt: skip
    """One new token over a growing cache: measured time (left) and counted FLOPs (right) of each form."""
    fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.6))
    kinds = (("naive", RED, "s"), ("absorbed", BLUE, "o"))
    for ax, values, unit in ((axes[0], seconds, 1e3), (axes[1], flops, 1e-6)):
        for name, colour, marker in kinds:
            ax.loglog(lengths, np.asarray(values[name]) * unit, color=colour, marker=marker, markersize=5, label=name)
        ax.set_xlabel("S, tokens in the cache (tokens)")
        ax.set_xticks(lengths, [f"{n}" for n in lengths])
        ax.minorticks_off()
    axes[0].set(ylabel="time a token and layer (ms)", title="measured on this machine")
    axes[1].set(ylabel="FLOPs a token and layer (MFLOP)", title="counted")
    axes[0].legend(loc="upper left")
    return fig


# ---- how small the latent may be -------------------------------------------------------------------------------------


@styled
def recall_by_cache(rows: Sequence[tuple[str, int, float]], chance: float) -> Figure:
    """Accuracy of recall over cache size. ``rows``: (kind, cached numbers a token, accuracy from 0 to 1)."""
    fig, ax = plt.subplots(figsize=(7.0, 3.8))
    looks = {"MLA": (BLUE, "o", "-"), "MHA, narrow heads": (ORANGE, "s", "--"), "MHA": (RED, "D", "none")}
    for kind, (colour, marker, line) in looks.items():
        found = sorted((size, accuracy) for name, size, accuracy in rows if name == kind)
        ax.plot([size for size, _ in found], [100 * accuracy for _, accuracy in found], color=colour, marker=marker,
                linestyle=line, markersize=6, label=kind)  # fmt: skip
    sizes = sorted({size for _, size, _ in rows})
    ax.axhline(100 * chance, color=GREY, linewidth=1, linestyle=":")
    ax.text(sizes[-1], 100 * chance + 2, "guessing", color=GREY, ha="right")
    ax.set_xscale("log", base=2)
    ticks = [2**k for k in range(1, 8)]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set(xlabel="cache (numbers a token and layer)", ylabel="questions answered correctly (%)", ylim=(0, 106))
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.15))
    return fig
