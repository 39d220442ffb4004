"""The figures of expert placement: loads of GPUs before and after EPLB, and the nodes that tokens reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from minids.plots.style import BLUE, COLOURS, GREY, ORANGE, RED, styled


@styled
def gpu_load_bars(before: Sequence[float], after: Sequence[float], bound: float, unit: str = "tokens") -> Figure:
    """Load of each GPU of one layer without and with replicas, side by side on one scale.

    Args:
        before, after: load of each GPU, (G,) in ``unit``; the two may have different numbers of GPUs.
        bound: what the busiest GPU has at least after rebalancing, max(mean, heaviest / replicas), in ``unit``.
    """
    before, after = (np.asarray(loads, dtype=float) for loads in (before, after))
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, loads, name, colour in ((axes[0], before, "one slot for each expert", ORANGE),
                                    (axes[1], after, "with replicas, placed by EPLB", BLUE)):
        ax.bar(range(len(loads)), loads, color=colour, width=0.8)
        ax.axhline(loads.mean(), color=GREY, linestyle=":", label="mean")
        ax.set(title=f"{name}: busiest / mean = {loads.max() / loads.mean():.2f}", xlabel="GPU")
        ax.margins(x=0.02)
    axes[1].axhline(bound, color=RED, linestyle="--", label="bound: max(mean, heaviest / replicas)")
    axes[0].set_ylabel(f"load ({unit})")
    axes[0].set_ylim(0, 1.12 * max(before.max(), after.max(), bound))
    handles, labels = axes[1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2)
    return fig


@styled
def nodes_reached_bars(shares: Mapping[str, Sequence[float]]) -> Figure:
    """How many nodes tokens reach: name -> shares (n_nodes + 1,), entry n for n nodes, each summing to 1. The mean is in
    the legend."""
    fig, ax = plt.subplots(figsize=(7.2, 3.8))
    width, longest = 0.8 / len(shares), max(len(s) for s in shares.values())
    for i, (name, share) in enumerate(shares.items()):
        share = np.asarray(share, dtype=float)
        nodes = np.arange(len(share))
        ax.bar(nodes[1:] + (i - (len(shares) - 1) / 2) * width, 100 * share[1:], width, color=COLOURS[i % len(COLOURS)],
               label=f"{name}: {(nodes * share).sum():.2f} on average")  # fmt: skip
    ax.set(xlabel="nodes a token reaches", ylabel="tokens (%)", xticks=range(1, longest))
    ax.grid(axis="x", visible=False)
    ax.legend()
    return fig
