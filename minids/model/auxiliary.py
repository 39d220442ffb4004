"""Balancing by auxiliary losses, from the first sparse mixtures to V3: the router is paid to spread its tokens.

Two families. The first asks for equal sums over a batch, by the squared coefficient of variation:

    CV^2(v) = variance(v) / mean(v)^2                                            0 when all experts are alike

The second multiplies how often an expert is chosen, f_i, which has no gradient, with its mean share of the scores, P_i,
which has: pushing down P_i weighs most where f_i is large. sum_i f_i P_i is 1 when the f_i are equal, whatever the scores.
The members differ in what f counts and over which tokens: batch, sequence, device.

Every loss here comes in addition to the language loss, and its gradient pulls the router away from what that wants: the
price that the bias of V3 does not pay. "Batch" is what is in one forward pass; with gradient accumulation, a micro-batch.

Simplifications: the losses of softmax routers read s_i / sum_j s_j where the scores are sigmoids, as V3 does.

Shapes: B sequences, T tokens a sequence, N = B * T, E experts, K chosen, G groups (V2's devices, V3's nodes).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.model.balance import Strategy, frequencies, frequency_loss, shares
from minids.model.router import Noise, linear_float32

NOISE_FLOOR = 1e-2  # added to the deviation, as in the published code of 1701.06538: the load loss divides by it


def squared_variation(v_E: Tensor) -> Tensor:
    """CV^2 with the population's variance."""
    return v_E.var(unbiased=False) / v_E.mean().square().clamp_min(1e-20)


@dataclass(frozen=True)
class NoisyTopK(Strategy):
    """H_i = x W_g + normal noise * softplus(x W_noise)_i, and the top-K of H. W_noise (E, D) is learned and starts at 0;
    the noise lets an expert that is never best be tried. [1701.06538 eq. 3-5]"""

    def install(self, gate):
        gate.noise_weight = nn.Parameter(torch.zeros_like(gate.weight))
        gate.disturb = self.disturb

    def disturb(self, gate, x_ND, logits_NE) -> Noise:
        return Noise(logits_NE, F.softplus(linear_float32(x_ND, gate.noise_weight)) + NOISE_FLOOR)


@dataclass(frozen=True)
class ImportanceLoss(Strategy):
    """L = alpha * CV^2(importance), importance_i = sum over the batch of the gate values of i. [1701.06538 eq. 6-7]"""

    alpha: float = 0.1

    def loss(self, routing, batch, cfg):
        gates_NE = torch.zeros_like(routing.scores).scatter(-1, routing.indices, routing.weights.to(routing.scores.dtype))
        return self.alpha * squared_variation(gates_NE.sum(0))


@dataclass(frozen=True)
class LoadLoss(Strategy):
    """L = alpha * CV^2(load), load_i = sum over the batch of the probability that i would be chosen if its own noise were
    drawn again: a count that has a gradient,

        P_i = Phi((clean_i - k-th largest of H without i) / deviation_i)              [1701.06538 eq. 8-11]
    """

    alpha: float = 0.1

    def refusal(self, cfg, others):
        if NoisyTopK not in others:
            return "it is a probability over the noise of noisy top-k: add 'noisy'"
        if cfg.num_experts_per_tok == cfg.n_routed_experts:
            return f"num_experts_per_tok={cfg.num_experts_per_tok} chooses all n_routed_experts: nothing to balance"
        if cfg.topk_method != "greedy" and cfg.topk_group < cfg.n_group:
            return (f"topk_group={cfg.topk_group} of n_group={cfg.n_group}: the probability is that of a plain top-k, "
                    "allowed is topk_group = n_group")  # fmt: skip
        return None

    def loss(self, routing, batch, cfg):
        if routing.noise is None:  # inference: nothing was drawn
            return None
        k, clean, deviation = cfg.num_experts_per_tok, routing.noise.clean, routing.noise.deviation
        best = routing.logits.topk(k + 1, dim=-1).values
        # The k-th largest without i: for a chosen expert the best of those left out, for others the last chosen.
        barrier = torch.where(routing.logits > best[:, k:], best[:, k:], best[:, k - 1 : k])
        return self.alpha * squared_variation(torch.special.ndtr((clean - barrier) / deviation).sum(0))


def first_choices(routing) -> Tensor:
    """(E,) share of tokens whose best chosen expert it is."""
    first = routing.indices.gather(-1, routing.weights.detach().argmax(-1, keepdim=True)).flatten()
    count = torch.zeros(routing.scores.shape[-1], dtype=routing.scores.dtype, device=first.device)
    return count.scatter_add_(0, first, torch.ones_like(first, dtype=count.dtype)) / len(first)


@dataclass(frozen=True)
class GShardLoss(Strategy):
    """L = alpha / E * sum_i (c_i / N) m_i, c_i the tokens whose *first* choice is i, m_i their mean share; the second and
    later choices are not counted. At balance alpha / E^2. [2006.16668 algorithm 1]"""

    alpha: float = 1.0

    def loss(self, routing, batch, cfg):
        return self.alpha * (first_choices(routing) * shares(routing, 1).mean((0, 1))).mean()


@dataclass(frozen=True)
class SwitchLoss(Strategy):
    """L = alpha * E * sum_i f_i P_i, f_i the share of tokens whose best expert is i: GShard's times E^2, so that alpha does
    not depend on E. With K = 1 it is the batch-wise loss. [2101.03961 eq. 4-6]"""

    alpha: float = 0.01

    def loss(self, routing, batch, cfg):
        return self.alpha * cfg.n_routed_experts * (first_choices(routing) * shares(routing, 1).mean((0, 1))).sum()


@dataclass(frozen=True)
class ZLoss(Strategy):
    """L = alpha * mean over tokens of (log sum_j exp logit_j)^2: keeps logits small, so that a router in low precision
    stays exact. It is no balancing loss: it does not look at the load. [ST-MoE, 2202.08906 eq. 5]"""

    alpha: float = 1e-3

    def loss(self, routing, batch, cfg):
        return self.alpha * routing.logits.logsumexp(-1).square().mean()


@dataclass(frozen=True)
class BatchWise(Strategy):
    """L = alpha * sum_i f_i P_i over all tokens of the batch at once: domains may differ between sequences, as under the
    bias. V3 reaches the bias's loss with it. [V3 4.5.3]"""

    alpha: float = 1e-3

    def loss(self, routing, batch, cfg):
        return self.alpha * frequency_loss(routing, 1, cfg.n_routed_experts)


@dataclass(frozen=True)
class ExpertLevel(Strategy):
    """V2's L_ExpBal = alpha1 * sum_i f_i P_i a sequence: V3's sequence-wise loss, at 30 times its weight.
    [V2, 2405.04434 eq. 23-25]"""

    alpha: float = 0.003

    def loss(self, routing, batch, cfg):
        return self.alpha * frequency_loss(routing, batch, cfg.n_routed_experts)


class _Devices(Strategy):
    """What V2's losses over devices share: a device is a group of experts."""

    def refusal(self, cfg, others):
        if cfg.n_group == 1:
            return "n_group=1 is a single device: the loss is a constant; allowed is n_group of at least 2"
        return None


@dataclass(frozen=True)
class DeviceLevel(_Devices):
    """V2's L_DevBal = alpha2 * sum over devices of f' P', f' the mean of f and P' the sum of P over the device's experts:
    devices are balanced, experts within them need not be. [2405.04434 eq. 26-28]"""

    alpha: float = 0.05

    def loss(self, routing, batch, cfg):
        f_BG = frequencies(routing, batch, cfg.n_routed_experts).unflatten(-1, (cfg.n_group, -1)).mean(-1)
        p_BG = shares(routing, batch).mean(1).unflatten(-1, (cfg.n_group, -1)).sum(-1)
        return self.alpha * (f_BG * p_BG).sum(-1).mean()


@dataclass(frozen=True)
class Communication(_Devices):
    """V2's L_CommBal = alpha3 * sum over devices of f'' P'', f'' = G / (M T) * (tokens sent to the device), M = topk_group
    the most devices a token may reach: a token counts once a device, however many experts there. P'' = P'. It balances
    what devices receive. [2405.04434 eq. 29-31]"""

    alpha: float = 0.02

    def loss(self, routing, batch, cfg):
        device_NK = routing.indices // (cfg.n_routed_experts // cfg.n_group)
        sent_NG = torch.zeros(len(device_NK), cfg.n_group, dtype=routing.scores.dtype, device=device_NK.device)
        sent_BG = sent_NG.scatter_(1, device_NK, 1.0).unflatten(0, (batch, -1)).mean(1)
        p_BG = shares(routing, batch).mean(1).unflatten(-1, (cfg.n_group, -1)).sum(-1)
        return self.alpha * cfg.n_group / cfg.topk_group * (sent_BG * p_BG).sum(-1).mean()
