"""Training steps in FP8 beside the same steps in BF16: simulated on the CPU, on tensor cores where there is a GPU for it.

On the CPU. Copies of one 19.7M model with the same weights, on the same rows: plain FP32, BF16 autocast, and
converted by `to_fp8` with each recipe. A step is zeroed gradients, forward with the next-token loss, backward, and the
AdamW update, which is part of a training step and the same for all. The losses must agree to a percent before anything
is timed.

Target: a simulated step of V3's recipe takes at most 3 times as long as the plain FP32 step. Beside it stands the
same without recomputing norms and up-projections, which costs memory and saves time; `no_promotion` simulates the sums
of a 14-bit accumulator, too.

On a GPU. The trainer's own step of the `small` preset (1.5 billion parameters, 16,384 tokens of vocabulary): gradients of
32 rows of 1,024 random tokens in one micro-batch, clipping and AdamW with BF16 moments, at rate 0. Memory is the most that
the device held during a step, weights, gradients and moments of this candidate included. Target: no slower than BF16.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from minids.bench.common import Report, interleaved, median, ratio
from minids.bench.peer import benchmark_model
from minids.config import ModelConfig
from minids.fp8 import Fp8Recipe, to_fp8
from minids.model.transformer import Transformer
from minids.train.optim import OptimConfig, Optimizer
from minids.train.settings import TrainConfig
from minids.train.step import compute_gradients

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
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        cfg = ModelConfig.preset("small", vocab_size=16384, bos_token_id=0, eos_token_id=1)
        return on_device(rounds, cfg, "cuda", 32, 1024)
    return simulated(rounds)


def trainers_step(cfg: ModelConfig, device: str, rows: int, recipe: str | None, changes: dict) -> Callable[[Tensor], float]:
    """The trainer's step with weights of seed 0 as a function of (rows, T + 1) tokens; the loss."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(cfg)
    if recipe is not None:
        to_fp8(model, Fp8Recipe.named(recipe, **changes))
    config = TrainConfig(device=device, precision="bf16-autocast", micro_batch=rows, optim=OptimConfig(moments="bf16"))
    optimizer = Optimizer(model, config.optim)

    def one(tokens: Tensor) -> float:
        found = compute_gradients(model, optimizer, tokens, torch.zeros_like(tokens), 0.3, config)
        optimizer.step(0.0)
        return found.loss

    return one


def on_device(rounds: int, cfg: ModelConfig, device: str, rows: int, length: int) -> Report:
    """BF16 and FP8 on tensor cores, with and without V3's recomputation."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, cfg.vocab_size, (rows, length + 1), generator=generator) for _ in range(rounds + 1)]
    candidates = {"BF16": (None, {}), "v3": ("v3", {}), "v3, nothing recomputed": ("v3", {"recompute": False})}
    steps, losses, memory = {}, {}, {}
    for name, (recipe, changes) in candidates.items():
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        steps[name] = trainers_step(cfg, device, rows, recipe, changes)
        steps[name](batches[0])  # compiles, makes the moments
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses[name] = steps[name](batches[0])
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else math.nan
    apart = max(abs(loss / losses["BF16"] - 1) for loss in losses.values())
    if not apart < 0.01:
        raise RuntimeError(f"not the same step, nothing timed: losses {losses}")
    times = interleaved({name: over(batches, one) for name, one in steps.items()}, rounds, settle=1)
    size = f"{rows} x {length} tokens, {cfg.count()['main']:,} parameters"
    report = Report(f"The trainer's step in FP8 on tensor cores, {size}",
                    ["step", "ms", "tokens/s", "x as fast as BF16", "GiB"], [])  # fmt: skip
    for name, seconds in times.items():
        middle = median(seconds)
        report.rows.append([name, middle * 1e3, rows * length / middle, ratio(times, "BF16", name), memory[name]])
    report.data = {"seconds": times, "losses": losses, "gib": memory}
    faster = ratio(times, "BF16", "v3")
    report.notes.append(f"v3: {faster:.2f} times as fast as BF16; losses agree to {100 * apart:.2f}%.")
    if faster < 1:
        report.missed.append(f"v3: {faster:.2f} < 1 times as fast as BF16")
    return report


def simulated(rounds: int) -> Report:
    """FP32, BF16 and every recipe on the CPU."""
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
