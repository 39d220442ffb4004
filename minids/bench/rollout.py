"""Sampling for RL beside transformers' `generate`: 8 questions, 16 answers each, on the tiny policy, one thread.

What is compared. Both sides hold the same weights, whose logits must agree first, and sample 128 rows at temperature 1; no
row may end early, so that both draw as many tokens. Ours records the probability of every token besides, which GRPO needs
and `generate` would have to be asked for. The policy is so small that what is measured is what surrounds the arithmetic.
"""

from collections.abc import Callable
from statistics import median

import torch

from minids.bench.common import Report, interleaved, ratio
from minids.bench.peer import transformers_twin
from minids.model.transformer import Transformer
from minids.rl.policy import new_policy, tiny_config
from minids.rl.rollout import rollout
from minids.rl.tasks import character_tokenizer

QUESTIONS, GROUP = 8, 16
PROMPT_TOKENS, NEW_TOKENS = 12, 48
TARGET = 5.0  # times faster than the peer
AGREE = 1e-4  # largest difference of logits, float32


def run(rounds: int) -> Report:
    """Measure; the report lists the target if it was missed. Raises RuntimeError if the two models differ."""
    model = new_policy(tiny_config(character_tokenizer()), 0)
    with torch.no_grad():
        for weight in model.parameters():  # branches start at zero: nothing of attention and experts would be compared
            weight.add_(torch.empty_like(weight).normal_(0, 0.05, generator=torch.Generator().manual_seed(1)))
    twin = transformers_twin(model)
    shape, generator = (QUESTIONS, PROMPT_TOKENS), torch.Generator().manual_seed(0)
    prompts = torch.randint(2, model.cfg.vocab_size, shape, generator=generator)
    check_equal(model, twin, prompts)
    ours, theirs = contestants(model, twin, prompts)
    times = interleaved({"minids": ours, "transformers": theirs}, rounds)
    tokens, faster = QUESTIONS * GROUP * NEW_TOKENS, ratio(times, slow="transformers", fast="minids")
    rates = [tokens / median(times[name]) for name in ("minids", "transformers")]
    report = Report(
        title=f"Rollout: {QUESTIONS * GROUP} rows, {NEW_TOKENS} tokens sampled, {model.cfg.count()['main']:,} parameters, "
              "FP32, one thread",
        columns=["rows", "minids tokens/s", "transformers tokens/s", "ratio", "target"],
        rows=[[QUESTIONS * GROUP, *rates, faster, TARGET]], data={"seconds": times, "ratio": faster})  # fmt: skip
    if faster < TARGET:
        report.missed.append(f"{faster:.2f} times transformers, wanted {TARGET}")
    return report


def contestants(model: Transformer, twin, prompts_QT: torch.Tensor) -> tuple[Callable[[], int], Callable[[], int]]:
    """Both sides' work as functions that return how many tokens were drawn."""
    generator, prompts = torch.Generator().manual_seed(0), prompts_QT.tolist()
    rows_BT = prompts_QT.repeat_interleave(GROUP, dim=0)

    def ours() -> int:
        found = rollout(model, prompts, GROUP, NEW_TOKENS, eos_id=-1, generator=generator)
        return sum(map(len, found.answers))

    def theirs() -> int:
        found = twin.generate(rows_BT, attention_mask=torch.ones_like(rows_BT), max_new_tokens=NEW_TOKENS, do_sample=True,
                              temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)  # fmt: skip
        return found[:, PROMPT_TOKENS:].numel()

    return ours, theirs


@torch.no_grad()
def check_equal(model: Transformer, twin, prompts_QT: torch.Tensor) -> None:
    """Refuse to time two models that are not the same."""
    difference = (model(prompts_QT, mtp=False).logits - twin(prompts_QT).logits).abs().max()
    if not difference < AGREE:
        raise RuntimeError(f"logits differ by up to {difference:.1e}, allowed is {AGREE:.0e}; nothing was timed")
