"""Load statistics: what the balance of a router looks like, as numbers.

    load_i          tokens that expert i received
    MaxVio          max load / (K N / E) - 1: how much longer the slowest expert works than under balance  [2408.15664 4.1]
                    of a batch (what a step waits for), and globally, of all batches together (what the experts learn from);
                    negative when so much is dropped that no expert gets its share
    token entropy   - sum_i p_i ln p_i of a token's score shares p: how sure the router is, 0 to ln E
    load entropy    the same of load_i / sum load: how evenly experts are used, ln E when balanced
    dropped         choices that no expert served
    experts, nodes  that a token reaches; a node is a group of experts

Counting is a few small operations for all layers at once, without waiting for the device: cheap enough to be always on.
``read`` waits.

Shapes: N tokens, E experts, K chosen, G groups, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.model.balance import max_violation
from minids.model.router import Gate, Routing


def entropy(shares: Tensor) -> Tensor:
    """- sum p ln p over the last dimension, in nats."""
    return torch.special.entr(shares).sum(-1)


def nodes_per_token(indices: Tensor, cfg: ModelConfig, served: Tensor | None = None) -> Tensor:
    """(..., N) int64: groups among a token's (served) experts; ``indices`` and ``served`` are (..., N, K)."""
    reached = torch.zeros(*indices.shape[:-1], cfg.n_group, dtype=torch.int64, device=indices.device)
    hits = torch.ones_like(indices) if served is None else served.long()
    return reached.scatter_reduce_(-1, indices // (cfg.n_routed_experts // cfg.n_group), hits, "amax").sum(-1)


@dataclass
class LoadMeter:
    """Adds up routings, batch by batch; one sum a layer."""

    cfg: ModelConfig
    sums: dict[str, Tensor] = field(default_factory=dict)  # name -> (L,) or (L, E)
    batches: int = 0

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """One batch: a routing of each MoE layer."""
        # MTP modules, which come last, see fewer tokens.
        groups = [self._measure(list(alike)) for _, alike in groupby(routings, lambda routing: routing.indices.shape)]
        new = {name: torch.cat([group[name] for group in groups]) for name in groups[0]} if groups else {}
        self.sums = {name: value + self.sums.get(name, 0) for name, value in new.items()}
        self.batches += 1

    def _measure(self, routings: list[Routing]) -> dict[str, Tensor]:
        """Of l layers with as many tokens each: (l,) or (l, E)."""
        load = torch.stack([routing.received() for routing in routings])
        scores, indices = (torch.stack([getattr(r, name) for r in routings]) for name in ("scores", "indices"))
        served = None if routings[0].served is None else torch.stack([routing.served for routing in routings])
        shares = scores / scores.sum(-1, keepdim=True)
        # Unserved entries of expert choice only fill up its table: no token asked for them.
        tokens = indices.shape[1]
        asked = min(indices.shape[2], self.cfg.num_experts_per_tok) * tokens
        return {
            "load": load,
            "tokens": torch.full_like(load[:, 0], tokens),
            "asked": torch.full_like(load[:, 0], asked),
            "received": load.sum(-1),
            "max_violation": max_violation(load, asked / self.cfg.n_routed_experts),
            "token_entropy": entropy(shares).sum(-1),
            "nodes": nodes_per_token(indices, self.cfg, served).sum(-1),
        }

    @property
    def load(self) -> Tensor:
        """(L, E) int64: tokens each expert received in all batches."""
        return self.sums["load"] if self.sums else torch.empty(0, self.cfg.n_routed_experts, dtype=torch.int64)

    def read(self, gates: Sequence[Gate] = ()) -> dict[str, list]:
        """Every statistic as plain numbers, a value (or row) for each layer; with ``gates`` their bias too. Empty if no
        MoE layer was measured."""
        if not self.sums:
            return {}
        s = {name: value.double().cpu() for name, value in self.sums.items()}
        found = {
            "load": s["load"].long(),
            "max_violation_batch": s["max_violation"] / self.batches,
            "max_violation_global": max_violation(s["load"], s["asked"] / self.cfg.n_routed_experts),
            "token_entropy": s["token_entropy"] / s["tokens"],
            "load_entropy": entropy(s["load"] / s["load"].sum(-1, keepdim=True).clamp_min(1)),
            "dropped": (s["asked"] - s["received"]).clamp_min(0).long(),
            "dropped_share": (1 - s["received"] / s["asked"]).clamp_min(0),
            "experts_per_token": s["received"] / s["tokens"],
            "nodes_per_token": s["nodes"] / s["tokens"],
        }
        values = {name: value.tolist() for name, value in found.items()}
        biases = [gate.e_score_correction_bias for gate in gates]
        if biases and all(bias is not None for bias in biases):
            values["bias"] = torch.stack(biases).tolist()
        return values
