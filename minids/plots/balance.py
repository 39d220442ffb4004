"""Figures of the router laboratory, drawn from what `python -m minids experiment balance` writes (figures/balance)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from minids.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, styled

MARKERS = "osD^vP*X<>hd"
GAMMA = 3e-3  # where one speed of the bias stands for it: the one that balances best in so few steps


class NothingToDraw(ValueError):
    """The data holds no run that the figure shows."""


def need(runs, what: str):
    """``runs``, or NothingToDraw if there are none."""
    if not runs:
        raise NothingToDraw(f"no runs of {what}")
    return runs


def select(result: dict, group: str = "sweep", name: str | None = None) -> list[dict]:
    """Runs of a group, and of one strategy if named."""
    return [run for run in result["runs"] if run["group"] == group and name in (None, run["name"])]


def by(runs: Iterable[dict], field: str) -> dict:
    """Runs collected by the value of a field, in order of appearance: the seeds of one setting lie together."""
    found: dict = {}
    for run in runs:
        found.setdefault(run[field], []).append(run)
    return found


def mean_and_error(runs: list[dict], field: str) -> tuple[float, float]:
    """Mean over seeds and the standard error of that mean (0 of a single seed)."""
    values = [run[field] for run in runs]
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _points(ax, groups: dict, x: str, y: str, **style) -> None:
    """A line with error bars; settings whose runs lack a figure (None) are left out."""
    whole = [runs for runs in groups.values() if all(run[x] is not None and run[y] is not None for run in runs)]
    if not whole:
        return
    points = [(*mean_and_error(runs, x), *mean_and_error(runs, y)) for runs in whole]
    xs, x_errors, ys, y_errors = map(list, zip(*points, strict=True))
    ax.errorbar(xs, ys, y_errors, x_errors, capsize=2, markersize=5, elinewidth=0.9, linewidth=1.0, **style)


FORCE = ("noisy top-k", "importance + load", "capacity", "capacity, by score", "buffer", "expert choice")


def against_none(runs: list[dict], result: dict, kind: str | None = None) -> list[dict]:
    """The runs with ``gain``: validation loss (of one kind of text, if named) minus that of the run without balancing of
    the same seed. Pairs share their first weights and the order of rows, so luck cancels out of the difference."""
    def loss(run):
        return run["valid"][kind] if kind else run["valid_mean"]

    free = {run["seed"]: loss(run) for run in need(select(result, name="none"), "no balancing")}
    return [run | {"gain": loss(run) - free[run["seed"]]} for run in runs if run["seed"] in free]


@styled
def pareto(result: dict, shorter: dict | None = None) -> Figure:
    """Validation loss, less that of the same seed without balancing, against MaxVio in training: a line a strategy, a point
    a coefficient, bars the standard error over seeds. Lower left is better. Left: biases and losses; right: noise and
    force, whose balance exists in training only. ``shorter``: a second experiment, of shorter runs, whose strategies are
    drawn beside, each against its own runs without balancing."""
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.8), sharey=True)
    groups = by(against_none(need(select(result), "the sweep"), result), "name")
    groups = {name: runs for name, runs in groups.items() if any(run["maxvio_train"] is not None for run in runs)}
    for name, runs in by(against_none(select(shorter), shorter), "name").items() if shorter else ():
        if name != "none":
            groups[f"{name} (shorter runs)"] = runs
    for ax, forced in zip(axes, (False, True), strict=True):
        names = [name for name in groups if (name.removesuffix(" (shorter runs)") in FORCE) is forced or name == "none"]
        for number, name in enumerate(names):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "label": name}
            style["linestyle"] = ("-", "--", ":")[number // len(COLOURS) % 3]
            _points(ax, by(groups[name], "coefficient"), "maxvio_train", "gain", **style)
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set_xscale("symlog", linthresh=0.1)
        ax.set_xlim(right=10)
        ax.set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
        ax.set_xlabel("MaxVio of a training batch (logarithmic above 0.1)")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8)
    axes[0].set_ylabel("validation loss, less that without balancing\n(nats a token)")
    return fig


@styled
def loss_by_kind(result: dict) -> Figure:
    """V3's Table 5 in miniature: at about equal balance, the loss of auxiliary losses and of the bias on each kind of text,
    less that of the same seed without balancing; bars the standard error over seeds."""
    chosen = need(_specialised(result), "the bias")
    kinds = list(chosen[0][1][0]["valid"])
    fig, ax = plt.subplots()
    for number, (name, runs) in enumerate(chosen):
        points = [mean_and_error(against_none(runs, result, kind), "gain") for kind in kinds]
        means, errors = zip(*points, strict=True)
        label = f"{name}, {runs[0]['coefficient']:g}: MaxVio {mean_and_error(runs, 'maxvio_train')[0]:.2f}"
        places = np.arange(len(kinds)) + 0.26 * (number - 1)
        ax.bar(places, means, 0.24, yerr=errors, capsize=3, color=COLOURS[number], label=label)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set_xlabel("kind of text")
    ax.set_ylabel("loss, less that without balancing\n(nats a token)")
    ax.legend()
    return fig


@styled
def gamma_sweep(result: dict) -> Figure:
    """V3's bias over its speed gamma: loss to the left, MaxVio to the right; the proportional variant beside it."""
    need(select(result, name="bias"), "the bias")
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.4))
    for name, colour in (("bias", BLUE), ("proportional bias", ORANGE)):
        groups = by(select(result, name=name), "coefficient")
        if not groups:
            continue
        for ax, field in zip(axes, ("valid_mean", "maxvio_train"), strict=True):
            means, errors = zip(*(mean_and_error(runs, field) for runs in groups.values()), strict=True)
            ax.errorbar(list(groups), means, errors, marker="o", capsize=3, color=colour, label=name)
    none = select(result, name="none")
    labels = (("valid_mean", "validation loss (nats a token)"), ("maxvio_train", "MaxVio of a batch"))
    for ax, (field, label) in zip(axes, labels, strict=True):
        if none:
            ax.axhline(mean_and_error(none, field)[0], color=GREY, linestyle=":", label="no balancing")
        ax.set_xscale("log")
        ax.set_xlabel("gamma (log scale)")
        ax.set_ylabel(label)
    axes[1].set_yscale("log")
    axes[1].minorticks_off()
    ticks = [0.25 * 2**k for k in range(6)]
    low, high = axes[1].get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes[1].set_yticks(shown, [f"{tick:g}" for tick in shown])
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def relative_load(run: dict) -> dict[str, np.ndarray]:
    """Of each kind of text, (L, E): an expert's load over the mean load, 1 when experts are used alike."""
    loads = {kind: np.array(load, float) for kind, load in run["load"].items()}
    return {kind: load / load.mean(-1, keepdims=True) for kind, load in loads.items()}


def specialisation_index(run: dict) -> float:
    """Mean over layers and experts of the standard deviation of its relative load over the kinds of text: 0 when every
    expert serves all kinds alike."""
    return float(np.stack(list(relative_load(run).values())).std(0).mean())


def _specialised(result: dict) -> list[tuple[str, list[dict]]]:
    """Auxiliary loss, batch-wise loss and bias, each at the coefficient whose MaxVio is nearest to the bias's at GAMMA."""
    bias = by(select(result, name="bias"), "coefficient")
    chosen = {}
    if bias:
        gamma = min(bias, key=lambda g: abs(np.log(g / GAMMA)))
        chosen["bias"], target = bias[gamma], mean_and_error(bias[gamma], "maxvio_train")[0]
        for name in ("sequence-wise", "batch-wise"):
            groups = by(select(result, name=name), "coefficient")
            if groups:
                chosen[name] = min(groups.values(), key=lambda runs: abs(mean_and_error(runs, "maxvio_train")[0] - target))
    return [(name, chosen[name]) for name in ("sequence-wise", "batch-wise", "bias") if name in chosen]


@styled
def specialisation(result: dict) -> Figure:
    """V3's figure 9 in miniature: relative load of every expert of the last layer on code, prose and tables, one seed;
    the number is the specialisation index, mean over seeds."""
    chosen = need(_specialised(result), "the bias")
    fig, axes = plt.subplots(len(chosen), 1, figsize=(7.6, 0.5 + 1.35 * len(chosen)), squeeze=False, sharex=True)
    image = None
    for ax, (name, runs) in zip(axes[:, 0], chosen, strict=True):
        loads = relative_load(runs[0])
        image = ax.imshow(np.stack([load[-1] for load in loads.values()]), aspect="auto", cmap="viridis", vmin=0, vmax=4)
        ax.set_yticks(range(len(loads)), list(loads))
        ax.grid(False)
        values = [specialisation_index(run) for run in runs]
        coefficient = runs[0]["coefficient"]
        ax.set_title(f"{name}, {coefficient:g}: index {statistics.mean(values):.2f}, "
                     f"MaxVio {mean_and_error(runs, 'maxvio_train')[0]:.2f}", fontsize=9)
    axes[-1, 0].set_xlabel("expert of the last layer")
    fig.colorbar(image, ax=axes[:, 0], label="load / mean load of the kind")
    return fig


@styled
def node_limit(result: dict) -> Figure:
    """What the limit of groups a token costs: validation loss, and groups that a token reaches, under the bias."""
    limited = need(select(result, "nodes"), "the limit of groups")
    runs = [*limited, *(run for run in select(result, name="bias") if run["coefficient"] == limited[0]["gamma"])]
    groups = by(sorted(runs, key=lambda run: run["topk_group"]), "topk_group")
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.2))
    for ax, field, label, colour in zip(axes, ("valid_mean", "nodes_per_token"),
                                        ("validation loss (nats a token)", "groups a token reaches"), (BLUE, GREEN),
                                        strict=True):  # fmt: skip
        means, errors = zip(*(mean_and_error(runs, field) for runs in groups.values()), strict=True)
        ax.errorbar(list(groups), means, errors, marker="o", capsize=3, color=colour)
        ax.set_xticks(list(groups))
        ax.set_xlabel("topk_group, of 4 groups")
        ax.set_ylabel(label)
    return fig


@styled
def balance_over_time(result: dict) -> Figure:
    """MaxVio of training batches over the steps, mean over seeds, for some strategies."""
    need(select(result, name="none") + select(result, name="bias"), "the bias, or without balancing")
    fig, ax = plt.subplots()
    wanted = (("none", None), ("bias", 1e-3), ("bias", 3e-3), ("batch-wise", 1e-2), ("sequence-wise", 1e-2),
              ("switch", 1e-2))  # fmt: skip
    for (name, coefficient), colour in zip(wanted, COLOURS, strict=True):
        runs = [run for run in select(result, name=name) if run["coefficient"] == coefficient]
        if runs:
            steps = [(i + 1) * runs[0]["every"] for i in range(len(runs[0]["violations"]))]
            label = name if coefficient is None else f"{name}, {coefficient:g}"
            ax.plot(steps, np.mean([run["violations"] for run in runs], 0), color=colour, label=label)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_xlabel("step")
    ax.set_ylabel("MaxVio of a training batch")
    ax.legend()
    return fig
