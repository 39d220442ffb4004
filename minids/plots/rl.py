"""The figures of notebook 12: the clip, what a KL loss does, the length bias, and R1-Zero over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, styled
from minids.plots.training import smooth

# ---- the objective -----------------------------------------------------------------------------------------------------


@styled
def clip_shapes(low: float = 0.2, high: float = 0.2) -> Figure:
    """What a token earns as its ratio moves: min(rho A, clip(rho) A) for A = 1 and A = -1; dashed without the minimum."""
    rho = np.linspace(0, 2.2, 221)
    fig, axes = plt.subplots(1, 2, figsize=(9.0, 3.4), sharex=True)
    for ax, advantage, name in zip(axes, (1, -1), ("a good answer, A = 1", "a bad answer, A = -1"), strict=True):
        cut = np.clip(rho, 1 - low, 1 + high) * advantage
        ax.axvspan(1 - low, 1 + high, color="#eef3f7", zorder=0)
        ax.plot(rho, cut, color=RED, linestyle="--", label="clip alone")
        ax.plot(rho, np.minimum(rho * advantage, cut), color=BLUE, linewidth=2.4, label="min of both, the objective")
        ax.plot([1], [advantage], "o", color=BLUE)
        ax.set(xlabel="ratio of probabilities, new / old (number)", title=name)
        ax.legend()
    axes[0].set_ylabel("the token's part of J (advantages)")
    return fig


@styled
def kl_pull(curves: Mapping[str, Sequence[float]]) -> Figure:
    """KL to the reference over steps of descent on each KL loss alone, logarithmic."""
    fig, ax = plt.subplots(figsize=(6.8, 3.4))
    for (name, values), colour in zip(curves.items(), (RED, BLUE, GREEN), strict=False):
        ax.plot(values, color=colour, label=name)
    ax.set(xlabel="steps", ylabel="KL(policy, reference) (nats)", yscale="log")
    ax.legend()
    return fig


@styled
def length_bias(lengths: Sequence[int], weights: Mapping[str, Sequence[float]],
                runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:  # fmt: skip
    """Left the weight of one token by its answer's length; middle and right the shares of three kinds of answer over
    steps, for two normalisations."""
    fig, axes = plt.subplots(1, 1 + len(runs), figsize=(4.2 + 3.0 * len(runs), 3.4))
    for (name, values), colour in zip(weights.items(), (RED, BLUE, GREEN), strict=False):
        axes[0].plot(lengths, values, color=colour, label=name)
    axes[0].set(xlabel="length of the answer (tokens)", ylabel="weight of one token (number)", yscale="log",
                title="what a token counts")  # fmt: skip
    axes[0].legend()
    for ax, (name, shares) in zip(axes[1:], runs.items(), strict=True):
        for (kind, values), colour in zip(shares.items(), (GREY, GREEN, ORANGE), strict=False):
            ax.plot(values, color=colour, label=kind)
        ax.set(xlabel="steps", ylim=(0, 1), title=name)
    axes[1].set_ylabel("share of answers (0 to 1)")
    axes[1].legend()
    return fig


# ---- R1-Zero -----------------------------------------------------------------------------------------------------------

PANELS = (("accuracy", "accuracy of the rollout (0 to 1)"), ("length", "length of an answer (tokens)"),
          ("entropy", "entropy (nats a token)"), ("no_variance", "groups without variance (0 to 1)"))  # fmt: skip


def _series(records: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


@styled
def live_run(records: Sequence[Mapping]) -> Figure:
    """One run: accuracy, length, entropy, zero-variance groups over steps; pale each step, dark smoothed."""
    fig, axes = plt.subplots(1, 4, figsize=(12.4, 3.1))
    for ax, (key, label), colour in zip(axes, PANELS, (GREEN, BLUE, PURPLE, GREY), strict=True):
        x, y = _series(records, key)
        ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.9)
        ax.plot(x, smooth(y, 0.7), color=colour, linewidth=2)
        ax.set(xlabel="step", ylabel=label)
        ax.set_ylim(bottom=0)
    return fig


@styled
def zero_seeds(runs: Sequence[Sequence[Mapping]]) -> Figure:
    """Several seeds: thin lines each (smoothed), thick their mean, and held-out accuracy as dots."""
    fig, axes = plt.subplots(2, 2, figsize=(9.6, 5.8), sharex=True)
    for ax, (key, label), colour in zip(axes.flat, PANELS, (GREEN, BLUE, PURPLE, GREY), strict=True):
        lines = [_series(records, key) for records in runs]
        for x, y in lines:
            ax.plot(x, smooth(y, 0.6), color=colour, alpha=0.35, linewidth=0.9)
        steps = min(len(y) for _, y in lines)
        mean = np.mean([y[:steps] for _, y in lines], axis=0)
        ax.plot(lines[0][0][:steps], smooth(mean, 0.6), color=colour, linewidth=2.4, label=f"mean of {len(runs)} seeds")
        ax.set(ylabel=label)
        ax.set_ylim(bottom=0)
    for records in runs:
        x, y = _series(records, "held_out_accuracy")
        axes[0, 0].plot(x, y, "o", color=ORANGE, markersize=3, label="held out" if records is runs[0] else None)
    for ax in axes[1]:
        ax.set_xlabel("step (128 answers each)")
    axes[0, 0].legend(loc="lower right")
    return fig


@styled
def pass_at_k(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> Figure:
    """pass@k of the base and after RL over k; thin each seed, thick their mean."""
    fig, ax = plt.subplots(figsize=(6.4, 3.6))
    for name, curves, colour in (("base", before, GREY), ("after RL", after, GREEN)):
        ks = sorted(map(int, curves[0]))
        table = np.array([[curve[str(k)] for k in ks] for curve in curves])
        for row in table:
            ax.plot(ks, row, color=colour, alpha=0.35, linewidth=0.9)
        ax.plot(ks, table.mean(0), color=colour, marker="o", linewidth=2.4, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.set(xlabel="answers allowed, k", ylabel="pass@k (share of questions)", ylim=(0, 1.03))
    ax.legend(loc="lower right")
    return fig


def _dots(ax: Axes, row: int, values: Sequence[float], colour: str) -> None:
    ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=5)
    ax.plot([np.mean(values)], [row], "|", color="#222222", markersize=16, markeredgewidth=2)


@styled
def switches(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """{variant: {"accuracy": a seed each, "length": ..., "half": steps to one half}}: a dot a seed, bars their mean."""
    fig, axes = plt.subplots(1, 3, figsize=(12.0, 0.42 * len(found) + 1.0), sharey=True)
    labels = {"accuracy": "held-out accuracy at the end (0 to 1)", "half": "step at which accuracy passed one half",
              "length": "length of an answer at the end (tokens)"}  # fmt: skip
    for ax, (key, label), colour in zip(axes, labels.items(), COLOURS[:3], strict=True):
        for row, values in enumerate(found.values()):
            if values[key]:
                _dots(ax, row, values[key], colour)
        ax.set_xlabel(label)
        ax.set_xlim(0, 1.08 if key == "accuracy" else None)
        ax.xaxis.get_major_locator().set_params(integer=key != "accuracy")
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].invert_yaxis()
    return fig
