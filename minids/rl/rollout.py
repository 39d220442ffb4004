"""Rollouts: G answers to each of Q questions, sampled over the latent cache, with the probability of every token.

The problem is time: in RL most of it goes into sampling. So each question is read once and its cache copied for its G
answers; all answers decode as one batch; finished ones are dropped and the batch closes up. Nothing of a step is done row
by row in Python, and what was drawn is put in its rows only when they change: with a tiny model such things cost more than
its forward pass.

The log-probabilities recorded here are those of the distribution that was sampled from, temperature included. Scored
again by the trainer's forward pass (``score``) they agree to rounding, and a policy whose ratio is not 1 before its first
update has a bug somewhere between the two. Tests hold them to 1e-5 of each other; of a base trained to the end, whose steep
softmaxes enlarge roundings, to 1e-5 of the exact figures but for one token in a thousand (in figures/rl: at most 2e-5).

Shapes: Q questions, G answers each, B = Q G in the order question by question, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minids.infer.generate import check_prompts, prefill
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
    with torch.inference_mode():
        logits_QV, cache = prefill(model, prompts, max_new_tokens)
        question_B = torch.arange(len(prompts), device=logits_QV.device).repeat_interleave(group)
        cache.select(question_B)
        drawn, logits_BV = Drawn(len(question_B), max_new_tokens, eos_id, logits_QV.device), logits_QV[question_B]
        for step in range(max_new_tokens):
            check_finite(logits_BV, f"at new token {step}")
            tokens_B = drawn.draw(logits_BV, temperature, generator)
            going = drawn.going()
            if going == 0 or step == max_new_tokens - 1:
                break
            if 2 * going <= len(tokens_B):  # each copy of the cache is at most half the one before
                kept = drawn.close_up()
                cache.select(kept)
                tokens_B = tokens_B[kept]
            logits_BV = model(tokens_B.unsqueeze(1), cache=cache, last_only=True).logits[:, 0]
        drawn.write()
    return drawn.padded([prompt for prompt in prompts for _ in range(group)])


class Drawn:
    """What was drawn so far, a row an answer: tokens, log-probabilities and entropies, (B, N) each. Steps are kept as they
    come, and written to their rows together when the batch closes up."""

    def __init__(self, rows: int, steps: int, eos_id: int, device):
        self.tokens_BN = torch.zeros(rows, steps, dtype=torch.int64, device=device)
        self.logp_BN, self.entropy_BN = torch.zeros(2, rows, steps, device=device)
        self.rows_B = torch.arange(rows, device=device)  # those that are still drawn
        self.ended_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.eos_id, self.written, self.steps = eos_id, 0, []

    def draw(self, logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
        """The next token of each row; those that have ended already draw too, and nobody reads it."""
        log_probs_BV = (logits_BV.float() / temperature).log_softmax(-1)
        probs_BV = log_probs_BV.exp()
        uniforms_B = torch.rand(len(logits_BV), generator=generator, dtype=torch.float64)
        tokens_B = draw(probs_BV, uniforms_B)
        entropy_B = -(probs_BV * log_probs_BV).nansum(-1)  # 0 log 0 is 0
        self.steps.append((tokens_B, log_probs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1), entropy_B))
        self.ended_B |= tokens_B == self.eos_id
        return tokens_B

    def going(self) -> int:
        """How many rows have not ended."""
        return len(self.ended_B) - int(self.ended_B.sum())

    def close_up(self) -> Tensor:
        """Drops the rows that have ended; the places of the others among those that were drawn."""
        self.write()
        kept = (~self.ended_B).nonzero().squeeze(1)
        self.rows_B, self.ended_B = self.rows_B[kept], self.ended_B[kept]
        return kept

    def write(self) -> None:
        """Puts the steps kept so far in their rows."""
        columns = slice(self.written, self.written + len(self.steps))
        for of_rows_BN, of_steps in zip((self.tokens_BN, self.logp_BN, self.entropy_BN), zip(*self.steps, strict=True),
                                        strict=True):  # fmt: skip
            of_rows_BN[self.rows_B, columns] = torch.stack(of_steps, dim=1)
        self.written, self.steps = columns.stop, []

    def lengths(self) -> Tensor:
        """(B,): tokens up to the first eos, itself included, or all."""
        ends_BN = self.tokens_BN == self.eos_id
        return torch.where(ends_BN.any(1), ends_BN.int().argmax(1) + 1, ends_BN.shape[1])

    def padded(self, prompts: list[list[int]]) -> Rollout:
        """All of it as a Rollout, once it is written."""
        length_B, device = self.lengths(), self.tokens_BN.device
        lengths, tokens = length_B.tolist(), self.tokens_BN.tolist()
        answers = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        counted_BN = torch.arange(self.tokens_BN.shape[1], device=device) < length_B.unsqueeze(1)
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        tokens_BT = torch.tensor([[*p, *a, *[0] * (width - len(p) - len(a))]
                                  for p, a in zip(prompts, answers, strict=True)])  # fmt: skip
        place_T = torch.arange(1, width)
        start_B1 = torch.tensor([len(p) for p in prompts]).unsqueeze(1)
        mask_BT = (place_T >= start_B1) & (place_T < start_B1 + torch.tensor(lengths).unsqueeze(1))
        mask_BT = mask_BT.to(device)
        logp_BT = torch.zeros(mask_BT.shape, device=device).masked_scatter_(mask_BT, self.logp_BN[counted_BN])
        entropy = float(self.entropy_BN[counted_BN].mean())
        return Rollout(tokens_BT.to(device), mask_BT, logp_BT, answers, entropy)


def score(model: Transformer, tokens_BT: Tensor, temperature: float = 1.0) -> tuple[Tensor, list]:
    """(log-probability of each next token (B, T - 1) float32 with gradient, the routing of each MoE layer), by the forward
    pass that training uses. Rows are padded on the right, where a causal model never looks."""
    out = model(tokens_BT[:, :-1], mtp=False)
    return token_logprobs(out.logits, tokens_BT[:, 1:], temperature), out.routing
