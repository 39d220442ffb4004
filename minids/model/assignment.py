"""Balancing by force: who gets in when an expert is full, and the choice turned around.

An expert has room for C tokens of a batch of N; then something has to give:

    C = ceil(factor * K N / E)
    capacity         the token loses that expert (its choice is *dropped*; the residual carries it on)
    buffer           the expert is blocked for the tokens that come later; they take their next best
    expert choice    experts choose: each takes its C = K N / E best tokens, a token gets any number of experts, even none

Force balances exactly, at two prices. Dropping loses work. And whoever compares tokens with each other lets a later token
decide what an earlier one gets: *the future leaks*, and a language model that trains so has read ahead. Expert choice and
priority by score do it; "who comes first" does not, if a token's places are given out all at once, token by token.
Inference, one token at a time, could not do the same anyway; it is plain top-K here.

Simplifications: capacity is counted over the batch of one forward pass, rows one after the other. A choice that is not
served is computed and weighed with 0, so all strategies here cost the same; a real system saves that work.

Shapes: N tokens, E experts, K chosen, C places an expert.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minids.model.balance import Strategy
from minids.model.router import Gate

PRIORITIES = ("position", "score")


def places(n_tokens: int, gate: Gate, factor: float = 1.0) -> int:
    """C = ceil(factor * K N / E), at least 1. [2101.03961 eq. 3]"""
    cfg = gate.cfg
    return max(1, math.ceil(factor * n_tokens * cfg.num_experts_per_tok / cfg.n_routed_experts - 1e-9))


def member_mask(indices: Tensor, n_experts: int) -> Tensor:
    """(N, E) bool: the token chose the expert."""
    return torch.zeros(len(indices), n_experts, dtype=torch.bool, device=indices.device).scatter_(1, indices, True)


def ranks_by_position(indices: Tensor, n_experts: int) -> Tensor:
    """(N, K): how many earlier tokens chose the same expert."""
    return member_mask(indices, n_experts).long().cumsum(0).gather(1, indices) - 1


def ranks_by_score(indices: Tensor, preference_NE: Tensor) -> Tensor:
    """(N, K): how many tokens that chose the same expert like it better (of equals, the earlier one)."""
    n, e = preference_NE.shape
    wish_NE = preference_NE.masked_fill(~member_mask(indices, e), -torch.inf)
    order_NE = wish_NE.argsort(dim=0, descending=True, stable=True)
    line_NE = torch.arange(n, device=indices.device).unsqueeze(1).expand(n, e)
    return torch.empty_like(order_NE).scatter_(0, order_NE, line_NE).gather(1, indices)


class _Assignment(Strategy):
    """A strategy with an ``assign`` hook; a gate has room for one."""

    def refusal(self, cfg, others):
        rivals = [other.__name__ for other in others if issubclass(other, _Assignment) and other is not type(self)]
        return f"it decides who gets in, and so does {rivals[0]}: allowed is one of them" if rivals else None

    def install(self, gate):
        gate.assign = self.assign

    def assign(self, gate: Gate, preference_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (N, K) int64 and which of them are served (N, K) bool."""
        raise NotImplementedError


@dataclass(frozen=True)
class Capacity(_Assignment):
    """An expert serves its first C tokens and drops the others. [GShard, 2006.16668 section 3.2; Switch, 2101.03961 2.2]

    factor: C over the mean load. priority: "position", earlier tokens first; or "score", tokens that like the expert most
    first, which drops what matters least and leaks the future [batch prioritised routing, 2106.05974].
    """

    factor: float = 1.25
    priority: str = "position"

    def __post_init__(self):
        super().__post_init__()
        if self.priority not in PRIORITIES:
            raise ValueError(f"Capacity.priority={self.priority!r}: allowed are {', '.join(PRIORITIES)}")
        if self.factor == 0:
            raise ValueError(f"Capacity.factor={self.factor!r}: allowed is a number above 0")

    def assign(self, gate, preference_NE):
        n, e = preference_NE.shape
        indices = preference_NE.topk(gate.cfg.num_experts_per_tok, dim=-1, sorted=False).indices
        by_position = self.priority == "position"
        ranks = ranks_by_position(indices, e) if by_position else ranks_by_score(indices, preference_NE)
        return indices, ranks < places(n, gate, self.factor)


@dataclass(frozen=True)
class Buffer(_Assignment):
    """An expert whose C places are taken is blocked; later tokens take their best K of the others. Only a token that finds
    fewer than K open experts loses a choice.

    All tokens ask for their best K open experts, every expert keeps the first C who ask and shuts its door to the later
    ones, until nobody is turned away. That is deferred acceptance, and since all experts rank tokens alike, by position,
    its outcome is the one of tokens choosing one after the other: no token learns of a later one.
    """

    factor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.factor < 1:
            raise ValueError(f"Buffer.factor={self.factor!r}: allowed is at least 1, or there are too few places")

    def assign(self, gate, preference_NE):
        n, e = preference_NE.shape
        limit, open_NE = places(n, gate, self.factor), preference_NE.clone()
        while True:
            best = open_NE.topk(gate.cfg.num_experts_per_tok, dim=-1, sorted=False)
            asks = best.values > -torch.inf  # a token without an open expert asks for nothing
            member_NE = torch.zeros_like(open_NE, dtype=torch.long).scatter_(1, best.indices, asks.long())
            late_NE = (member_NE.cumsum(0) > limit) & member_NE.bool()
            if not late_NE.any():
                return best.indices, asks
            open_NE.masked_fill_(late_NE, -torch.inf)


@dataclass(frozen=True)
class ExpertChoice(_Assignment):
    """Each expert takes its C = K N / E best tokens (rounded down): loads are equal by construction. A token's gate values
    are normalised over the experts that took it. [2202.09368 section 3.2]

    Whether a token is among the best depends on every other token of the batch, also on later ones: it leaks the future.
    """

    def refusal(self, cfg, others):
        if cfg.topk_method != "greedy" and cfg.topk_group < cfg.n_group:
            return (f"topk_group={cfg.topk_group} of n_group={cfg.n_group}: experts that choose cannot keep a token to few "
                    "groups; allowed is topk_group = n_group")  # fmt: skip
        if rest := [other.__name__ for other in others if other is not type(self)]:
            return f"its loads are equal by construction and leave {', '.join(rest)} nothing to do: allowed is it alone"
        return None

    def install(self, gate):
        super().install(gate)
        gate.normalise_served = True

    def assign(self, gate, preference_NE):
        n, e = preference_NE.shape
        limit = max(1, n * gate.cfg.num_experts_per_tok // e)
        taken_CE = preference_NE.topk(limit, dim=0).indices
        member_NE = torch.zeros_like(preference_NE).scatter_(0, taken_CE, 1.0)
        # As many columns as the most popular token needs; in the others' rows the rest is filled with experts not served.
        most = max(1, int(member_NE.sum(1).max()))
        best = member_NE.topk(most, dim=-1)
        return best.indices, best.values > 0
