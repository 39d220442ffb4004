"""Figures of training in FP8: how far its loss is from BF16's."""

from __future__ import annotations

from itertools import accumulate

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minids.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, styled

# name -> (label, colour, line)
LINES = {
    "bf16": ("BF16", "black", "-"), "bf16_split": ("BF16, other roundings", GREY, "-"), "fp32": ("FP32", GREY, ":"),
    "v3": ("V3's FP8", BLUE, "-"), "v3_ue8m0": ("V3.1: power-of-two scales", GREEN, "-"),
    "tensor": ("a scale a tensor", ORANGE, "-"), "no_promotion": ("a scale a tensor, no promotion", RED, "-"),
    "mx": ("MX, blocks of 32", PURPLE, "-"),
}  # fmt: skip


def smoothed(losses: list[float], coefficient: float) -> list[float]:
    found = []
    for loss in losses:
        found.append(loss if not found else coefficient * found[-1] + (1 - coefficient) * loss)
    return found


@styled
def loss_differences(result: dict) -> Figure:
    """Smoothed losses of the variants, and their relative differences from BF16 beside V3's 0.25%, from fp8.json; dots are
    held-out losses. Grey: as far as the control alone has been from BF16 up to that step."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.2), width_ratios=(1, 1.4))
    for name, run in result["variants"].items():
        label, colour, line = LINES[name]
        steps = range(1, len(run["losses"]) + 1)
        left.plot(steps, smoothed(run["losses"], result["ema"]), line, color=colour, linewidth=1)
        if name in result["differences"]:
            found = result["differences"][name]
            text = f"{label}: at most {100 * found['largest']:.2f}%"
            start = found["start"]
            steps, curve = range(start + 1, len(found["curve"]) + 1), [100 * d for d in found["curve"][start:]]
            right.plot(steps, curve, line, color=colour, linewidth=2 if name == "v3" else 1.1, label=text)
            held_out = [(s, 100 * d) for s, d in found.get("valid", []) if s > start]
            right.plot([s for s, _ in held_out], [d for _, d in held_out], "o", color=colour, markersize=4)
            if name == "bf16_split":
                floor = list(accumulate(map(abs, curve), max))
                right.fill_between(steps, floor, [-d for d in floor], color=GREY, alpha=0.25, linewidth=0)
    left.set(xlabel="optimizer step", ylabel="loss (nats a token), EMA 0.9", title="the loss itself")
    right.axhspan(-100 * result["claim"], 100 * result["claim"], color=BLUE, alpha=0.08, linewidth=0)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="optimizer step", ylabel="difference of the loss from BF16's (%)",
              title=f"within V3's {100 * result['claim']:g}%?")  # fmt: skip
    if result["differences"]:
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig
