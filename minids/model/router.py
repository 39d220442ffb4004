"""The router: which K of E experts a token visits, and with what weight [V3 section 2.1.2, eq. 12-16].

    s = sigmoid(x W_g^T)                      an affinity for each expert, in float32
    chosen = top-K of (s + b), inside the topk_group best groups (a group's score: the sum of its two best s + b)
    g_i = s_i / sum of the chosen s * routed_scaling_factor

The bias b steers the choice and nothing else: a gate value never contains it. Groups are V3's nodes: limiting a token to
four of eight groups limits the nodes it is sent to. Groups not kept are masked with -inf; with 0 an expert of such a group
would win over one with a negative biased score.

V2's variants are the same code: softmax scores, no bias, no groups (``greedy``) or a group's score is its best expert
(``group_limited_greedy``), gates not normalised.

A balancing strategy (minids/model/balancer.py) may hang two hooks into the gate: ``disturb`` adds noise to the logits,
``assign`` decides who gets in when experts are full, or turns the choice around. Both act in training only, so that
inference is always the plain top-K above and a checkpoint needs to know nothing of the strategy that made it.

Shapes: N tokens (B * T), D hidden, E experts, K chosen, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids import kernels
from minids.config import ModelConfig
from minids.kernels import uses_kernels

MANY = 1024  # tokens from which the gate's kernel is quicker than a product in float32


@dataclass
class Noise:
    """What noisy top-K did to the logits; both (N, E) float32, differentiable. [1701.06538 eq. 4]"""

    clean: Tensor
    deviation: Tensor


@dataclass
class Routing:
    """Where a layer sent its N tokens."""

    weights: Tensor  # (N, K) float32: gate values g, differentiable; 0 where a choice was not served
    indices: Tensor  # (N, K) int64: the chosen experts, in no particular order
    scores: Tensor  # (N, E) float32: s, differentiable (the balance losses read it)
    load: Tensor  # (E,) int64: tokens that chose each expert, served or not
    logits: Tensor | None = None  # (N, E) float32: x W_g^T with its noise, differentiable
    noise: Noise | None = None
    served: Tensor | None = None  # (N, K) bool: choices that reach their expert; None is all

    def detached(self) -> Routing:
        """The same numbers, out of the graph of gradients."""
        noise = self.noise and Noise(self.noise.clean.detach(), self.noise.deviation.detach())
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"noise": noise}
        return Routing(**{name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})

    def received(self) -> Tensor:
        """(E,) int64: tokens each expert works on, ``load`` without the choices that were not served."""
        if self.served is None:
            return self.load
        return torch.zeros_like(self.load).scatter_add_(0, self.indices.flatten(), self.served.flatten().long())


def keep_best_groups(choice_NE: Tensor, cfg: ModelConfig) -> Tensor:
    """``choice`` with every expert outside the ``topk_group`` best groups set to -inf."""
    groups_NGe = choice_NE.unflatten(-1, (cfg.n_group, -1))
    if cfg.topk_method == "noaux_tc":
        # The sum of the two best, as two maxima: on the CPU four times as fast as a top-2.
        best, place = groups_NGe.max(-1, keepdim=True)
        group_scores = best.squeeze(-1) + groups_NGe.scatter(-1, place, -torch.inf).amax(-1)
    else:
        group_scores = groups_NGe.amax(-1)
    kept = group_scores.topk(cfg.topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, kept, False)
    return groups_NGe.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)


class Gate(nn.Module):
    """The published ``mlp.gate``: ``weight`` (E, D), and ``e_score_correction_bias`` (E,) float32, no gradient."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        bias = torch.zeros(cfg.n_routed_experts, dtype=torch.float32) if cfg.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)
        # Hooks of a balancing strategy, used in training only; see Strategy.install.
        self.disturb: Callable[[Gate, Tensor, Tensor], Noise] | None = None
        self.assign: Callable[[Gate, Tensor], tuple[Tensor, Tensor]] | None = None
        self.normalise_served = False  # gates sum to the scaling factor over the served choices, not over all

    def _apply(self, fn, recurse=True):
        """``model.to(torch.bfloat16)`` casts everything; the bias stays float32, as published."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None:
            moved = self.e_score_correction_bias
            self.e_score_correction_bias = moved if moved.dtype == bias.dtype else bias.to(moved.device)
        return self

    def logits(self, x_ND: Tensor) -> Tensor:
        """x W_g^T (N, E), float32 whatever the model's dtype."""
        return linear_float32(x_ND, self.weight)

    def activate(self, logits_NE: Tensor) -> Tensor:
        return logits_NE.sigmoid() if self.cfg.scoring_func == "sigmoid" else logits_NE.softmax(-1)

    def scores(self, x_ND: Tensor) -> Tensor:
        """s (N, E), float32 whatever the model's dtype."""
        return self.activate(self.logits(x_ND))

    def preference(self, scores_NE: Tensor) -> Tensor:
        """s + b (N, E), -inf outside the kept groups: what the choice goes by. No gradient flows through a choice."""
        choice = scores_NE.detach()
        if self.e_score_correction_bias is not None:
            choice = choice + self.e_score_correction_bias
        if self.cfg.topk_method != "greedy" and self.cfg.topk_group < self.cfg.n_group:
            choice = keep_best_groups(choice, self.cfg)
        return choice

    def choose(self, scores_NE: Tensor) -> Tensor:
        """Indices (N, K) of the chosen experts."""
        return self.preference(scores_NE).topk(self.cfg.num_experts_per_tok, dim=-1, sorted=False).indices

    def gate_values(self, scores_NE: Tensor, indices: Tensor, served: Tensor | None = None) -> Tensor:
        """g (N, K) of the chosen experts; 0 for a choice that was not served."""
        weights = scores_NE.gather(-1, indices)
        if served is not None and self.normalise_served:
            weights = weights * served
        if self.cfg.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.cfg.routed_scaling_factor
        return weights if served is None else weights * served

    def _fits_kernel(self, logits_NE: Tensor) -> bool:
        """Whether the kernel of minids/kernels/routing.py does all that is asked: V3's router, no hook that acts."""
        cfg, e = self.cfg, logits_NE.shape[1]
        plain = not (self.training and (self.disturb is not None or self.assign is not None))
        published = cfg.scoring_func == "sigmoid" and cfg.norm_topk_prob and self.e_score_correction_bias is not None
        return plain and published and e & (e - 1) == 0 and e >= 2 * cfg.n_group and uses_kernels(logits_NE)

    def forward(self, x_ND: Tensor) -> Routing:
        logits, noise, served = self.logits(x_ND), None, None
        if self._fits_kernel(logits):
            cfg = self.cfg
            weights, indices, scores, load = kernels.router(
                logits, self.e_score_correction_bias, n_group=cfg.n_group, topk_group=cfg.topk_group,
                k=cfg.num_experts_per_tok, scale=cfg.routed_scaling_factor, with_load=True)  # fmt: skip
            return Routing(weights, indices, scores, load, logits)
        if self.training and self.disturb is not None:
            noise = self.disturb(self, x_ND, logits)
            logits = noise.clean + torch.randn_like(noise.clean) * noise.deviation
        scores = self.activate(logits)
        if self.training and self.assign is not None:
            indices, served = self.assign(self, self.preference(scores))
        else:
            indices = self.choose(scores)
        weights = self.gate_values(scores, indices, served)
        load = count_load(indices, self.cfg.n_routed_experts)
        return Routing(weights, indices, scores, load, logits, noise, served)


def linear_float32(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32, out of autocast's reach. Many tokens in BF16 on CUDA: by the kernel of minids/kernels/gate.py."""
    device, experts = x_ND.device.type, len(weight_ED)
    fits = experts >= 16 and experts & (experts - 1) == 0 and x_ND.dtype == torch.bfloat16
    if fits and len(x_ND) >= MANY and uses_kernels(x_ND):
        return kernels.gate_logits(x_ND, weight_ED)
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return F.linear(x_ND.float(), weight_ED.float())


def count_load(indices: Tensor, n_experts: int) -> Tensor:
    """(E,) int64 counts of ``indices``; unlike bincount it never waits for the device."""
    flat = indices.flatten()
    return torch.zeros(n_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
