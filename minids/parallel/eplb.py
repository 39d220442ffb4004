"""EPLB: which experts to copy, and where the copies go, so that every GPU works alike [V3 section 3.4].

The problem: with experts spread over GPUs a layer takes as long as its busiest GPU, and in service nobody may retrain
the router to even the traffic out. But memory is left: V3's prefill unit of 32 GPUs holds 256 + 32 experts, 9 a GPU, and
every ten minutes copies of the experts that were busiest take the spare slots. Expert e with r_e replicas costs each
load_e / r_e, so no placement is faster than

    max_g load_g  >=  max( mean_g load_g,  max_e load_e / r_e )                                               (bound)

*Hierarchical*, when the nodes divide the groups: whole groups are packed onto nodes, then each node replicates and packs
its own experts onto its own GPUs. Every replica of a group stays on one node, so a token limited to M groups still
reaches at most M nodes. *Global*, otherwise: any expert anywhere; better balance, but no limit on nodes. (Ask for it
with n_groups = n_nodes = 1.)

No GPU gets two replicas of one expert unless it has more slots than there are experts to choose from (its node's, or
all); then it must, and such GPUs are made alike. ``minids/parallel/packing.py`` is the packing itself.

Simplifications: a replica gets exactly its share of its expert's tokens, and moving weights to their new slots is free.

Shapes: L MoE layers, E experts, slots n_slots in all, R most replicas of an expert. Slot s is on GPU
s // (n_slots / n_gpus), and GPU g on node g // (n_gpus / n_nodes).
"""

from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from minids.parallel.packing import busiest_load, pack_greedily, place


def rebalance_experts(load: Tensor, n_slots: int, n_groups: int, n_nodes: int,
                      n_gpus: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Places replicas of E experts in ``n_slots`` slots, layer by layer; the same input gives the same placement.

    Args:
        load: (L, E), integer or floating: tokens (or any measure of work) each expert got; finite, not negative.
        n_slots: expert slots of all GPUs together, at least E, a multiple of ``n_gpus``.
        n_groups: groups of neighbouring experts, a divisor of E. n_nodes: if it divides ``n_groups``, hierarchical.
        n_gpus: GPUs of all nodes together, a multiple of ``n_nodes``.
    Returns, int64 on the device of ``load``:
        slot_to_expert (L, n_slots): the expert in each slot, ascending within a GPU.
        expert_to_slots (L, E, R): each expert's slots, ascending, -1 where it has fewer than R.
        replicas (L, E): how many slots each expert has, at least 1.
    Raises ValueError naming the argument, the value received and what is allowed.
    """
    load = check_load(load)
    _check_sizes(load.shape[1], n_slots, n_groups, n_nodes, n_gpus)
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    rows = [_place_layer(load_E, n_slots, n_groups, n_nodes, n_gpus) for load_E in load.cpu().double().numpy()]
    slot_to_expert = torch.from_numpy(np.stack(rows)).to(load.device)
    return (slot_to_expert, *invert(slot_to_expert, load.shape[1]))


def _place_layer(load_E: np.ndarray, n_slots: int, n_groups: int, n_nodes: int, n_gpus: int) -> np.ndarray:
    """(n_slots,) int64 expert of each slot: groups onto nodes, then each node's experts onto its GPUs. Nodes of equal load
    are no end in themselves, since a node must also split its load among its GPUs: the greedy packing of groups is tried
    beside the searched one."""
    load_of_group = load_E.reshape(n_groups, -1).sum(1)
    packings = [place(load_of_group, n_nodes, n_groups // n_nodes)]
    if 1 < n_nodes < n_groups:
        packings.append(np.sort(pack_greedily(load_of_group, n_nodes, n_groups // n_nodes), axis=1))
        packings = packings[:1] if (packings[0] == packings[1]).all() else packings
    found = [_fill_nodes(load_E, n_groups, groups, n_gpus // n_nodes, n_slots // n_gpus) for groups in packings]
    return min(found, key=lambda gpus: busiest_load(load_E, gpus)).ravel()


def _fill_nodes(load_E: np.ndarray, n_groups: int, groups_of_node: np.ndarray, n_gpus: int, slots: int) -> np.ndarray:
    """(GPUs of all nodes, slots) int64 experts, each node's groups packed onto its ``n_gpus`` GPUs."""
    expert_Ge = np.arange(len(load_E)).reshape(n_groups, -1)
    nodes = [expert_Ge[groups].ravel() for groups in groups_of_node]
    return np.concatenate([experts[place(load_E[experts], n_gpus, slots)] for experts in nodes])


def invert(slot_to_expert: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """From ``slot_to_expert`` (L, n_slots) int64: expert_to_slots (L, E, R), padded with -1, and replicas (L, E)."""
    layers, n_slots = slot_to_expert.shape
    replicas = slot_to_expert.new_zeros(layers, n_experts)
    replicas.scatter_add_(1, slot_to_expert, torch.ones_like(slot_to_expert))
    slots = slot_to_expert.argsort(dim=1, stable=True)  # grouped by expert, each expert's slots ascending
    expert = slot_to_expert.gather(1, slots)
    first = replicas.cumsum(1) - replicas
    rank = torch.arange(n_slots, device=slots.device) - first.gather(1, expert)
    layer = torch.arange(layers, device=slots.device)[:, None].expand_as(slots)
    expert_to_slots = slots.new_full((layers, n_experts, int(replicas.max())), -1)
    expert_to_slots[layer, expert, rank] = slots
    return expert_to_slots, replicas


def check_load(load: Tensor) -> Tensor:
    """``load`` if it is (L, E), real, finite and nowhere negative; else ValueError."""
    if not isinstance(load, Tensor):
        raise ValueError(f"load is a {type(load).__name__}: allowed is a tensor of shape (L, E)")
    if load.dim() != 2 or load.numel() == 0:
        raise ValueError(f"load has shape {tuple(load.shape)}: allowed is (L, E), at least one layer and one expert")
    if load.dtype == torch.bool or load.is_complex():
        raise ValueError(f"load has dtype {load.dtype}: allowed are integers and floating point numbers")
    good = load.isfinite() & (load >= 0)
    if not good.all():
        layer, expert = (~good).nonzero()[0].tolist()
        raise ValueError(f"load[{layer}, {expert}]={load[layer, expert].item()}: allowed are finite numbers from 0 up")
    return load.detach()


def check_positive(**sizes: int) -> None:
    """ValueError for the first of ``sizes`` that is not an integer of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: allowed is an integer of at least 1")


def _check_sizes(n_experts: int, n_slots: int, n_groups: int, n_nodes: int, n_gpus: int) -> None:
    check_positive(n_slots=n_slots, n_groups=n_groups, n_nodes=n_nodes, n_gpus=n_gpus)
    if n_slots < n_experts:
        raise ValueError(f"n_slots={n_slots}: allowed is at least the number of experts, {n_experts}")
    if n_slots % n_gpus:
        raise ValueError(f"n_slots={n_slots}: allowed are multiples of n_gpus={n_gpus}")
    if n_experts % n_groups:
        raise ValueError(f"n_groups={n_groups}: allowed are divisors of the number of experts, {n_experts}")
    if n_gpus % n_nodes:
        raise ValueError(f"n_gpus={n_gpus}: allowed are multiples of n_nodes={n_nodes}")
