"""Training steps in simulated FP8 beside the same steps in FP32 and BF16, on the CPU.

What is compared. Copies of one 19.7M model with the same weights, on the same rows: plain FP32, BF16 autocast, and
converted by `to_fp8` with each recipe. A step is zeroed gradients, forward with the next-token loss, backward, and the
AdamW update, which is part of a training step and the same for all. The losses must agree to a percent before anything
is timed.

The target: a simulated step of V3's recipe takes at most 3 times as long as the plain FP32 step. Beside it stands the
same without recomputing norms and up-projections, which costs memory and saves time; `no_promotion` simulates the sums
of a 14-bit accumulator, too.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from minids.bench.common import Report, interleaved, median, ratio
from minids.bench.peer import benchmark_model
from minids.fp8 import Fp8Recipe, to_fp8
from minids.model.transformer import Transformer
from minids.train.optim import Optimizer

ROWS, LENGTH = 8, 256
TARGET = 3.0
# name -> (recipe or None, its changes, BF16 autocast)
CANDIDATES = {
    "FP32": (None, {}, False),
    "BF16 autocast": (None, {}, True),
    "v3": ("v3", {}, False),
    "v3, nothing recomputed": ("v3", {"recompute": False}, False),
    "tensor": ("tensor", {}, False),
    "mx": ("mx", {}, False),
    "no_promotion": ("no_promotion", {}, False),
}


def step(model: Transformer, optimizer: Optimizer, autocast: bool, rows: Tensor) -> float:
    """One step at rate 0, on ``rows`` (ROWS, LENGTH + 1): the weights stay equal among the candidates; the loss."""
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(rows[:, :-1], labels=rows[:, 1:]).loss
    loss.backward()
    optimizer.accumulate()
    optimizer.step(0.0)
    return loss.item()


def over(batches: list[Tensor], one: Callable[[Tensor], float]) -> Callable[[], float]:
    """A step that takes the next batch at every call."""
    following: Iterator[Tensor] = itertools.cycle(batches)
    return lambda: one(next(following))


def run(rounds: int) -> Report:
    """Every candidate in every round."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 4096, (ROWS, LENGTH + 1), generator=generator) for _ in range(rounds + 1)]
    base, steps = benchmark_model().train(), {}
    for name, (recipe, changes, autocast) in CANDIDATES.items():
        model = copy.deepcopy(base)
        if recipe is not None:
            to_fp8(model, Fp8Recipe.named(recipe, **changes))
        steps[name] = functools.partial(step, model, Optimizer(model), autocast)
    losses = {name: one(batches[0]) for name, one in steps.items()}
    apart = max(abs(loss / losses["FP32"] - 1) for loss in losses.values())
    if not apart < 0.01:
        raise RuntimeError(f"not the same step, nothing timed: losses {losses}")
    times = interleaved({name: over(batches, one) for name, one in steps.items()}, rounds, settle=1)
    report = Report(f"Training step in simulated FP8, forward, backward and update, {ROWS} x {LENGTH} tokens, one thread",
                    ["step", "ms", "tokens/s", "x FP32", "x BF16"], [])  # fmt: skip
    for name, seconds in times.items():
        middle = median(seconds)
        report.rows.append([name, middle * 1e3, ROWS * LENGTH / middle, ratio(times, name, "FP32"),
                            ratio(times, name, "BF16 autocast")])  # fmt: skip
    slower = ratio(times, "v3", "FP32")
    report.data = {"seconds": times, "losses": losses}
    report.notes.append(f"x: times as long, the median of the ratios within a round. v3: {slower:.2f} times FP32, target "
                        f"{TARGET:g}; losses agree to {100 * apart:.2f}%.")  # fmt: skip
    if slower > TARGET:
        report.missed.append(f"v3: {slower:.2f} > {TARGET:g} times FP32")
    return report
