"""What the experts of a trained model have to do, and how evenly a placement spreads it over GPUs [V3 section 3.4].

A layer waits for its busiest GPU. Of the best time that any placement with the same replicas could reach, a placement
reaches the share

    reached = max( mean_g load_g,  max_e load_e / r_e ) / max_g load_g        in (0, 1], 1 is best

Without replicas the second term is the heaviest expert itself: the more skewed the load, the less can be reached by
moving experts around, and only copying helps. Under a hierarchical placement the bound may be out of reach, because
nodes with heavy groups cannot hand work to others.

Shapes: L MoE layers, E experts, G GPUs, B sequences, T tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minids.model.transformer import Transformer
from minids.parallel.eplb import check_load, check_positive, invert


@torch.no_grad()
def measure_loads(model: Transformer, batches: Iterable[Tensor]) -> Tensor:
    """(L, E) int64: tokens each expert received while ``model`` read all ``batches`` of tokens (B, T) int64. Rows are in
    the order of ``model.routers()``: main layers, then MTP modules. Raises ValueError without a batch or MoE layer."""
    training = model.training
    model.eval()
    try:
        loads = [model(tokens).loads() for tokens in batches]
    finally:
        model.train(training)
    if not loads:
        raise ValueError("batches is empty: allowed is at least one batch of tokens (B, T)")
    return torch.stack(loads).sum(0)


@dataclass
class Balance:
    """How evenly a placement spreads the load, in the load's units, float64."""

    gpu_loads: Tensor  # (L, G)
    heaviest_replica: Tensor  # (L,): max_e load_e / r_e

    @property
    def mean(self) -> Tensor:
        """(L,) mean load of a GPU."""
        return self.gpu_loads.mean(1)

    @property
    def busiest(self) -> Tensor:
        """(L,) load of the busiest GPU: the layer's time."""
        return self.gpu_loads.amax(1)

    @property
    def bound(self) -> Tensor:
        """(L,) what the busiest GPU has at least: max(mean, heaviest / replicas)."""
        return torch.maximum(self.mean, self.heaviest_replica)

    @property
    def imbalance(self) -> Tensor:
        """(L,) busiest / mean, 1 is perfect; 1 for a layer without load."""
        return _ratio(self.busiest, self.mean)

    @property
    def reached(self) -> Tensor:
        """(L,) bound / busiest in (0, 1], 1 is the best there is with these replicas."""
        return _ratio(self.bound, self.busiest)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 1.0)


def balance_of(load: Tensor, slot_to_expert: Tensor, n_gpus: int) -> Balance:
    """The balance of a placement ``slot_to_expert`` (L, n_slots) of ``rebalance_experts`` under ``load`` (L, E), which
    need not be the load it was made for. Raises ValueError for sizes that do not fit."""
    load = check_load(load).double()
    check_positive(n_gpus=n_gpus)
    if slot_to_expert.dim() != 2 or len(slot_to_expert) != len(load) or slot_to_expert.shape[1] % n_gpus:
        raise ValueError(f"slot_to_expert has shape {tuple(slot_to_expert.shape)}: allowed is ({len(load)}, a multiple of "
                         f"n_gpus={n_gpus})")  # fmt: skip
    if slot_to_expert.min() < 0 or slot_to_expert.max() >= load.shape[1]:
        raise ValueError(f"slot_to_expert holds {int(slot_to_expert.min())} to {int(slot_to_expert.max())}: allowed are "
                         f"experts 0 to {load.shape[1] - 1}")  # fmt: skip
    _, replicas = invert(slot_to_expert, load.shape[1])
    if not replicas.all():
        layer, expert = (replicas == 0).nonzero()[0].tolist()
        raise ValueError(f"slot_to_expert[{layer}] lacks expert {expert}: allowed is at least one slot for each expert")
    share = load / replicas
    gpu_loads = share.gather(1, slot_to_expert).unflatten(1, (n_gpus, -1)).sum(-1)
    return Balance(gpu_loads, share.amax(1))


def balance_without_replicas(load: Tensor, n_gpus: int) -> Balance:
    """The balance when expert e simply lives on GPU floor(e * n_gpus / E): the state before any rebalancing."""
    load = check_load(load).double()
    check_positive(n_gpus=n_gpus)
    gpu = torch.arange(load.shape[1], device=load.device) * n_gpus // load.shape[1]
    gpu_loads = load.new_zeros(len(load), n_gpus).index_add_(1, gpu, load)
    return Balance(gpu_loads, load.amax(1))


def balance_table(before: Balance, after: Balance) -> str:
    """One line a layer: busiest / mean, the bound in the same unit, and the share of it reached, before and after."""
    lines = ["layer  before: max/mean  bound  reached   after: max/mean  bound  reached"]
    for layer in range(len(before.gpu_loads)):
        cells = [f"{layer:5}"]
        for one in (before, after):
            bound = _ratio(one.bound, one.mean)
            cells.append(f"{one.imbalance[layer]:15.2f} {bound[layer]:6.2f} {one.reached[layer]:7.1%}")
        lines.append("  ".join(cells))
    return "\n".join(lines)
