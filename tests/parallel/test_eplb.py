"""EPLB: every placement is valid, doubles no replica that another placement would not, and is no worse than the greedy's.

The oracle is the plain greedy written with lists. It may put two replicas of an expert on one GPU, and such placements
are sometimes better than any that does not: `test_where_the_greedy_wins_...` shows by enumeration that nothing was missed.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from minids.parallel import packing
from minids.parallel.eplb import rebalance_experts
from minids.parallel.packing import pack, place, replicate


def greedy_pack(weights, n_bins, per_bin):
    """Heaviest first into the emptiest bin with room: the items of each bin."""
    bins = [[] for _ in range(n_bins)]
    totals = [0.0] * n_bins
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        best = min((b for b in range(n_bins) if len(bins[b]) < per_bin), key=lambda b: totals[b])
        bins[best].append(item)
        totals[best] += weights[item]
    return bins


def greedy(load, n_slots, n_groups, n_nodes, n_gpus):
    """The plain greedy: a list of experts for each GPU, replicas not kept apart."""
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    size, gpus = len(load) // n_groups, []
    groups = [sum(load[g * size : (g + 1) * size]) for g in range(n_groups)]
    for node in greedy_pack(groups, n_nodes, n_groups // n_nodes):
        experts = [g * size + i for g in node for i in range(size)]
        copies = dict.fromkeys(experts, 1)
        for _ in range(n_slots // n_nodes - len(experts)):
            copies[max(experts, key=lambda e: load[e] / copies[e])] += 1
        slots = [e for e in experts for _ in range(copies[e])]
        packed = greedy_pack([load[e] / copies[e] for e in slots], n_gpus // n_nodes, n_slots // n_gpus)
        gpus += [[slots[i] for i in gpu] for gpu in packed]
    return gpus


def busiest(load, gpus):
    copies = Counter(e for gpu in gpus for e in gpu)
    return max(sum(load[e] / copies[e] for e in gpu) for gpu in gpus)


def doubled(gpus):
    return any(len(set(gpu)) < len(gpu) for gpu in gpus)


def gpus_of(slot_to_expert, n_gpus):
    return slot_to_expert.view(n_gpus, -1).tolist()


def doubles_are_avoidable(n_experts, n_gpus, slots):
    """By example: GPU g takes the next `slots` experts round a circle. Where that fails, a GPU has more slots than there
    are experts, so it must repeat one."""
    example = [[(g * slots + i) % n_experts for i in range(slots)] for g in range(n_gpus)]
    assert set(itertools.chain(*example)) == set(range(n_experts))
    if doubled(example):
        assert slots > n_experts
        return False
    return True


def check_placement(load, sizes, result):
    """Everything that a single layer's placement must be, imbalance apart. Returns the experts of each GPU."""
    n_slots, n_groups, n_nodes, n_gpus = sizes
    slot_to_expert, expert_to_slots, replicas = result
    n_experts = len(load)
    assert slot_to_expert.shape == (1, n_slots) and replicas.shape == (1, n_experts)
    assert expert_to_slots.shape == (1, n_experts, int(replicas.max()))
    assert {t.dtype for t in result} == {torch.int64}
    row = slot_to_expert[0].tolist()
    slots_of = [[s for s in range(n_slots) if row[s] == e] for e in range(n_experts)]
    assert sum(map(len, slots_of)) == n_slots and min(map(len, slots_of)) >= 1
    assert replicas[0].tolist() == [len(slots) for slots in slots_of]
    for row, slots in zip(expert_to_slots[0].tolist(), slots_of, strict=True):
        assert row == slots + [-1] * (len(row) - len(slots))
    gpus = gpus_of(slot_to_expert, n_gpus)
    scope = 1 if n_groups % n_nodes else n_nodes
    if scope > 1:
        per_node, size = n_gpus // n_nodes, n_experts // n_groups
        homes = [{s // (n_slots // n_nodes) for e in range(g * size, (g + 1) * size) for s in slots_of[e]}
                 for g in range(n_groups)]  # fmt: skip
        assert all(len(home) == 1 for home in homes), "replicas of a group stay on one node"
        assert per_node * n_nodes == n_gpus
    if doubles_are_avoidable(n_experts // scope, n_gpus // scope, n_slots // n_gpus):
        assert not doubled(gpus)
        assert replicas.max() <= n_gpus // scope
    else:
        assert all(set(gpu) == set(gpus[g - g % (n_gpus // scope)]) for g, gpu in enumerate(gpus)), "GPUs of a node alike"
    return gpus


def skewed_load(rng, n):
    return [
        lambda: rng.lognormal(0, rng.uniform(0.2, 2.5), n),
        lambda: rng.zipf(1.5, n).clip(0, 10**6).astype(float),
        lambda: rng.integers(0, 5, n).astype(float),
        lambda: rng.pareto(1, n),
        lambda: np.where(rng.random(n) < 0.1, 100.0, 1.0) * rng.random(n),
    ][int(rng.integers(5))]()


def service_case(rng):
    """Sizes like a deployment's in small: several nodes, one or two spare slots a GPU, skewed loads."""
    n_nodes, per_node = int(rng.choice([1, 2, 4])), int(rng.choice([2, 4, 8]))
    n_gpus, n_groups = n_nodes * per_node, int(rng.choice([4, 8]))
    n_experts = n_groups * int(rng.choice([4, 8])) * max(1, n_gpus // 8)
    slots = -(-n_experts // n_gpus) + int(rng.integers(1, 3))
    load = rng.lognormal(0, rng.uniform(0.3, 2), n_experts)
    return load, (slots * n_gpus, n_groups, n_nodes, n_gpus)


def hostile_case(rng):
    """Anything: any number of GPUs, groups that nodes may not divide, ties, zeros, one dominating expert, many slots."""
    n_nodes = int(rng.integers(1, 4))
    n_gpus, n_groups = n_nodes * int(rng.integers(1, 6)), int(rng.integers(1, 7))
    n_experts = n_groups * int(rng.integers(1, 9))
    slots = -(-n_experts // n_gpus) + int(rng.integers(0, 5))
    return skewed_load(rng, n_experts), (slots * n_gpus, n_groups, n_nodes, n_gpus)


def solve(load, sizes):
    return rebalance_experts(torch.from_numpy(load)[None], *sizes)


def lightest_without_doubles(load, n_gpus, slots):
    """The busiest GPU's load in the best of all placements that double nothing, by trying every one."""
    sets = list(itertools.combinations(range(len(load)), slots))
    assert math.comb(len(sets) + n_gpus - 1, n_gpus) < 10**6, "too many to try"
    holds = np.array([[e in one for e in range(len(load))] for one in sets], dtype=float)
    tries = np.array(list(itertools.combinations_with_replacement(range(len(sets)), n_gpus)))
    copies = sum(holds[tries[:, g]] for g in range(n_gpus))
    tries, copies = tries[copies.min(1) > 0], copies[copies.min(1) > 0]
    share = np.array(load) / copies
    return max_over_gpus(share, holds, tries).min()


def max_over_gpus(share, holds, tries):
    return np.max([(share * holds[tries[:, g]]).sum(1) for g in range(tries.shape[1])], axis=0)


def proven_unreachable(load, sizes, gpus, target):
    """Whether no placement of the busiest node's experts that doubles nothing gets down to ``target``."""
    n_slots, n_groups, n_nodes, n_gpus = sizes
    scope = 1 if n_groups % n_nodes else n_nodes
    per_node = n_gpus // scope
    copies = Counter(e for gpu in gpus for e in gpu)
    heaviest = max(range(n_gpus), key=lambda g: sum(load[e] / copies[e] for e in gpus[g]))
    first = heaviest - heaviest % per_node
    experts = sorted(set(itertools.chain(*gpus[first : first + per_node])))
    return lightest_without_doubles([load[e] for e in experts], per_node, n_slots // n_gpus) > target


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case, cases", [(service_case, 70), (hostile_case, 190)])
def test_valid_nothing_doubled_and_no_worse_than_the_greedy(case, cases, seed):
    """1040 cases. The greedy may double replicas; where that makes it better, enumeration proves that nothing allowed is
    as good. It never happens where the greedy doubles nothing."""
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(cases):
        load, sizes = case(rng)
        gpus = check_placement(load, sizes, solve(load, sizes))
        plain = greedy(load, *sizes)
        ours, mark = busiest(load, gpus), busiest(load, plain)
        ratios.append(ours / mark if mark else 1)
        if ours > mark * (1 + 1e-9):
            assert doubled(plain)
            assert proven_unreachable(load, sizes, gpus, mark), (load.tolist(), sizes)
    assert np.mean(ratios) < 0.985  # and better on average


def test_the_ban_on_doubles_can_cost_balance():
    """The smallest example: the greedy gives 12 three replicas, two of them on one GPU, and both GPUs carry 9."""
    load, sizes = np.array([12.0, 5, 1, 0]), (6, 1, 1, 2)
    plain = greedy(load, *sizes)
    assert doubled(plain) and busiest(load, plain) == 9
    gpus = gpus_of(solve(load, sizes)[0][0], 2)
    assert not doubled(gpus)
    assert busiest(load, gpus) == lightest_without_doubles(load, 2, 3) == 9.5


def test_by_hand():
    """One expert with half the load: a copy of it on each GPU and the rest split evenly gives 4 and 4."""
    slot_to_expert, expert_to_slots, replicas = rebalance_experts(torch.tensor([[4, 1, 2, 1]]), 6, 1, 1, 2)
    gpus = gpus_of(slot_to_expert[0], 2)
    assert replicas.tolist() == [[2, 1, 2, 1]]
    assert gpus == [[0, 1, 2], [0, 2, 3]]
    assert expert_to_slots.tolist() == [[[0, 3], [1, -1], [2, 4], [5, -1]]]


def test_replicate_serves_the_heaviest_share_next():
    assert replicate(np.array([8.0, 4, 4, 1]), 7).tolist() == [3, 2, 1, 1]  # 8; then 4, 4, 4: the lowest number
    assert replicate(np.array([100.0, 1, 1]), 7, most=3).tolist() == [3, 2, 2]


def test_packing_makes_room_in_a_corner(monkeypatch):
    """9 fills one GPU, 2 + 2 + 2 the other to the last slot: both replicas of expert 4 would join 9; a 2 moves instead."""
    load, replicas = np.array([9.0, 2, 2, 2, 2]), np.array([1, 1, 1, 1, 2])
    moves = []
    real = packing._make_room
    monkeypatch.setattr(packing, "_make_room", lambda *args: moves.append(args[2]) or real(*args))
    held = pack(load, replicas, 2, 3)
    assert (held.sum(0) == replicas).all() and (held.sum(1) == 3).all()
    assert moves == [4]


def test_packing_gets_out_of_every_corner(monkeypatch):
    """Any replicas of at most one a GPU can be packed; also where several repairs are needed."""
    rng, moves = np.random.default_rng(0), []
    real = packing._make_room
    monkeypatch.setattr(packing, "_make_room", lambda *args: moves.append(args[2]) or real(*args))
    for _ in range(300):
        n_gpus, slots = int(rng.integers(2, 7)), int(rng.integers(1, 6))
        n_experts = int(rng.integers(slots, n_gpus * slots + 1))
        replicas = np.ones(n_experts, dtype=np.int64)
        while replicas.sum() < n_gpus * slots:
            replicas[rng.choice(np.flatnonzero(replicas < n_gpus))] += 1
        held = pack(rng.random(n_experts) / replicas, replicas, n_gpus, slots)
        assert (held.sum(0) == replicas).all() and (held.sum(1) == slots).all()
    assert len(moves) > 30


def test_ideal_where_copies_fill_every_gpu():
    """As many slots a GPU as experts, or more: all GPUs alike, perfectly balanced."""
    for slots in (4, 5, 9):
        found = place(np.array([50.0, 3, 2, 1]), 3, slots)
        assert (found == found[0]).all() and set(found[0].tolist()) == {0, 1, 2, 3}


def test_same_input_same_placement():
    load = torch.from_numpy(np.random.default_rng(5).lognormal(0, 1, (3, 64)))
    first, again = (rebalance_experts(load, 80, 8, 2, 16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = rebalance_experts(load[1:2], 80, 8, 2, 16)
    assert torch.equal(alone[0][0], first[0][1]), "a layer's placement does not depend on the others"
    scaled = rebalance_experts(load * 1024, 80, 8, 2, 16)
    assert torch.equal(scaled[0], first[0]), "nor on the unit of the load"


def test_prefill_unit_of_v3():
    """256 experts and 32 copies on 4 nodes of 8 GPUs, 9 slots a GPU; limited tokens then still reach few nodes."""
    load = torch.from_numpy(np.random.default_rng(1).lognormal(0, 1, (2, 256)))
    slot_to_expert, _, replicas = rebalance_experts(load, 288, 8, 4, 32)
    for layer in range(2):
        alone = rebalance_experts(load[layer : layer + 1], 288, 8, 4, 32)
        check_placement(load[layer].numpy(), (288, 8, 4, 32), alone)
        node_of_group = {}
        for slot, expert in enumerate(slot_to_expert[layer].tolist()):
            assert node_of_group.setdefault(expert // 32, slot // 72) == slot // 72
    assert replicas.sum(1).tolist() == [288, 288]


@pytest.mark.parametrize("loads", [[0.0] * 8, [1.0] * 8, [1e-300] * 8, [1e300] * 8, [0.0] * 7 + [1.0]])
def test_degenerate_loads(loads):
    load = np.array(loads)
    check_placement(load, (12, 2, 2, 4), solve(load, (12, 2, 2, 4)))


def test_integer_and_half_loads_and_no_gradient():
    exact = rebalance_experts(torch.tensor([[4, 1, 2, 1]]), 6, 1, 1, 2)
    for load in (torch.tensor([[4, 1, 2, 1]], dtype=torch.bfloat16), torch.tensor([[4.0, 1, 2, 1]], requires_grad=True)):
        assert all(torch.equal(a, b) for a, b in zip(exact, rebalance_experts(load, 6, 1, 1, 2), strict=True))


GOOD = dict(load=torch.ones(1, 8), n_slots=12, n_groups=4, n_nodes=2, n_gpus=4)


@pytest.mark.parametrize("bad, message", [
    (dict(load=[[1.0]]), "load is a list: allowed is a tensor"),
    (dict(load=torch.ones(8)), r"load has shape \(8,\): allowed is \(L, E\)"),
    (dict(load=torch.ones(0, 8)), r"load has shape \(0, 8\)"),
    (dict(load=torch.ones(1, 8, dtype=torch.bool)), "load has dtype torch.bool"),
    (dict(load=torch.tensor([[1.0] * 7 + [-2.0]])), r"load\[0, 7\]=-2.0: allowed are finite numbers from 0 up"),
    (dict(load=torch.tensor([[float("nan")] + [1.0] * 7])), r"load\[0, 0\]=nan"),
    (dict(load=torch.tensor([[float("inf")] + [1.0] * 7])), r"load\[0, 0\]=inf"),
    (dict(n_slots=4), "n_slots=4: allowed is at least the number of experts, 8"),
    (dict(n_slots=13), "n_slots=13: allowed are multiples of n_gpus=4"),
    (dict(n_slots=12.0), "n_slots=12.0: allowed is an integer of at least 1"),
    (dict(n_groups=3), "n_groups=3: allowed are divisors of the number of experts, 8"),
    (dict(n_groups=0), "n_groups=0"),
    (dict(n_nodes=3), "n_gpus=4: allowed are multiples of n_nodes=3"),
    (dict(n_gpus=True), "n_gpus=True: allowed is an integer of at least 1"),
])  # fmt: skip
def test_bad_input_is_named(bad, message):
    rebalance_experts(**GOOD)
    with pytest.raises(ValueError, match=message):
        rebalance_experts(**{**GOOD, **bad})
