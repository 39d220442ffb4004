"""The training step of `minids.bench.gpu`: forward and backward of a 4.87B model beside transformers' DeepseekV3.

What is compared. Both sides hold the same weights in BF16 and get the same fresh rows; the peer's experts run as grouped
products (`experts_implementation="grouped_mm"`). Before anything is timed, minids/bench/gpu_equal.py holds both to a
float32 run. A step is gradients cleared, forward with the next-token loss, backward; no optimizer, which would be the same
on both sides. Ours also counts the load of every expert, and is timed both kernel by kernel and as the CUDA graph that our
trainer can record (minids/train/graph.py), the row's figure; transformers' trainer has no such thing.

The FP8 row is the same step with V3's recipe [section 3.3] on our side, the weights kept in float32 and the rest under BF16
autocast, as our trainer runs it; every step quantises all weights anew. FP8 is held to its simulation, too.
Sides take turns within a round; the figure is the median. The floor: 6 operations a multiplied parameter and token and the
causal half of attention, at the measured rate of the tensor core (FP8: for all but attention).
"""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from minids.bench.common import interleaved
from minids.bench.gpu_cases import reset_after_capture
from minids.bench.gpu_equal import PEER, autocast, check_equal
from minids.bench.gpu_report import row_of
from minids.config import ModelConfig
from minids.fp8 import to_fp8
from minids.model.transformer import Transformer
from minids.train.graph import Graphed

ROWS, LENGTH = 8, 2048
EAGER = "minids, kernel by kernel"
SHAPE = dict(
    vocab_size=32768, hidden_size=2048, num_hidden_layers=12, first_k_dense_replace=1, intermediate_size=8192,
    moe_intermediate_size=1024, n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4, n_shared_experts=1,
    num_attention_heads=16, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    max_position_embeddings=4096, rope_scaling=None, num_nextn_predict_layers=0, initializer_range=0.02,
)  # fmt: skip


def config(**overrides) -> ModelConfig:
    """The model of both rows: 4.87B parameters."""
    return ModelConfig.from_dict({**SHAPE, **overrides})


def jobs(rounds: int, limits: dict[str, float]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The two rows, each built and freed by itself."""
    for fp8 in (False, True):
        yield f"training {'FP8' if fp8 else 'BF16'}", lambda fp8=fp8: compare(config(), fp8, rounds, limits)


def compare(cfg: ModelConfig, fp8: bool, rounds: int, limits: dict[str, float], size: tuple[int, int] = (ROWS, LENGTH),
            device: str = "cuda") -> dict[str, Any]:  # fmt: skip
    """One row of the report. Raises RuntimeError if both sides do not compute the same."""
    facts, times = timed_pair(cfg, fp8, rounds, size, device)
    gc.collect()
    count, tokens, width = cfg.count(), size[0] * size[1], cfg.qk_head_dim + cfg.v_head_dim
    linear = 6 * count["activated_without_embedding"] * tokens
    attention = 3 * cfg.num_hidden_layers * cfg.num_attention_heads * width * tokens * size[1]  # half of the pairs
    floor = linear / limits["fp8" if fp8 else "bf16"] + attention / limits["bf16"]
    shape = f"{count['main'] / 1e9:.2f}B, {size[0]} x {size[1]}" + ("" if facts["refused"] else ", one CUDA graph")
    error = facts["difference"]["minids"]
    row = row_of(f"training step {'FP8' if fp8 else 'BF16'}", shape, "tokens/s", tokens, floor, error, times)
    return row | facts | {"flops": linear + attention}


def timed_pair(cfg: ModelConfig, fp8: bool, rounds: int, size: tuple[int, int], device: str):
    """How far apart both sides are, peaks of memory in GiB, why there is no graph, if so; and the seconds of each round."""
    model, twin = pair(cfg, device)
    if fp8:
        model = to_fp8(model.float(), "v3")
    batches = [torch.randint(0, cfg.vocab_size, (size[0], size[1] + 1), device=device) for _ in range(rounds + 1)]
    difference = check_equal(model, twin, batches[0], fp8)
    gc.collect()
    steps = {EAGER: partial(ours, model), PEER: partial(theirs, twin)}
    peaks, refused = {}, {}
    for name, step in steps.items():
        peaks[name] = peak(lambda step=step: step(batches[0]))
        for module in (model, twin):
            module.zero_grad(set_to_none=True)
    try:
        steps["minids"] = graphed(model, batches[0])
    except Exception as error:
        reset_after_capture()
        refused["minids, one CUDA graph"] = str(error).splitlines()[0]
        steps["minids"] = steps.pop(EAGER)
    times = interleaved({name: over(batches, step) for name, step in steps.items()}, rounds, settle=1)
    return {"difference": difference, "peak_gib": peaks, "refused": refused}, times


def pair(cfg: ModelConfig, device: str) -> tuple[Transformer, nn.Module]:
    """Our model in BF16 with random weights, and transformers' with the same."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Transformer(cfg).train()
            for gate in model.routers():
                bias = gate.e_score_correction_bias.uniform_(-0.05, 0.05)
                bias.copy_(bias.bfloat16())  # the twin may keep it so
            settings = DeepseekV3Config.from_dict(cfg.to_dict())
            settings._experts_implementation = "grouped_mm"
            twin = DeepseekV3ForCausalLM(settings).train()
    finally:
        torch.set_default_dtype(before)
    if twin.config._experts_implementation != "grouped_mm":
        raise RuntimeError(f"transformers chose {twin.config._experts_implementation} for its experts, not grouped_mm")
    twin.load_state_dict(model.state_dict())  # the names are the published ones on both sides; strict
    return model, twin


def ours(model: nn.Module, rows: Tensor) -> Tensor:
    """One step on ``rows`` (B, T + 1); the loss. What was kept of the weights in lower precision counts as out of date, as
    after an optimizer's step."""
    torch.autograd.graph.increment_version(list(model.parameters()))
    model.zero_grad(set_to_none=True)
    with autocast(model):
        out = model(rows[:, :-1], labels=rows[:, 1:])
    out.loss.backward()
    out.loads()
    return out.loss.detach()


def graphed(model: nn.Module, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """`ours`, recorded on these rows and replayed for all others. Raises RuntimeError if the loss is not that of `ours`."""

    def body(rows: Tensor) -> Tensor:
        with autocast(model):
            out = model(rows[:, :-1], labels=rows[:, 1:])
        out.loss.backward()
        out.loads()
        return out.loss.detach()

    expected = ours(model, rows).item()
    model.zero_grad(set_to_none=True)
    step = Graphed(body, list(model.parameters()), accumulate=False)
    found = step(rows).item()
    if not abs(found - expected) < 1e-3 * expected:
        raise RuntimeError(f"the recorded step has loss {found}, the step itself {expected}")
    return step


def theirs(twin: nn.Module, rows: Tensor) -> Tensor:
    """The same with transformers; its own ``labels`` would lose the last one, so the loss is written out."""
    twin.zero_grad(set_to_none=True)
    out = twin(input_ids=rows[:, :-1], use_cache=False)
    loss = nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def over(batches: list[Tensor], step: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """A step that takes the next batch at every call."""
    following = cycle(batches)
    return lambda: step(next(following))


def peak(call: Callable[[], object]) -> float:
    """GiB of device memory at the most during a call, both sides' weights included; NaN without CUDA."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30
