"""The figures of notebook 02: rotations, wavelengths, and what a model reads beyond its trained length.

`figures/context_extension.json`, and `loss_by_position` and `needle_maps` of it as `figures/context_extension_loss.png` and
`..._needle.png`, are written by `python -m minids.train.context_extension`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc

from minids.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, styled

LOOKS = {"plain RoPE": (RED, "-"), "interpolation": (ORANGE, "-"), "YaRN": (BLUE, "-"),
         "plain RoPE, tuned": (RED, "--"), "interpolation, tuned": (ORANGE, "--"), "YaRN, tuned": (BLUE, "--")}
INK = "#222222"


def _dial(ax: Axes, trained: float, needed: float, step: float) -> None:
    """One circle: angles met in training blue, those needed beyond orange. ``trained`` and ``needed`` in turns."""
    ax.set(xlim=(-1.7, 1.9), ylim=(-1.2, 1.2), aspect="equal")
    ax.axis("off")
    for turns, colour in ((1, "#dddddd"), (needed, ORANGE), (min(trained, needed), BLUE)):
        ax.add_patch(Arc((0, 0), 2, 2, theta1=0, theta2=360 * min(turns, 1), color=colour, linewidth=9))
    ax.plot([0.82, 1.18], [0, 0], color=INK, linewidth=1.2)
    ax.text(1.25, 0, "t = 0", va="center", fontsize=8, color=INK)
    text = f"{step:.2g}°\na token,\n{needed:,.{int(needed < 100)}f} turns"
    ax.text(0, 0, text, ha="center", va="center", fontsize=8.5, color=INK)


@styled
def rotation_dials(rows: Mapping[str, Sequence[float]], pairs: Sequence[int], length: int, total: int) -> Figure:
    """Which angles some pairs need in a text of ``total`` tokens, and whether they met them in training.

    Args:
        rows: one row of circles an entry, name -> frequencies (R/2,) in radians a token; the first are the trained.
        pairs: the pairs to show, one a column.
        length, total: trained length and the length to be read, in tokens.
    """
    fig, axes = plt.subplots(len(rows), len(pairs), figsize=(2.2 * len(pairs), 1.75 * len(rows) + 0.5), squeeze=False)
    before = next(iter(rows.values()))
    for row, (name, theta) in zip(axes, rows.items(), strict=True):
        for ax, pair in zip(row, pairs, strict=True):
            trained, needed = (n * float(f[pair]) / (2 * math.pi) for n, f in ((length, before), (total, theta)))
            _dial(ax, trained, needed, math.degrees(float(theta[pair])))
        row[0].text(-1.55, 0, name, rotation=90, ha="center", va="center", fontsize=11, color=INK)
    for ax, pair in zip(axes[0], pairs, strict=True):
        ax.set_title(f"pair {pair}")
    handles = [plt.Line2D([], [], color=c, linewidth=6) for c in (BLUE, ORANGE, "#dddddd")]
    labels = [f"met when training on {length:,} tokens", f"new in {total:,} tokens", "not reached"]
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    return fig


@styled
def distance_profile(curves: Mapping[str, Sequence[float]], wanted: int) -> Figure:
    """The positional score of a head that looks ``wanted`` tokens back, for keys at distances 0, 1, 2, ..."""
    fig, axes = plt.subplots(1, len(curves), figsize=(3.1 * len(curves), 2.9), sharey=True)
    for ax, (name, scores) in zip(axes, curves.items(), strict=True):
        best = int(np.argmax(scores))
        ax.bar(range(len(scores)), scores, color=[GREEN if i == wanted else RED if i == best else GREY
                                                  for i in range(len(scores))], width=0.75)
        ax.set(title=name, xlabel="distance of the key (tokens)")
        ax.annotate(f"highest at {best}", (best, scores[best]), (-6, 4), textcoords="offset points", fontsize=9, color=INK)
    low = min(min(s) for s in curves.values())
    axes[0].set(ylabel="score (sum of cosines)", ylim=(min(0, low - 0.5), 1.15 * max(max(s) for s in curves.values())))
    return fig


@styled
def wavelength_chart(plain: Sequence[float], stretched: Sequence[float], ramp: Sequence[float], length: int,
                     factor: float) -> Figure:  # fmt: skip
    """Tokens a turn of each pair: as trained, interpolated, and with YaRN.

    Args:
        plain, stretched: frequencies (R/2,) in radians a token, without and with YaRN.
        ramp: (R/2,), 0 where a pair is kept and 1 where it is divided by ``factor``.
        length: the trained length in tokens.
    """
    fig, ax = plt.subplots(figsize=(7.4, 4.4))
    pairs, ramp, waves = np.arange(len(plain)), np.asarray(ramp), 2 * np.pi / np.asarray(plain)
    kept, full = int((ramp == 0).sum()), int((ramp < 1).sum())
    for start, end, name, colour in ((0, kept, "kept", GREEN), (kept, full, "blended", PURPLE),
                                     (full, len(pairs), f"divided by {factor:g}", BLUE)):
        ax.axvspan(start - 0.5, end - 0.5, color=colour, alpha=0.08, linewidth=0)
        ax.text((start + end - 1) / 2, 2.6, f"{name}\npairs {start} to {end - 1}", ha="center", color=colour,
                fontsize=9)
    ax.plot(pairs, waves * factor, color=ORANGE, linestyle=":", label="interpolation: all pairs slowed")
    ax.plot(pairs, 2 * np.pi / np.asarray(stretched), color=BLUE, marker="o", markersize=4, label="YaRN")
    ax.plot(pairs, waves, color=RED, marker=".", markersize=4, label="RoPE as trained")
    for y, text in ((length, f"trained length, {length:,}"), (length * factor, f"{factor:g} x {length:,}"),
                    (length / 32, f"{length // 32}: 32 turns within {length:,}")):
        ax.axhline(y, color=INK, linewidth=0.9, linestyle="--")
        ax.text(-0.3, y * 1.12, text, fontsize=8, color=INK)
    ax.set(yscale="log", xlabel="pair j", ylabel="wavelength (tokens a turn)", xlim=(-0.5, len(pairs) - 0.5),
           ylim=(2, waves[-1] * factor * 12))
    ax.legend(loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=8.5)
    return fig


def _band(ax: Axes, runs: Sequence[Mapping], name: str, key: str, x: np.ndarray) -> None:
    values = np.array([run[name][key] for run in runs])
    colour, line = LOOKS[name]
    low, middle, high = np.percentile(values, (25, 50, 75), axis=0)
    ax.plot(x, middle, color=colour, linestyle=line, label=name)
    if len(runs) > 1:
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


@styled
def loss_by_position(runs: Sequence[Mapping], length: int, total: int) -> Figure:
    """Loss along rows of ``total`` tokens, for both kinds of scored token: median of the runs, bands the
    middle half of them.

    Args:
        runs: of each run, name -> ``rhythm`` and ``ledger``, losses in equal parts of the row. Names as in ``LOOKS``.
        length: the trained length, marked.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.1))
    names = [name for name in LOOKS if name in runs[0]]
    for ax, key, title in ((axes[0], "rhythm", "rhythm: exact short distances"),
                           (axes[1], "ledger", "ledger: the latest of far notes")):
        bins = len(runs[0][names[0]][key])
        x = (np.arange(bins) + 0.5) * total / bins
        for name in names:
            _band(ax, runs, name, key, x)
        ax.axvspan(0, length, color=GREY, alpha=0.15, linewidth=0)
        ax.set(title=title, xlabel="position in the row (tokens)", ylabel="loss (nats a token)", xlim=(0, total))
        ax.set_xticks([0, length, total // 4, total // 2, 3 * total // 4, total])
        ax.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(plt.Rectangle((0, 0), 1, 1, color=GREY, alpha=0.3, linewidth=0))
    fig.legend(handles, [*labels, f"trained length, {length}"], loc="outside lower center", ncols=4)
    return fig


@styled
def needle_maps(runs: Sequence[Mapping], lengths: Sequence[int], length: int) -> Figure:
    """Needle test: the share of right answers, %, by length of the text and depth of the needle; mean over runs.

    Args:
        runs: of each run, name -> ``needle``: for each of ``lengths`` the accuracies by depth, from 0 to 1.
        length: the trained length.
    """
    names = [name for name in LOOKS if name in runs[0]]
    fig, axes = plt.subplots(2, -(-len(names) // 2), figsize=(8.6, 6.4), sharex=True, sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        grid = 100 * np.mean([run[name]["needle"] for run in runs], axis=0).T  # (depths, lengths)
        image = ax.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8,
                    color="white" if value < 55 else "black")
        depths = np.linspace(0, 100, len(grid))
        ax.set_yticks(range(len(grid))[:: max(1, len(grid) // 4)], [f"{d:.0f}" for d in depths][:: max(1, len(grid) // 4)])
        ax.set_xticks(range(len(lengths)), [f"{n}" for n in lengths])
        ax.set_title(name)
        ax.grid(False)
    for ax in list(axes.flat)[len(names):]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel(f"text (tokens; trained at {length})")
    for ax in axes[:, 0]:
        ax.set_ylabel("depth of the needle (%)")
    fig.colorbar(image, ax=axes, label="right answers (%)", shrink=0.6)
    return fig
