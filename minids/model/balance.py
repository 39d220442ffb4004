"""Keeping the experts busy alike [V3 section 2.1.2; 2408.15664].

The problem: a router left alone sends most tokens to few experts, which then learn most and attract more. V3 balances
with a bias on the choice, moved after every step towards the mean load, and adds one weak loss against extremes within
a single sequence:

    b_i <- b_i + gamma * sign(mean load - load_i)                          bias update, no gradient
    L_bal = alpha * sum_i f_i P_i                                          a sequence, averaged over sequences
    f_i = E / (K T) * (tokens of the sequence that chose i),   P_i = mean over its tokens of s_i / sum_j s_j

Shapes: B sequences, T tokens a sequence, E experts, K chosen.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.config import ModelConfig
from minids.model.router import Gate, Routing


def sequence_balance_loss(routing: Routing, batch: int, cfg: ModelConfig) -> Tensor:
    """alpha * sum_i f_i P_i over each of ``batch`` sequences, averaged; a float32 scalar. Gradient flows through P
    alone: f counts choices. [V3 eq. 17-20]"""
    scores_BTE = routing.scores.unflatten(0, (batch, -1))
    shares_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)  # softmax scores already sum to 1; then a no-op
    chosen_BTK = routing.indices.unflatten(0, (batch, -1))
    count_BE = F.one_hot(chosen_BTK.flatten(1), cfg.n_routed_experts).sum(1)
    f_BE = count_BE * (cfg.n_routed_experts / (cfg.num_experts_per_tok * chosen_BTK.shape[1]))
    return cfg.aux_loss_alpha * (f_BE * shares_BTE.mean(1)).sum(-1).mean()


@torch.no_grad()
def update_bias(gates: Sequence[Gate], loads_LE: Tensor, gamma: float) -> None:
    """b += gamma * sign(mean load - load), in place, one row of ``loads`` (L, E) a gate. The load is that of the whole
    global batch: summed over micro-batches and ranks before it comes here. [V3 2.1.2]"""
    if len(gates) != len(loads_LE):
        raise ValueError(f"loads has {len(loads_LE)} rows: allowed is one for each of the {len(gates)} routers")
    loads_LE = loads_LE.float()
    steps_LE = gamma * (loads_LE.mean(-1, keepdim=True) - loads_LE).sign()
    for gate, step_E in zip(gates, steps_LE, strict=True):
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias += step_E.to(gate.e_score_correction_bias.device)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = max load / mean load - 1 over the last dimension; 0 is perfect balance. [2408.15664 section 4.1]"""
    load = load.float()
    return load.amax(-1) / load.mean(-1).clamp_min(1e-20) - 1
