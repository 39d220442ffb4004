"""The figures of notebook 11, second half: accept or reject a draft, what it gains, and which slots hold what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, RED, styled

INK = "#222222"
SLOT_LOOKS = {"p": ("past", "#cfe3f1", "", INK), "n": ("new", BLUE, "", "white"), "d": ("draft", ORANGE, "", INK),
              "r": ("rejected", "#f4c9b5", "///", INK), ".": ("empty", "white", "", INK)}  # fmt: skip


@styled
def rejection_rule(p: Sequence[float], q: Sequence[float]) -> Figure:
    """Left the draft's and the model's probabilities with what both share; right what is drawn after a rejection."""
    fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.3), width_ratios=(1.7, 1))
    token, shared = np.arange(len(p)), np.minimum(p, q)
    axes[0].bar(token - 0.2, q, width=0.38, color="#f4dba6", edgecolor=ORANGE, label="draft q")
    axes[0].bar(token + 0.2, p, width=0.38, color="#b9d9ec", edgecolor=BLUE, label="model p")
    for x in (token - 0.2, token + 0.2):
        axes[0].bar(x, shared, width=0.38, color="none", edgecolor=INK, hatch="///", linewidth=0)
    axes[0].bar(0, 0, color="white", edgecolor=INK, hatch="///", label=f"shared: {shared.sum():.3g} in all, accepted")
    axes[0].set(xlabel="token", ylabel="probability", xticks=token, ylim=(0, 1.3 * max(*p, *q)))
    axes[0].legend(loc="upper right", fontsize=8.5)
    rest = np.maximum(np.subtract(p, q), 0)
    axes[1].bar(token, rest / rest.sum(), width=0.6, color=GREEN)
    axes[1].set(xlabel="token", ylabel="probability after a rejection", xticks=token, ylim=(0, 1.1))
    for ax in axes:
        ax.grid(axis="x", visible=False)
    return fig


@styled
def tokens_per_step(rates: Sequence[float], curves: Mapping[int, Sequence[float]], band: tuple[float, float]) -> Figure:
    """Expected tokens a step over the acceptance rate, a curve for each number of drafts; ``band``: V3's acceptance."""
    fig, ax = plt.subplots(figsize=(6.8, 3.7))
    ax.axvspan(100 * band[0], 100 * band[1], color="#e8f3ee", zorder=0)
    ax.text(100 * band[0] - 0.8, max(curves) + 0.2, "V3's second token", ha="right", color=INK)
    for (drafts, values), colour in zip(curves.items(), COLOURS, strict=False):
        label = f"{drafts} drafts" if drafts > 1 else "1 draft"
        ax.plot(100 * np.asarray(rates), values, color=colour, label=label)
    ax.set(xlabel="acceptance of each draft, those before it accepted (%)", ylabel="expected tokens a step",
           xlim=(0, 100), ylim=(1, max(curves) + 1.05))  # fmt: skip
    ax.legend(loc="upper left")
    return fig


@styled
def speculation_gain(rows: Sequence[int], curves: Mapping[str, Sequence[float]], most: float) -> Figure:
    """Speed with one draft over that without, for growing batches; ``most``: what a free verification would give."""
    fig, ax = plt.subplots(figsize=(7.2, 3.8))
    for (name, values), colour in zip(curves.items(), (BLUE, GREEN, ORANGE), strict=False):
        ax.semilogx(rows, values, color=colour, label=name)
    ax.axhline(most, color=GREY, linewidth=1, linestyle=":")
    ax.text(rows[0], most + 0.02, f"if draft and verification were free: {most:.3f}", color=INK)
    ax.axhline(1, color=RED, linewidth=1, linestyle="--")
    ax.text(rows[0], 0.955, "no gain", color=INK, va="top")
    ticks = [n for n in rows if np.log2(n) % 2 == 0]
    ax.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
    ax.minorticks_off()
    ax.set(xlabel="rows in the batch (conversations)", ylabel="speed with / without draft (ratio)", ylim=(0.82, 2.02))
    ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.86))
    return fig


@styled
def draft_slots(steps: Mapping[str, Sequence[str]]) -> Figure:
    """What each slot of the cache holds, row by row, at each moment. ``steps``: title -> rows, strings of slots apart by
    spaces: p (past), n (new), d (draft) or r (rejected) and the token, or a dot (empty)."""
    fig, axes = plt.subplots(1, len(steps), figsize=(3.6 * len(steps), 2.1))
    for ax, (title, rows) in zip(np.atleast_1d(axes), steps.items(), strict=True):
        width = len(rows[0].split())
        for r, slots in enumerate(rows):
            for slot, text in enumerate(slots.split()):
                _, colour, hatch, ink = SLOT_LOOKS[text[0]]
                ax.add_patch(Rectangle((slot + 0.05, -r - 0.9), 0.9, 0.8, facecolor=colour, edgecolor=GREY, hatch=hatch))
                ax.text(slot + 0.5, -r - 0.5, text[1:], ha="center", va="center", color=ink, fontsize=9)
            ax.text(-0.15, -r - 0.5, f"row {r}", ha="right", va="center", color=INK)
        for slot in range(width):
            ax.text(slot + 0.5, 0.12, str(slot), ha="center", color=GREY, fontsize=8)
        ax.set(xlim=(-1.1, width + 0.1), ylim=(-len(rows) - 0.1, 0.6))
        ax.set_title(title, fontsize=9.5)
        ax.axis("off")
    fig.legend(handles=[Patch(facecolor=c, hatch=h, edgecolor=GREY, label=k) for k, c, h, _ in SLOT_LOOKS.values()],
               loc="outside lower center", ncols=len(SLOT_LOOKS))
    return fig


@styled
def drafted_text(text: str, origin: Sequence[int], columns: int = 64) -> Figure:
    """A text whose characters are coloured by who wrote them: 0 the model's own step, k its k-th accepted draft. Line ends
    are shown as a sign."""
    lines = -(-len(text) // columns)
    fig, ax = plt.subplots(figsize=(9.0, 0.34 * lines + 0.7))
    looks = ["#cfe3f1", "#f7d9a0", "#bfe3d4", "#e3cfee"]
    for i, (character, who) in enumerate(zip(text, origin, strict=True)):
        x, y = i % columns, -(i // columns)
        ax.add_patch(Rectangle((x, y), 1, 0.88, color=looks[who % len(looks)], linewidth=0))
        ax.text(x + 0.5, y + 0.43, "↵" if character == "\n" else character, ha="center", va="center", color=INK,
                family="monospace", fontsize=9)  # fmt: skip
    ax.set(xlim=(0, columns), ylim=(-lines + 0.95, 1))
    ax.axis("off")
    names = ["the model's own token", *(f"draft {k}, accepted" for k in range(1, max(origin) + 1))]
    fig.legend(handles=[Patch(color=c, label=n) for c, n in zip(looks, names, strict=False)], loc="outside lower center",
               ncols=len(names))  # fmt: skip
    return fig
