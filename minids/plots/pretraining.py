"""The figures of notebook 07: the recipe, a packed row, a run and its seeds, a spike, and what 16 bits can hold."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minids.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, styled
from minids.plots.training import smooth

INK = "#222222"


# ---- the recipe ------------------------------------------------------------------------------------------------------


@styled
def recipe_phases(recipe) -> Figure:
    """Learning rate, batch and switches of a ``minids.train.recipe.Recipe`` over the tokens seen, in units of 10^12."""
    fig, (rate, batch, switch) = plt.subplots(1, 3, figsize=(11.4, 3.3), width_ratios=(1.3, 1, 1))
    total, trillion = recipe.total_tokens, 1e12
    t = np.unique(np.concatenate([np.linspace(total / 1e6, total, 2000), np.linspace(1, 2 * recipe.ramp_until, 1000)]))
    rate.plot(t / trillion, [1e4 * recipe.lr(x) for x in t], color=BLUE)
    rate.set(xlabel="tokens seen (trillions)", ylabel=r"learning rate ($10^{-4}$)", title="learning rate", ylim=(0, None))
    phases = ((0.5 * recipe.constant_until, 0.5, "constant"),
              (0.5 * recipe.constant_until + 0.5 * recipe.cosine_until, 0.8, "   cosine"))
    for x, y, name in phases:
        rate.text(x / trillion, 1e4 * recipe.peak_lr * y, name, ha="center", color=INK)
    for edge in (recipe.constant_until, recipe.cosine_until, recipe.floor_until):
        rate.axvline(edge / trillion, color=GREY, linewidth=0.9, linestyle=":")
    early = t[t <= 1.6 * recipe.ramp_until]
    batch.plot(early / trillion, [recipe.batch_size(x) for x in early], color=GREEN, label="batch")
    batch.set(xlabel="tokens seen (trillions)", ylabel="batch (sequences)", title="batch, beginning only", ylim=(0, None))
    warm = recipe.tokens_after(recipe.warmup_steps)
    batch.axvspan(0, warm / trillion, color=ORANGE, alpha=0.35, linewidth=0)
    batch.annotate("warm-up of the\nlearning rate", (warm / trillion, 0.62 * recipe.batch), (0.16, 0.30 * recipe.batch),
                   color=INK, arrowprops={"arrowstyle": "->", "color": INK})  # fmt: skip
    switch.step(t / trillion, [recipe.mtp_lambda(x) for x in t], color=PURPLE, label=r"MTP weight $\lambda$")
    switch.step(t / trillion, [100 * recipe.gamma(x) for x in t], color=RED, linestyle="--",
                label=r"bias step $\gamma$ (x 100)")  # fmt: skip
    switch.set(xlabel="tokens seen (trillions)", ylabel="value (no unit)", title="switches", ylim=(-0.02, 0.48))
    switch.legend(loc="upper left")
    return fig


# ---- a packed row ----------------------------------------------------------------------------------------------------


@styled
def packed_row(tokens: Sequence[str], documents: Sequence[int], mtp: Sequence[str | None]) -> Figure:
    """One row of T + 1 tokens as inputs, labels and labels of MTP depth 1, one colour a document.

    ``tokens`` and ``documents`` have T + 1 entries, ``mtp`` T - 1; None stands for a label that does not count.
    """
    t = len(tokens) - 1
    fig, ax = plt.subplots(figsize=(1.9 + 0.78 * (t + 1), 2.5))
    colours = dict(zip(dict.fromkeys(documents), (BLUE, ORANGE, GREEN, PURPLE), strict=False))

    def cell(x, y, text, document):
        face = "white" if text is None else colours[document]
        ax.add_patch(Rectangle((x, y), 0.94, 0.8, facecolor=face, alpha=1.0 if text is None else 0.3, edgecolor=GREY,
                               linestyle=":" if text is None else "-"))  # fmt: skip
        ax.text(x + 0.47, y + 0.4, "not asked" if text is None else text, ha="center", va="center", color=INK,
                fontsize=7 if text is None else 10)  # fmt: skip

    for i in range(t):
        cell(i, 2, tokens[i], documents[i])
        cell(i, 1, tokens[i + 1], documents[i + 1])
    for i, label in enumerate(mtp):
        cell(i, 0, label, documents[i + 2])
    for y, name in ((2, "input"), (1, "label"), (0, "MTP label, depth 1")):
        ax.text(-0.15, y + 0.4, name, ha="right", va="center", color=INK)
    for i in range(t):
        ax.text(i + 0.47, 3.0, str(i), ha="center", color=GREY, fontsize=8)
    ax.text(-0.15, 3.0, "position", ha="right", color=GREY, fontsize=8)
    ax.set(xlim=(-2.4, t), ylim=(-0.1, 3.35))
    ax.axis("off")
    return fig


# ---- one run ---------------------------------------------------------------------------------------------------------


def _series(records: Sequence[dict], key: str) -> tuple[np.ndarray, list]:
    found = [(r["tokens"] / 1e3, r[key]) for r in records if r.get(key) is not None]
    return np.array([x for x, _ in found]), [y for _, y in found]


@styled
def training_run(records: Sequence[dict], chance: float) -> Figure:
    """Losses, expert balance, bias and recipe of one run over tokens; ``chance`` is the loss of guessing, ln V."""
    fig, axes = plt.subplots(2, 2, figsize=(9.6, 5.6), sharex=True)
    (loss, balance), (recipe, bias) = axes
    x, y = _series(records, "loss")
    loss.plot(x, y, color=BLUE, alpha=0.25, linewidth=0.8)
    loss.plot(x, smooth(y), color=BLUE, label="next token")
    x, y = _series(records, "mtp_loss")
    loss.plot(x, smooth([depth[0] for depth in y]), color=GREEN, linestyle="--", label="MTP, the token after")
    x, y = _series(records, "valid_loss")
    loss.plot(x, y, "o", color=ORANGE, markersize=5, label="validation")
    loss.axhline(chance, color=GREY, linewidth=1, linestyle=":")
    loss.text(records[-1]["tokens"] / 1e3, chance + 0.04, "guessing, ln V", ha="right", va="bottom", color=GREY)
    loss.set(ylabel="loss (nats a token)", title="loss", ylim=(None, chance + 0.6))
    loss.legend()
    for key, label, colour in (("maxvio_max", "worst layer", RED), ("maxvio_mean", "mean of layers", BLUE)):
        x, y = _series(records, key)
        balance.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
        balance.plot(x, smooth(y), color=colour, label=label)
    balance.set(ylabel="MaxVio (max / mean load - 1)", title="expert balance, 0 is perfect", ylim=(0, None))
    balance.legend()
    for key, scale, label, colour, style in (("lr", 1e3, r"learning rate ($10^{-3}$)", PURPLE, "-"),
                                             ("lambda", 10, r"MTP weight $\lambda$ (tenths)", GREEN, "--"),
                                             ("grad_norm", 1, "gradient norm, before clipping", GREY, "-")):  # fmt: skip
        x, y = _series(records, key)
        recipe.plot(x, scale * np.array(y), color=colour, linestyle=style, label=label,
                    linewidth=0.9 if colour == GREY else 1.6)  # fmt: skip
    recipe.set(xlabel="tokens seen (thousands)", ylabel="value (units in the legend)", title="recipe and gradient",
               ylim=(0, 6.5))
    recipe.legend()
    x, y = _series(records, "bias_spread")
    bias.plot(x, y, color=RED)
    bias.set(xlabel="tokens seen (thousands)", ylabel="largest - smallest bias (score)",
             title="what the balancing bias does", ylim=(0, None))
    return fig


# ---- seeds -----------------------------------------------------------------------------------------------------------


def _dots(ax: Axes, values: Sequence[float], y: float, colour: str) -> None:
    """Values of one group on a line, spread a little so that they can be told apart; mean and two deviations."""
    offsets = 0.14 * np.array([(i * 0.618) % 1 - 0.5 for i in range(len(values))]) * 2
    ax.plot(values, y + offsets, "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
    mean, spread = statistics.mean(values), statistics.stdev(values)
    ax.errorbar(mean, y - 0.3, xerr=2 * spread, fmt="D", color=colour, capsize=4, markersize=5, linewidth=1.6)


@styled
def seed_spread(curves: Sequence[Sequence[float]], groups: Mapping[str, Sequence[float]], tokens_a_step: int) -> Figure:
    """Left: training losses of runs that differ in their seeds alone, smoothed. Right: validation losses at the end by
    kind of seed, ``groups``: label -> losses, with mean and two standard deviations below the dots. The last group is
    that of the curves, in their order."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.6, 3.7), width_ratios=(1.1, 1))
    ends = list(groups.values())[-1]
    for rank, i in enumerate(np.argsort(ends)):
        name = {0: "luckiest", len(ends) - 1: "unluckiest"}.get(rank)
        colour = {"luckiest": GREEN, "unluckiest": RED}.get(name, GREY)
        x = np.arange(1, len(curves[i]) + 1)
        left.plot(x, smooth(curves[i], 0.93), color=colour, alpha=1 if name else 0.4, linewidth=1.8 if name else 0.8,
                  label=name, zorder=3 if name else 2)  # fmt: skip
    left.set(xlabel=f"training (optimizer steps, the last ones of {tokens_a_step} tokens)",
             ylabel="training loss (nats a token)", xlim=(50, None), ylim=(3.95, 5.65),
             title=f"{len(curves)} runs, nothing differs but the seeds")  # fmt: skip
    left.legend()
    for row, ((_, values), colour) in enumerate(zip(groups.items(), (BLUE, ORANGE, PURPLE), strict=False)):
        _dots(right, values, -row, colour)
    right.set_yticks([-row - 0.1 for row in range(len(groups))], list(groups))
    right.set(xlabel="validation loss at the end (nats a token)", title="which seed does it?",
              ylim=(-len(groups) + 0.35, 0.4))  # fmt: skip
    right.grid(axis="y", visible=False)
    return fig


@styled
def seed_effects(effects: Mapping[str, tuple[float, float]], spread: float, count: int) -> Figure:
    """Differences to the baseline: label -> (mean, half width of its 95% interval), nats a token; the band is what two
    single runs with different seeds differ by in two of three cases, sqrt(2) * ``spread``."""
    fig, ax = plt.subplots(figsize=(8.2, 3.5))
    band = spread * 2**0.5
    ax.axvspan(-band, band, color=GREY, alpha=0.18, linewidth=0)
    ax.text(-0.96 * band, 0.72, "grey: two single runs, nothing differs but the seeds, two cases of three", color=INK,
            fontsize=8.5)  # fmt: skip
    ax.axvline(0, color=GREY, linewidth=1)
    for row, (mean, half) in enumerate(effects.values()):
        clear = abs(mean) > half
        ax.errorbar(mean, -row, xerr=half, fmt="o", capsize=4, markersize=6, color=RED if clear else BLUE)
        ax.text(mean, -row + 0.2, f"{mean:+.3f}", ha="center", color=INK, fontsize=8.5)
    ax.set_yticks([-row for row in range(len(effects))], list(effects))
    ax.set(xlabel="validation loss, change minus baseline (nats a token); negative is better",
           ylim=(-len(effects) + 0.4, 1.15), title=f"{count} pairs of runs each: mean and 95% interval")  # fmt: skip
    ax.grid(axis="y", visible=False)
    return fig


# ---- spikes ----------------------------------------------------------------------------------------------------------


@styled
def spike_watch(calm: Sequence[dict], shaken: Sequence[dict], found: Sequence[int], events: Mapping[str, int]) -> Figure:
    """Loss and gradient norm of two runs with the same seeds, one of them disturbed. ``found``: indices of the records
    called spikes; ``events``: label -> index of the record where it was done."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8.8, 5.0), sharex=True, height_ratios=(1.5, 1))
    for records, colour, label in ((calm, GREY, "undisturbed twin"), (shaken, BLUE, "disturbed")):
        x = [r["step"] for r in records]
        top.plot(x, [r["loss"] for r in records], color=colour, label=label, linewidth=1.3)
        bottom.plot(x, [r["grad_norm"] if np.isfinite(r["grad_norm"]) else np.nan for r in records], color=colour,
                    linewidth=1.3)  # fmt: skip
    top.plot([shaken[i]["step"] for i in found], [shaken[i]["loss"] for i in found], "o", color=RED, markersize=5.5,
             label="called a spike", zorder=4)  # fmt: skip
    for label, i in events.items():
        step = shaken[i]["step"]
        for ax in (top, bottom):
            ax.axvline(step, color=ORANGE, linewidth=1.2, linestyle="--", zorder=1)
        top.text(step - 0.8, 0.97, label, rotation=90, ha="right", va="top", color=INK, fontsize=8.5,
                 transform=top.get_xaxis_transform())  # fmt: skip
    bottom.axhline(1, color=GREEN, linewidth=1, linestyle=":")
    bottom.text(calm[0]["step"], 1.08, "clipped above 1", color=GREEN, fontsize=8.5)
    top.set(ylabel="training loss (nats a token)")
    bottom.set(xlabel="training (optimizer steps)", ylabel="gradient norm (nats)", yscale="log")
    bottom.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    bottom.minorticks_off()
    top.legend(loc="upper left", bbox_to_anchor=(0.13, 1.0))
    return fig


# ---- number formats --------------------------------------------------------------------------------------------------


@styled
def gradient_ranges(exponents: Sequence[float], spans: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Sizes of a model's gradients as powers of two, over what each format can hold. ``spans``: label -> (smallest
    number above zero, smallest with all its digits, largest number), as exponents of two."""
    fig, (ax, below) = plt.subplots(2, 1, figsize=(8.6, 4.0), sharex=True, height_ratios=(1.6, 1))
    counts, edges = np.histogram(exponents, bins=np.arange(-70, 21))
    ax.bar(edges[:-1], 100 * counts / len(exponents), width=1, align="edge", color=BLUE)
    ax.set(ylabel="gradients (%)", title="sizes of the gradients of the model trained above")
    for row, ((label, (low, normal, high)), colour) in enumerate(zip(spans.items(), (RED, GREEN), strict=True)):
        below.barh(-row, high - normal, left=normal, height=0.5, color=colour, alpha=0.75)
        below.barh(-row, normal - low, left=low, height=0.5, color=colour, alpha=0.3)
        below.text(1, -row, label, va="center", color="white", weight="bold")
    ax.axvline(spans["FP16"][0], color=RED, linewidth=1.2, linestyle="--")
    ax.text(spans["FP16"][0] - 0.7, 0.93, "FP16: 0 from here down", ha="right", va="top", color=RED,
            transform=ax.get_xaxis_transform())  # fmt: skip
    below.set(xlabel="size (power of two)", ylim=(-len(spans) + 0.4, 0.55), xlim=(-45, 20))
    below.set_yticks([])
    below.grid(axis="y", visible=False)
    return fig
