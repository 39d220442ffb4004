"""Group relative policy optimisation: PPO's clipped objective with the group's mean in place of a critic [R1 eq. 1-3].

The problem: how much better was this answer than expected? PPO asks a second network, as large as the policy. GRPO draws
G answers to the same question and compares them with each other:

    A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)                 one number an answer, the same for all its tokens
    rho_t = pi_theta(o_t) / pi_old(o_t),    KL_t = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1       ("k3")

    J = 1/G sum_i 1/|o_i| sum_t [ min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i) - beta KL_t ]       to be maximised

The minimum is pessimistic for both signs: it stops rewarding a ratio that has grown enough (A > 0, rho > 1 + eps) or shrunk
enough (A < 0, rho < 1 - eps), and never hides a ratio that went the wrong way (A = -1, rho = 2 costs 2, not 1 + eps). KL_t
is never negative, its mean over the policy's own samples is KL(pi || pi_ref), and its gradient at pi = pi_ref is zero.
Before the first update rho = 1, and the loss above, apart from KL, is minus the mean advantage: zero. Its gradient is not.
(R1 writes rho and KL for whole answers and no sum; by tokens, as here, is DeepSeekMath's equation 3.)

What others changed, one switch each:

    length      "answer"    1/|o_i|, as above: a long wrong answer is punished less a token than a short one
                "constant"  1/length_scale for every answer (Dr. GRPO), which removes that bias
                "token"     1 / all tokens of the batch (DAPO): every token counts the same
    std         None: r - mean alone (Dr. GRPO); else questions that are nearly always or never solved weigh more
    clip_high   above clip_low (DAPO's clip-higher) an unlikely token may gain more in an update
    beta        0: no reference model at all

Simplifications: rewards for the whole answer alone, none for its steps.

Shapes: Q questions, G answers each, B = Q G answers in the order question by question, T tokens (padded).
Sources: R1 = arXiv 2501.12948; DeepSeekMath 2402.03300, section 4.1; Dr. GRPO 2503.20783; DAPO 2503.14476; k3 is Schulman's
"Approximating KL divergence" (2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class GRPOConfig:
    """The objective; defaults are the paper's formula with PPO's usual clip range."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low earn a bad answer nothing more; from 1 on nothing is cut. (R1: 10, both ways.)"""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high earn a good answer nothing more. DAPO: 0.28."""
    beta: float = 0.001
    """Weight of the KL to the reference (R1: 0.001); 0 needs no reference."""
    length: Literal["answer", "constant", "token"] = "answer"
    """How tokens are averaged: GRPO, Dr. GRPO, DAPO."""
    length_scale: int | None = None
    """With length = constant: every answer's token sum is divided by this, the longest answer allowed."""
    std: Literal["population", "sample"] | None = "population"
    """Divide by the standard deviation of the group's rewards, of G or of G - 1 degrees of freedom; None: do not. R1 and
    DeepSeekMath write std and do not say which; TRL and verl take G - 1 and add 1e-4 and 1e-6. The choice is a factor of
    sqrt(G / (G - 1)) on all advantages: 1.03 for 16 answers."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value!r}: must be finite and at least 0")
        if self.length not in ("answer", "constant", "token"):
            raise ValueError(f"length = {self.length!r}: must be answer, constant or token")
        scale = self.length_scale
        if (self.length == "constant") != (scale is not None) or (scale is not None and scale < 1):
            raise ValueError(f"length_scale = {scale!r} with length = {self.length!r}: must be a positive "
                             "number of tokens with constant, and None otherwise")  # fmt: skip
        if self.std not in ("population", "sample", None):
            raise ValueError(f"std = {self.std!r}: must be population, sample or None")


@dataclass(frozen=True)
class Denominators:
    """What the sums over a whole batch are divided by; known before it is cut into micro-batches."""

    answers: int
    tokens: int

    @classmethod
    def of(cls, mask_BT: Tensor) -> Denominators:
        """``mask`` (B, T) bool: True on the tokens of the answers."""
        return cls(len(mask_BT), int(mask_BT.sum()))


def group_advantages(rewards_QG: Tensor, std: Literal["population", "sample"] | None = "population") -> Tensor:
    """How much better each answer is than its group: (Q, G) float -> (Q, G), rows of mean zero.

    A group whose rewards are all equal, but for rounding (0.1 + 0.2 and 0.3), says nothing: its advantages are exactly 0.
    Divided by the deviation, rounding would become advantages of order one.
    Raises ValueError for other shapes, fewer than two answers, or rewards that are not finite.
    """
    if rewards_QG.ndim != 2 or rewards_QG.shape[1] < 2 or not rewards_QG.is_floating_point():
        raise ValueError(f"rewards of shape {tuple(rewards_QG.shape)} and {rewards_QG.dtype}: allowed is (questions, "
                         "answers) floating point with at least 2 answers each")  # fmt: skip
    if not torch.isfinite(rewards_QG).all():
        raise ValueError(f"rewards: {int((~torch.isfinite(rewards_QG)).sum())} of {rewards_QG.numel()} are not finite")
    same_Q1 = ~informative(rewards_QG).unsqueeze(1)
    advantages_QG = rewards_QG - rewards_QG.mean(dim=1, keepdim=True)
    if std is not None:
        spread_Q1 = rewards_QG.std(dim=1, keepdim=True, correction=0 if std == "population" else 1)
        # A difference so small that its square is 0 has a spread of 0, too.
        advantages_QG = advantages_QG / spread_Q1.masked_fill(same_Q1 | (spread_Q1 == 0), 1.0)
    return advantages_QG.masked_fill(same_Q1, 0.0)


def informative(rewards_QG: Tensor) -> Tensor:
    """(Q,) bool: groups whose rewards differ, by more than rounding. DAPO's dynamic sampling draws questions until a batch
    holds only these."""
    rounding_Q = 8 * torch.finfo(rewards_QG.dtype).eps * rewards_QG.abs().amax(dim=1)
    return rewards_QG.amax(dim=1) - rewards_QG.amin(dim=1) > rounding_Q


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), element by element: right for both signs of A."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1, element by element: at least 0, and 0 only where both agree.

    Written with expm1, since near agreement the difference of the plain form is nothing but rounding.
    """
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio


def token_sum(values_BT: Tensor, mask_BT: Tensor, config: GRPOConfig, over: Denominators) -> Tensor:
    """sum over answers and tokens with the weights of ``config.length``; micro-batches of one batch simply add up."""
    per_answer_B = values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1)
    if config.length == "token":
        return per_answer_B.sum() / max(over.tokens, 1)
    lengths_B = mask_BT.sum(dim=1).clamp_min(1) if config.length == "answer" else config.length_scale
    return (per_answer_B / lengths_B).sum() / over.answers


def grpo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    ref_logp_BT: Tensor | None = None,
    config: GRPOConfig | None = None,
    over: Denominators | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-J, a scalar to be minimised, and what to watch: the terms it is made of, detached.

    Args:
        logp: (B, T) log-probabilities of the answers' tokens under the policy, with gradient; scored at the temperature
            that they were sampled at.
        old_logp: (B, T) the same under the policy that sampled them. ``logp.detach()`` when each rollout is used once.
        advantages: (B,) from ``group_advantages``, flattened.
        mask: (B, T) bool, True on the answers' tokens (the end token among them), False on prompt and padding. What the
            other tensors hold there does not matter, NaN included.
        ref_logp: (B, T) under the reference; needed where beta > 0.
        config: the objective; default the paper's.
        over: of the whole batch, when this is a micro-batch of it; default: of this one.

    Returns:
        The loss and {"policy": -J without KL, "kl": weighted as J weighs it, "clipped": share of tokens where the clip
        took the gradient away, "ratio_max"}.

    Raises ValueError for shapes and dtypes that do not fit, and for beta > 0 without ref_logp.
    """
    config = config or GRPOConfig()
    _check(logp_BT, old_logp_BT, advantages_B, mask_BT, ref_logp_BT, config)
    over = over or Denominators.of(mask_BT)
    # Padding is replaced before any arithmetic: a NaN times zero would still be one, in the gradient too.
    logp_BT, old_logp_BT = logp_BT.masked_fill(~mask_BT, 0.0), old_logp_BT.masked_fill(~mask_BT, 0.0)
    ratio_BT, advantage_B1 = torch.exp(logp_BT - old_logp_BT), advantages_B.unsqueeze(1)
    gain_BT = clipped_surrogate(ratio_BT, advantage_B1, config.clip_low, config.clip_high)
    policy = -token_sum(gain_BT, mask_BT, config, over)
    kl = torch.zeros_like(policy)
    if config.beta > 0:
        kl = token_sum(k3(logp_BT, ref_logp_BT.masked_fill(~mask_BT, 0.0)), mask_BT, config, over)
    with torch.no_grad():
        too_far_BT = ((advantage_B1 > 0) & (ratio_BT > 1 + config.clip_high)) | (
            (advantage_B1 < 0) & (ratio_BT < 1 - config.clip_low))  # fmt: skip
        stats = {"policy": policy.detach(), "kl": kl.detach(), "ratio_max": ratio_BT.amax(),
                 "clipped": (too_far_BT & mask_BT).sum() / max(over.tokens, 1)}  # fmt: skip
    return policy + config.beta * kl, stats


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(token) in float32, (B, T): ``logits`` (B, T, V) at the positions that predict ``tokens``.

    What was sampled at temperature tau came from softmax(logits / tau) and must be scored by it: scored untempered, the
    ratio would not be 1 before the first update. Raises ValueError for a temperature that is not positive.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature = {temperature!r}: must be finite and above 0; a greedy answer has no probability")
    scaled_BTV = logits_BTV.float() / temperature
    chosen_BT = scaled_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)
    return chosen_BT - scaled_BTV.logsumexp(dim=-1)


def _check(logp, old_logp, advantages, mask, ref_logp, config: GRPOConfig) -> None:
    if logp.ndim != 2 or not logp.is_floating_point():
        raise ValueError(f"logp of shape {tuple(logp.shape)} and {logp.dtype}: allowed is (B, T) floating point")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask of {mask.dtype}: allowed is bool, True on the tokens of the answers")
    for name, value in (("old_logp", old_logp), ("mask", mask), ("ref_logp", ref_logp)):
        if value is not None and value.shape != logp.shape:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: allowed is that of logp, {tuple(logp.shape)}")
    if advantages.shape != logp.shape[:1]:
        raise ValueError(f"advantages of shape {tuple(advantages.shape)}: allowed is one an answer, ({len(logp)},)")
    if old_logp.requires_grad or advantages.requires_grad or (ref_logp is not None and ref_logp.requires_grad):
        raise ValueError("old_logp, advantages and ref_logp are constants of the objective: detach them")
    if config.beta > 0 and ref_logp is None:
        raise ValueError(f"ref_logp is None with beta = {config.beta}: a KL needs the reference's log-probabilities")
