"""Generation with cache beside transformers' `generate`: 64 new tokens, greedy, the same weights, one thread.

What is compared. Both sides get the same 19.7M model and the same random prompts, and must first write exactly the same
tokens; only then are they timed, interleaved, prefill included. transformers caches the latent too, but expands it to keys
and values of all heads at every step; here decoding stays in the latent space (absorbed MLA), reads each chosen expert
once and makes fewer operations of a step. The last column is the rate at which a step's weights are read: the memory's
bandwidth is the limit that it can be held against.
"""

from collections.abc import Callable
from statistics import median

import torch

from minids.bench.common import Report, interleaved, ratio
from minids.bench.peer import benchmark_model, transformers_twin
from minids.infer.generate import generate
from minids.model.transformer import Transformer

PROMPT_TOKENS = 32
NEW_TOKENS = 64
TARGETS = {1: 2.0, 16: 3.0}  # batch -> how many times faster than the peer


def run(rounds: int) -> Report:
    """Measure both batch sizes; the report lists each target that was missed. Raises RuntimeError if the tokens differ."""
    model = benchmark_model()
    twin = transformers_twin(model)
    report = Report(
        title=f"Generation of {NEW_TOKENS} tokens after a prompt of {PROMPT_TOKENS}, greedy, FP32, one thread",
        columns=["batch", "minids tokens/s", "transformers tokens/s", "ratio", "target", "ms a step", "weights GB/s"],
        rows=[],
    )
    for batch, target in TARGETS.items():
        ours, theirs = contestants(model, twin, batch)
        check_equal(ours(), theirs(), batch)
        times = interleaved({"minids": ours, "transformers": theirs}, rounds, matmul_dtype=torch.float32)
        add_row(report, model, batch, times, target)
    return report


def contestants(model: Transformer, twin, batch: int) -> tuple[Callable[[], list], Callable[[], list]]:
    """Both sides' work as functions that return the new tokens, a list a row."""
    generator = torch.Generator().manual_seed(batch)
    prompts_BT = torch.randint(0, model.cfg.vocab_size, (batch, PROMPT_TOKENS), generator=generator)
    prompts, mask_BT = prompts_BT.tolist(), torch.ones_like(prompts_BT)

    def ours() -> list[list[int]]:
        return generate(model, prompts, NEW_TOKENS)

    def theirs() -> list[list[int]]:
        rows = twin.generate(
            prompts_BT,
            attention_mask=mask_BT,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return rows[:, PROMPT_TOKENS:].tolist()

    return ours, theirs


def check_equal(ours: list[list[int]], theirs: list[list[int]], batch: int) -> None:
    """Refuse to time two programs that do not do the same thing."""
    wrong = [row for row, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b or len(a) != NEW_TOKENS]
    if wrong:
        raise RuntimeError(f"batch {batch}: the two sides' greedy tokens differ in rows {wrong}; nothing was timed")


def add_row(report: Report, model: Transformer, batch: int, times: dict[str, list[float]], target: float) -> None:
    """Turn the rounds' seconds into a row, keep them in the report's data, note a missed target."""
    faster = ratio(times, slow="transformers", fast="minids")
    tokens = batch * NEW_TOKENS
    step = median(times["minids"]) / NEW_TOKENS
    rates = [tokens / median(times[name]) for name in ("minids", "transformers")]
    report.rows.append([batch, *rates, faster, target, step * 1e3, step_bytes(model, batch) / step / 1e9])
    report.notes.append(f"batch {batch}: matmul rate in the same run {1 / median(times['matmul']) / 1e9:.0f} GFLOP/s FP32")
    report.data[f"batch_{batch}"] = {
        "ratio": faster, "target": target, "minids_tokens_per_second": rates[0], "transformers_tokens_per_second": rates[1],
        "seconds": times,
    }  # fmt: skip
    if faster < target:
        report.missed.append(f"batch {batch}: {faster:.2f} times transformers, wanted {target}")


def step_bytes(model: Transformer, batch: int) -> float:
    """Weight bytes a decode step reads, expected over uniform routing: an expert counts when any row chose it."""
    cfg, size = model.cfg, model.lm_head.weight.element_size()
    embedding = cfg.vocab_size * cfg.hidden_size
    dense = 0.0
    for name, parameter in model.named_parameters():
        hit = 1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** batch
        dense += parameter.numel() * (hit if ".experts." in name else 1.0)
    return (dense - embedding) * size
