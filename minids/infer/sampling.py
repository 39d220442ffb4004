"""Sampling: from the logits of one position to the next token.

The problem. The model gives every token v of the vocabulary a logit z_v. Decoding has to choose one token, and three
knobs shape the choice:

    temperature tau    p_v = softmax(z / tau)_v; tau -> 0 is greedy decoding, tau = 1 the model's own distribution
    nucleus top_p      keep the smallest set of most probable tokens whose mass reaches top_p, renormalise
    seed               the uniform number u in [0, 1) that picks the token

A token is drawn by inverting the cumulative distribution: the first v with  p_0 + ... + p_v > u * sum(p).  One uniform
number a row and step is all the randomness there is, and it comes from the row's own generator. So a request's text
depends on its own seed and never on which other requests share its batch, and a shaped distribution is available as a
tensor of its own, which is what rejection sampling (speculative decoding) compares between a draft and the model.

Simplifications: no top-k, min-p or repetition penalties; R1 is evaluated with temperature 0.6 and top-p 0.95, and those
two knobs suffice.

Shapes: B batch rows, V vocabulary.
Source: nucleus sampling is Holtzman et al. 2020 (arXiv 1904.09751), section 3.1; the knobs' values DeepSeek-R1, section 3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SEED = 2**63 - 1
HEAD = 2048  # most probable tokens among which a nucleus is looked for first


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse knobs that define no distribution: ValueError or TypeError with the knob, its value and what is allowed."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and >= 0 (0 is greedy decoding), got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] (1 keeps every token), got {top_p!r}")


def check_seed(seed: int) -> None:
    """Refuse a seed that torch.Generator cannot take or would alias. Raises ValueError or TypeError."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be in [0, {MAX_SEED}], got {seed}")


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a row. On the CPU whatever the model's device, so that a seed means the same text everywhere."""
    for seed in seeds:
        check_seed(seed)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniforms(generators: Sequence[torch.Generator]) -> Tensor:
    """The next uniform number in [0, 1) of each row: (B,) float64 on the CPU. Advances every generator by one draw."""
    return torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])


def greedy(logits_BV: Tensor) -> Tensor:
    """The most probable token of each row, (B, V) -> (B,) int64; of equal logits the lowest token id."""
    return logits_BV.argmax(dim=-1)


def probabilities(logits_BV: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """The distribution that temperature and top_p make of the logits: (B, V) float -> (B, V) float32, rows sum to 1.

    temperature > 0 here: greedy decoding is a choice (`greedy`), not a distribution. The row's maximum is subtracted
    before the division, so that no temperature, however small, turns the largest logit into infinity.
    """
    logits_BV = logits_BV.float()
    shifted_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    probs_BV = torch.softmax(shifted_BV.double().div(temperature).float(), dim=-1)
    return probs_BV if top_p >= 1 else keep_nucleus(probs_BV, top_p)


def keep_nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Zero every token outside the nucleus and renormalise: (B, V) -> (B, V).

    The nucleus is the smallest set of most probable tokens with mass >= top_p, so a token stays exactly when the tokens
    before it have not reached top_p yet; the first always stays. Of equally probable tokens the lower id comes first
    (stable sort). A sort of the whole vocabulary takes longer than a small model's step; the HEAD most probable tokens
    are enough, unless a nucleus is larger or ends among equals.
    """
    sorted_BV, order_BV = probs_BV.topk(min(HEAD, probs_BV.shape[-1]), dim=-1)
    stays_BV = inside_nucleus(sorted_BV, top_p)
    last_B1 = stays_BV.sum(-1, keepdim=True) - 1
    ends = last_B1 + 1 < sorted_BV.shape[-1]
    if not (ends & (sorted_BV.gather(-1, last_B1) > sorted_BV.gather(-1, last_B1 + ends))).all():
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        stays_BV = inside_nucleus(sorted_BV, top_p)
    sorted_BV = sorted_BV.masked_fill(~stays_BV, 0.0)
    sorted_BV = sorted_BV / sorted_BV.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs_BV).scatter_(-1, order_BV, sorted_BV)


def inside_nucleus(sorted_BV: Tensor, top_p: float) -> Tensor:
    """Whether the mass before each token, in descending order, is below top_p: (B, V) bool."""
    return sorted_BV.double().cumsum(dim=-1) - sorted_BV < top_p


def draw(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Invert the cumulative distribution: (B, V) weights and (B,) uniforms in [0, 1) -> (B,) int64 tokens.

    Summed in float64: at a vocabulary of 129,280 the float32 sum is wrong by more than the smallest probabilities. The
    comparison is strict, so a token of probability zero is never drawn, not even at u = 0; weights need not sum to one.
    """
    cumulative_BV = probs_BV.double().cumsum(dim=-1)
    target_B1 = uniforms_B.to(cumulative_BV).unsqueeze(-1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)


def sample(logits_BV: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row: (B, V) logits -> (B,) int64. Greedy, advancing no generator, at temperature 0."""
    if temperature == 0:
        return greedy(logits_BV)
    return draw(probabilities(logits_BV, temperature, top_p), uniforms(generators))


def check_finite(logits: Tensor, when: str) -> None:
    """Refuse to choose a token from NaN or infinity: argmax would quietly return one. Raises FloatingPointError."""
    if not torch.isfinite(logits.sum(dtype=torch.float32)):  # one pass; a sum is finite only if all its terms are
        raise FloatingPointError(f"the model's logits are not finite (NaN or infinity) {when}")
