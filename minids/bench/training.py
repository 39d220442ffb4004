"""The training step beside transformers': forward and backward of the 19.7M model on 8 rows of 256 tokens.

What is compared. Both sides hold the same weights and get the same rows; their losses and the gradients of embedding and
head must agree before anything is timed. A step is zeroed gradients, forward with the next-token loss, backward; no
optimizer, which would be the same on both sides. Ours also counts the load of every expert. Every round brings fresh
rows, as training does: the experts' loads change, and with them the sizes of their products (see `gemm_multiple`).

The limit. The FLOPs of a step are counted from the shapes (6 a multiplied parameter and token, and attention, whose
causal half is computed in full here), and divided by the matmul rate of the same run and dtype.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minids.bench.common import Report, interleaved, median, ratio
from minids.bench.peer import benchmark_model, transformers_twin
from minids.config import ModelConfig

ROWS, LENGTH = 8, 256
TARGETS = {torch.float32: 1.2, torch.bfloat16: 2.0}


def step_flops(cfg: ModelConfig) -> int:
    """Floating-point operations of one step over ROWS x LENGTH tokens; attention over the whole square, as executed."""
    pairs = 2 * cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim) * LENGTH
    per_token = 6 * cfg.count()["activated_without_embedding"] + 3 * cfg.num_hidden_layers * pairs
    return per_token * ROWS * LENGTH


def ours(model: nn.Module, rows: Tensor) -> float:
    """One step on ``rows`` (ROWS, LENGTH + 1); the loss."""
    model.zero_grad(set_to_none=True)
    out = model(rows[:, :-1], labels=rows[:, 1:])
    out.loss.backward()
    out.loads()
    return out.loss.item()


def theirs(twin: nn.Module, rows: Tensor) -> float:
    """The same with transformers; its own ``labels`` would lose the last one, so the loss is written out."""
    twin.zero_grad(set_to_none=True)
    out = twin(input_ids=rows[:, :-1], use_cache=False)
    loss = nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    loss.backward()
    return loss.item()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: module.get_parameter(name).grad.double() for name in ("lm_head.weight", "model.embed_tokens.weight")}


def check_equal(model: nn.Module, twin: nn.Module, rows: Tensor) -> dict[str, float]:
    """Relative gradient errors against a float32 run of our model, of both sides. In FP32 the peer must agree to 1e-4;
    in BF16, where rounding also flips a few choices of experts, ours may not be further from the float32 run than the
    peer's by more than a tenth."""
    exact = benchmark_model()
    exact.load_state_dict(model.state_dict())
    ours(exact, rows)
    ours(model, rows)
    theirs(twin, rows)
    found = {}
    for name, reference in gradients(exact).items():
        for side, module in (("minids", model), ("transformers", twin)):
            found[f"{side} {name}"] = ((gradients(module)[name] - reference).norm() / reference.norm()).item()
        mine, peer = found[f"minids {name}"], found[f"transformers {name}"]
        full = model.lm_head.weight.dtype == torch.float32
        if not (mine < 1e-4 and peer < 1e-4 if full else mine < 1.1 * peer):
            raise RuntimeError(f"not the same step, nothing timed: gradient errors {found}")
    return found


def over(batches: list[Tensor], step: Callable[[Tensor], float]) -> Callable[[], float]:
    """A step that takes the next batch at every call."""
    following: Iterator[Tensor] = itertools.cycle(batches)
    return lambda: step(next(following))


def run(rounds: int) -> Report:
    """FP32 and BF16 (weights and activations), both implementations of transformers' experts."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 4096, (ROWS, LENGTH + 1), generator=generator) for _ in range(rounds + 1)]
    report = Report(
        f"Training step, forward + backward, {ROWS} x {LENGTH} tokens, one thread",
        ["dtype", "implementation", "ms", "tokens/s", "x peer", "GFLOP/s", "of matmul rate"], [],
    )  # fmt: skip
    for dtype, target in TARGETS.items():
        model = benchmark_model().to(dtype).train()
        twins = {kind: transformers_twin(model, kind).train() for kind in ("grouped_mm", "eager")}
        difference = check_equal(model, twins["grouped_mm"], batches[0])
        candidates = {"minids": over(batches, functools.partial(ours, model))}
        for kind, twin in twins.items():
            candidates[f"transformers {kind}"] = over(batches, functools.partial(theirs, twin))
        times = interleaved(candidates, rounds, matmul_dtype=dtype, settle=1)
        add_rows(report, str(dtype).removeprefix("torch."), times, step_flops(model.cfg), target, difference)
    report.notes.append("x peer: against transformers with grouped_mm experts, the median of the ratios within a round.")
    return report


def add_rows(report: Report, dtype: str, times: dict[str, list[float]], flops: int, target: float,
             difference: dict[str, Any]) -> None:  # fmt: skip
    peer, matmul = "transformers grouped_mm", 1 / median(times["matmul"])
    report.data[dtype] = {"seconds": times, "flops": flops, "matmul_flops": matmul, "difference": difference}
    for name in [n for n in times if n != "matmul"]:
        middle = median(times[name])
        report.rows.append([dtype, name, middle * 1e3, ROWS * LENGTH / middle, ratio(times, peer, name),
                            flops / middle / 1e9, flops / middle / matmul])  # fmt: skip
    speed_up = ratio(times, peer, "minids")
    report.notes.append(f"{dtype}: {speed_up:.2f} times the peer, target {target}; matmul rate {matmul / 1e9:.0f} GFLOP/s.")
    if speed_up < target:
        report.missed.append(f"{dtype}: {speed_up:.2f} < {target}")
