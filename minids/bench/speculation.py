"""Speculative decoding beside our own plain decoding: one request, one thread, a toy trained on code.

The question is what the MTP module that training leaves behind is worth. The toy preset is trained as `python -m minids
train` does it, on the sources of Python's library, then continues a few beginnings of code, greedily and by sampling. Both
ways must write the same greedy text before they are timed, interleaved, prefill included.

What to expect. A plain step runs all layers for one token. With one draft, a step runs them for two tokens at once and
the MTP module, a layer and the head again, for as many; it writes 1 + a tokens, a being the share of accepted drafts:

    speed-up = (1 + a) / ((time of a pass of two tokens + time of the module) / time of a pass of one)

On a GPU a pass of two tokens costs what one costs, since both read all weights once. On a CPU the second token is not
free: other experts are read for it too, and a toy's time is that of its calls. The last column is the denominator.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from minids.bench.common import Report, interleaved, ratio
from minids.checkpoint import load
from minids.data.tokenizer import BytePairTokenizer
from minids.infer.generate import generate
from minids.infer.speculate import SpeculationStats
from minids.model.transformer import Transformer

TRAIN_TOKENS = 500_000
NEW_TOKENS = 256
MODES = {"greedy": dict(temperature=0.0), "sampled, T=0.8": dict(temperature=0.8, top_p=0.95)}
BEGINNINGS = ["import os\nimport sys\n", "class Reader:\n    def __init__(self", "def main(args):\n", "for key in names:\n"]


def run(rounds: int, trained: Callable[[], tuple[Transformer, BytePairTokenizer]] | None = None) -> Report:
    """Train, compare, measure. ``trained`` gives another model than the one trained here."""
    model, tokenizer = (trained or train_toy)()
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in BEGINNINGS]
    report = Report(
        title=f"Speculative decoding with {len(model.mtp_modules)} MTP module(s), batch 1, {NEW_TOKENS} new tokens, FP32,"
              f" one thread; the toy after {TRAIN_TOKENS:,} tokens of code",
        columns=["mode", "speculative tokens/s", "plain tokens/s", "ratio", "target", "acceptance", "tokens a step",
                 "cost of a step"],
        rows=[],
    )  # fmt: skip
    check_equal(*(write(model, prompts, n, SpeculationStats(), temperature=0.0) for n in (0, True)))
    for mode, knobs in MODES.items():
        stats = SpeculationStats()
        write(model, prompts, True, stats, **knobs)
        sides = {"plain": lambda knobs=knobs: write(model, prompts, 0, SpeculationStats(), **knobs),
                 "speculative": lambda knobs=knobs: write(model, prompts, True, SpeculationStats(), **knobs)}  # fmt: skip
        add_row(report, mode, interleaved(sides, rounds, matmul_dtype=torch.float32), stats)
    return report


def train_toy() -> tuple[Transformer, BytePairTokenizer]:
    """The main job of this package, in a folder that is thrown away."""
    from minids.train.settings import RecipeConfig, TrainConfig
    from minids.train.state import latest_checkpoint
    from minids.train.trainer import train

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(TrainConfig(out=run, recipe=RecipeConfig(tokens=TRAIN_TOKENS), eval_every=0, save_every=10**9))
        return load(latest_checkpoint(run)), BytePairTokenizer.load(run / "tokenizer.json")


def write(model: Transformer, prompts: list[list[int]], speculate: int | bool, stats: SpeculationStats, **knobs) -> list:
    """Continue each prompt by itself: batch 1."""
    return [generate(model, [prompt], NEW_TOKENS, speculate=speculate, stats=stats, **knobs)[0] for prompt in prompts]


def check_equal(plain: list[list[int]], speculative: list[list[int]]) -> None:
    """Refuse to time two programs that do not write the same."""
    wrong = [row for row, (a, b) in enumerate(zip(plain, speculative, strict=True)) if a != b or len(a) != NEW_TOKENS]
    if wrong:
        raise RuntimeError(f"greedy texts with and without speculation differ in rows {wrong}; nothing was timed")


def add_row(report: Report, mode: str, times: dict[str, list[float]], stats: SpeculationStats) -> None:
    """Turn the rounds' seconds into a row; the target is any gain at all."""
    faster, tokens = ratio(times, slow="plain", fast="speculative"), len(BEGINNINGS) * NEW_TOKENS
    rates = [tokens / median(times[side]) for side in ("speculative", "plain")]
    report.rows.append([mode, *rates, faster, 1.0, " ".join(f"{share:.1%}" for share in stats.acceptance),
                        stats.tokens_per_step, stats.tokens_per_step / faster])  # fmt: skip
    report.data[mode] = {
        "ratio": faster, "target": 1.0, "acceptance": stats.acceptance, "tokens_per_step": stats.tokens_per_step,
        "speculative_tokens_per_second": rates[0], "plain_tokens_per_second": rates[1], "seconds": times,
    }  # fmt: skip
    if faster <= 1:
        report.missed.append(f"{mode}: {faster:.2f} times plain decoding, wanted more than 1")
