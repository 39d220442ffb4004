"""Figures of a training run."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minids.plots.style import BLUE, GREEN, ORANGE, PURPLE, RED, styled


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average with its start corrected, as Adam corrects its moments."""
    out, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out


def _series(records: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    points = [(r["tokens"], r[key]) for r in records if r.get(key) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def _loss_axes(ax: Axes, records: Sequence[dict]) -> None:
    x, y = _series(records, "loss")
    ax.plot(x, y, color=BLUE, alpha=0.25, linewidth=0.8)
    ax.plot(x, smooth(y), color=BLUE, label="training")
    depths = max((len(r.get("mtp_loss") or ()) for r in records), default=0)
    for depth in range(depths):
        points = [(r["tokens"], r["mtp_loss"][depth]) for r in records
                  if r.get("mtp_loss") and r["mtp_loss"][depth] is not None]
        ax.plot([p[0] for p in points], smooth([p[1] for p in points]), color=GREEN, linestyle=("-", "--", ":")[depth % 3],
                label=f"MTP depth {depth + 1}")
    x, y = _series(records, "valid_loss")
    if x:
        ax.plot(x, y, color=ORANGE, marker="o", markersize=3.5, label="validation")
    ax.set(xlabel="tokens seen", ylabel="loss (nats a token)")
    ax.legend()


@styled
def loss_curve(records: Sequence[dict], title: str = "") -> Figure:
    """Loss, balance and learning rate of one run over tokens, from the records of its metrics.jsonl."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=(2, 1, 1))
    _loss_axes(left, records)
    left.set_title(title)
    for key, label, colour in (("maxvio_max", "worst layer", RED), ("maxvio_mean", "mean of layers", BLUE)):
        x, y = _series(records, key)
        if x:
            middle.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            middle.plot(x, smooth(y), color=colour, label=label)
            middle.legend()
    middle.set(xlabel="tokens seen", ylabel="MaxVio (max load / mean load - 1)", title="expert balance")
    middle.set_ylim(bottom=0)
    right.plot(*_series(records, "lr"), color=PURPLE)
    right.set(xlabel="tokens seen", ylabel="learning rate", title="recipe")
    right.set_ylim(bottom=0)
    return fig
