"""Load statistics: what the balance of a router looks like, as numbers.

    load_i          tokens that expert i received
    MaxVio          max load / (K N / E) - 1: how much longer the slowest expert works than under balance  [2408.15664 4.1]
                    of a batch (what a step waits for), and globally, of all batches together (what the experts learn from);
                    negative when so much is dropped that no expert gets its share
    token entropy   - sum_i p_i ln p_i of a token's score shares p: how sure the router is, 0 to ln E
    load entropy    the same of load_i / sum load: how evenly experts are used, ln E when balanced
    dropped         choices that no expert served
    experts, nodes  that a token reaches; a node is a group of experts

Counting is a few small operations a layer without waiting for the device: cheap enough to be always on. ``read`` waits.

Shapes: N tokens, E experts, K chosen, G groups, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.model.balance import max_violation
from minids.model.router import Gate, Routing


def entropy(shares: Tensor) -> Tensor:
    """- sum p ln p over the last dimension, in nats."""
    return torch.special.entr(shares).sum(-1)


def nodes_per_token(indices: Tensor, cfg: ModelConfig, served: Tensor | None = None) -> Tensor:
    """(N,) int64: groups among a token's (served) experts."""
    reached = torch.zeros(len(indices), cfg.n_group, dtype=torch.int64, device=indices.device)
    hits = torch.ones_like(indices) if served is None else served.long()
    return reached.scatter_reduce_(1, indices // (cfg.n_routed_experts // cfg.n_group), hits, "amax").sum(-1)


@dataclass
class LoadMeter:
    """Adds up routings, batch by batch; one sum a layer."""

    cfg: ModelConfig
    sums: dict[str, Tensor] = field(default_factory=dict)  # name -> (L,) or (L, E)
    batches: int = 0

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """One batch: a routing of each MoE layer."""
        layers = [self._measure(routing) for routing in routings]
        new = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]} if layers else {}
        self.sums = {name: value + self.sums.get(name, 0) for name, value in new.items()}
        self.batches += 1

    def _measure(self, routing: Routing) -> dict[str, Tensor]:
        load = routing.received()
        shares = routing.scores / routing.scores.sum(-1, keepdim=True)
        # Unserved entries of expert choice only fill up its table: no token asked for them.
        asked = min(routing.indices.shape[1], self.cfg.num_experts_per_tok) * len(routing.indices)
        return {
            "load": load,
            "tokens": torch.full_like(load[0], len(routing.indices)),
            "asked": torch.full_like(load[0], asked),
            "received": load.sum(),
            "max_violation": max_violation(load, asked / self.cfg.n_routed_experts),
            "token_entropy": entropy(shares).sum(),
            "nodes": nodes_per_token(routing.indices, self.cfg, routing.served).sum(),
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
