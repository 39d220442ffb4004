"""Keeping the experts busy alike [V3 section 2.1.2; 2408.15664].

The problem: a router left alone sends most tokens to few experts, which then learn most and attract more. V3 balances
with a bias on the choice, moved after every step towards the mean load, and adds one weak loss against extremes within
a single sequence:

    b_i <- b_i + gamma * sign(mean load - load_i)                          bias update, no gradient
    L_bal = alpha * sum_i f_i P_i                                          a sequence, averaged over sequences
    f_i = E / (K T) * (tokens of the sequence that chose i),   P_i = mean over its tokens of s_i / sum_j s_j

Here are V3's two and what every strategy is made of: ``Strategy``, four methods that by default do nothing. The others
are in auxiliary.py (losses) and assignment.py (who gets in when an expert is full); balancer.py puts them together.

Shapes: B sequences, T tokens a sequence, N = B * T, E experts, K chosen, L routers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.model.router import Gate, Routing


class Strategy:
    """One way to balance; a subclass overrides what it does. Subclasses are frozen dataclasses: their fields are the
    coefficients, checked by ``__post_init__`` to be finite and not negative."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{type(self).__name__}.{field.name}={value!r}: allowed is a finite number, 0 or above")

    def refusal(self, cfg: ModelConfig, others: Sequence[type]) -> str | None:
        """Why it cannot work for this config or beside ``others``, or None if it can."""
        return None

    def install(self, gate: Gate) -> None:
        """Hang hooks into a gate, and give it parameters of its own; before the optimizer is made."""

    def loss(self, routing: Routing, batch: int, cfg: ModelConfig) -> Tensor | None:
        """A scalar to add to the loss for each layer, or None. ``routing`` holds ``batch`` sequences."""
        return None

    def update(self, gates: Sequence[Gate], loads_LE: Tensor, gamma: float) -> None:
        """After an optimizer step: ``loads`` (L, E) of the whole global batch, ``gamma`` of the recipe."""


def shares(routing: Routing, batch: int) -> Tensor:
    """s_i / sum_j s_j, (B, T, E); softmax scores sum to 1 already."""
    scores_BTE = routing.scores.unflatten(0, (batch, -1))
    return scores_BTE / scores_BTE.sum(-1, keepdim=True)


def frequencies(routing: Routing, batch: int, n_experts: int) -> Tensor:
    """f_i = E / (K T) * (tokens of the sequence that chose i), (B, E): 1 for all experts when they are balanced."""
    chosen_BC = routing.indices.reshape(batch, -1)  # C = T * K choices a sequence
    counts_BE = torch.zeros(batch, n_experts, dtype=routing.scores.dtype, device=chosen_BC.device)
    counts_BE.scatter_add_(1, chosen_BC, torch.ones_like(chosen_BC, dtype=counts_BE.dtype))
    return counts_BE * (n_experts / chosen_BC.shape[1])


def frequency_loss(routing: Routing, batch: int, n_experts: int) -> Tensor:
    """sum_i f_i P_i over each of ``batch`` sequences, averaged. Gradient flows through P alone: f counts choices."""
    return (frequencies(routing, batch, n_experts) * shares(routing, batch).mean(1)).sum(-1).mean()


def sequence_balance_loss(routing: Routing, batch: int, cfg: ModelConfig) -> Tensor:
    """alpha * sum_i f_i P_i over each of ``batch`` sequences, averaged; a float32 scalar. [V3 eq. 17-20]"""
    return cfg.aux_loss_alpha * frequency_loss(routing, batch, cfg.n_routed_experts)


@dataclass(frozen=True)
class SequenceWise(Strategy):
    """L = alpha * sum_i f_i P_i within each sequence; alpha None is the config's ``aux_loss_alpha``. [V3 eq. 17-20]"""

    alpha: float | None = None

    def loss(self, routing, batch, cfg):
        alpha = cfg.aux_loss_alpha if self.alpha is None else self.alpha
        return alpha * frequency_loss(routing, batch, cfg.n_routed_experts)


@dataclass(frozen=True)
class SignBias(Strategy):
    """b_i += gamma * sign(mean load - load_i): the loss-free bias of V3; gamma is the recipe's. [V3 2.1.2; 2408.15664]"""

    def refusal(self, cfg, others):
        if cfg.topk_method != "noaux_tc":
            return f"topk_method={cfg.topk_method!r} has no e_score_correction_bias to move: allowed is 'noaux_tc'"
        return None

    def update(self, gates, loads_LE, gamma):
        update_bias(gates, loads_LE, gamma)


@dataclass(frozen=True)
class ProportionalBias(SignBias):
    """b_i += gamma * (mean load - load_i) / mean load: no sign. [2408.15664 section 5 has the raw difference; dividing
    by the mean frees gamma of the batch size]"""

    def update(self, gates, loads_LE, gamma):
        loads_LE = loads_LE.float()
        mean_L1 = loads_LE.mean(-1, keepdim=True)
        move_bias(gates, gamma * (mean_L1 - loads_LE) / mean_L1.clamp_min(1))


@torch.no_grad()
def update_bias(gates: Sequence[Gate], loads_LE: Tensor, gamma: float) -> None:
    """b += gamma * sign(mean load - load), in place, one row of ``loads`` (L, E) a gate. The load is that of the whole
    global batch: summed over micro-batches and ranks before it comes here. [V3 2.1.2]"""
    loads_LE = loads_LE.float()
    move_bias(gates, gamma * (loads_LE.mean(-1, keepdim=True) - loads_LE).sign())


@torch.no_grad()
def move_bias(gates: Sequence[Gate], steps_LE: Tensor) -> None:
    """Add a row of ``steps`` (L, E) to the bias of each gate; gates without one are left alone."""
    if len(gates) != len(steps_LE):
        raise ValueError(f"loads has {len(steps_LE)} rows: allowed is one for each of the {len(gates)} routers")
    for gate, step_E in zip(gates, steps_LE, strict=True):
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias += step_E.to(gate.e_score_correction_bias.device)


def max_violation(load: Tensor, mean: Tensor | float | None = None) -> Tensor:
    """MaxVio = max load / mean load - 1 over the last dimension; 0 is perfect balance. ``mean``: an expert's load under
    perfect balance, K N / E; it differs from the mean of ``load``, the default, where choices were dropped, and then MaxVio
    can be negative. [2408.15664 section 4.1]"""
    load = load.float()
    mean = load.mean(-1) if mean is None else mean
    return load.amax(-1) / (mean.clamp_min(1e-20) if isinstance(mean, Tensor) else max(mean, 1e-20)) - 1
