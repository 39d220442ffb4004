"""Rollouts: G answers to each of Q questions, sampled over the latent cache, with the probability of every token.

The problem is time: in RL most of it goes into sampling. So each question is read once and its cache copied for its G
answers; all answers decode as one batch; finished ones are dropped and the batch closes up (``infer.generate.decode``).

The log-probabilities recorded here are those of the distribution that was sampled from, temperature included. Scored
again by the trainer's forward pass (``score``) they agree to rounding: a test holds them to 1e-5, and a policy whose ratio
is not 1 before its first update has a bug somewhere between the two.

Shapes: Q questions, G answers each, B = Q G in the order question by question, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minids.infer.generate import check_prompts, decode, prefill
from minids.infer.sampling import check_finite, draw
from minids.model.transformer import Transformer
from minids.rl.grpo import token_logprobs


@dataclass
class Rollout:
    """Answers as one padded batch. What a row holds behind its end is 0 and masked."""

    tokens_BT: Tensor  # int64: question and answer, padded on the right
    mask_BT: Tensor  # (B, T - 1) bool: entry t is True where token t + 1 belongs to the answer
    logp_BT: Tensor  # (B, T - 1) float32: of token t + 1 under the policy that sampled it; 0 where masked
    answers: list[list[int]]  # the answers alone, a final eos included
    entropy: float  # mean over the answers' tokens of the entropy they were drawn from, nats


def rollout(model: Transformer, prompts: Sequence[Sequence[int]], group: int, max_new_tokens: int, *, eos_id: int,
            temperature: float = 1.0, generator: torch.Generator | None = None) -> Rollout:  # fmt: skip
    """``group`` answers to each prompt, of at most ``max_new_tokens`` tokens.

    prompts: token lists, each with at least one token. temperature > 0; there is no top-p here, since what is scored later
    must be what was sampled from. generator: a CPU generator that draws one number a live row and step.
    Raises ValueError for bad prompts or settings before any work, FloatingPointError for logits that are not finite.
    """
    prompts = check_prompts(prompts, max_new_tokens, model.cfg.vocab_size, model.cfg.max_position_embeddings)
    if group < 1 or not prompts:
        raise ValueError(f"{len(prompts)} prompts, group = {group!r}: must be at least 1 each")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature = {temperature!r}: must be finite and above 0; a greedy answer has no probability")
    model.eval()
    n = len(prompts) * group
    answers: list[list[int]] = [[] for _ in range(n)]
    logps: list[list[float]] = [[] for _ in range(n)]
    entropies: list[list[float]] = [[] for _ in range(n)]
    pending: dict[int, tuple[float, float]] = {}

    def choose(logits_BV: Tensor, rows: list[int]) -> Tensor:
        log_probs_BV = (logits_BV.float() / temperature).log_softmax(-1)
        probs_BV = log_probs_BV.exp()
        uniforms_B = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        tokens_B = draw(probs_BV, uniforms_B)
        chosen_B = log_probs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
        entropy_B = -(probs_BV * log_probs_BV.nan_to_num(neginf=0.0)).sum(-1)
        pending.update(zip(rows, zip(chosen_B.tolist(), entropy_B.tolist(), strict=True), strict=True))
        return tokens_B

    def emit(row: int, token: int) -> bool:
        answers[row].append(token)
        logps[row].append(pending[row][0])
        entropies[row].append(pending[row][1])
        return token == eos_id or len(answers[row]) == max_new_tokens

    with torch.inference_mode():
        logits_QV, cache = prefill(model, prompts, max_new_tokens)
        check_finite(logits_QV, "after the prompts")
        question_B = torch.arange(len(prompts), device=logits_QV.device).repeat_interleave(group)
        cache.select(question_B)
        tokens_B = choose(logits_QV[question_B], list(range(n)))
        done = [emit(row, token) for row, token in enumerate(tokens_B.tolist())]
        decode(model, cache, tokens_B, done, choose, emit)
    repeated = [prompt for prompt in prompts for _ in range(group)]
    flat = [value for row in entropies for value in row]
    return _padded(repeated, answers, logps, sum(flat) / len(flat), logits_QV.device)


def _padded(prompts: list, answers: list, logps: list, entropy: float, device) -> Rollout:
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens_BT = torch.zeros(len(answers), width, dtype=torch.int64)
    mask_BT = torch.zeros(len(answers), width - 1, dtype=torch.bool)
    logp_BT = torch.zeros(len(answers), width - 1)
    for row, (prompt, answer, logp) in enumerate(zip(prompts, answers, logps, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens_BT[row, :end] = torch.tensor([*prompt, *answer])
        mask_BT[row, start - 1 : end - 1] = True
        logp_BT[row, start - 1 : end - 1] = torch.tensor(logp)
    return Rollout(tokens_BT.to(device), mask_BT.to(device), logp_BT.to(device), answers, entropy)


def score(model: Transformer, tokens_BT: Tensor, temperature: float = 1.0) -> tuple[Tensor, list]:
    """(log-probability of each next token (B, T - 1) float32 with gradient, the routing of each MoE layer), by the forward
    pass that training uses. Rows are padded on the right, where a causal model never looks."""
    out = model(tokens_BT[:, :-1], mtp=False)
    return token_logprobs(out.logits, tokens_BT[:, 1:], temperature), out.routing
