"""Node-limited routing: nodes and copies by loops over tokens, the closed forms by enumeration and simulation."""

import itertools
from fractions import Fraction

import pytest
import torch

from minids import ModelConfig
from minids.parallel.eplb import rebalance_experts
from minids.parallel.nodes import (
    Copies,
    combine_bytes,
    count_copies,
    dispatch_bytes,
    expected_nodes,
    experts_at_same_cost,
    node_probabilities,
    node_shares,
    nodes_reached,
    simulate_routing,
    traffic,
    visited,
)


def random_indices(n, e, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(n)])


def test_nodes_reached_by_hand():
    indices = torch.tensor([[0, 1, 2], [0, 4, 8], [3, 4, 5]])  # nodes of 4 experts each
    assert nodes_reached(indices, 12, 3).tolist() == [1, 3, 2]
    assert node_shares(torch.tensor([1, 3, 2, 2]), 3).tolist() == [0, 0.25, 0.5, 0.25]


@pytest.mark.parametrize("e, k, nodes", [(8, 3, 4), (6, 2, 3), (9, 4, 3), (6, 6, 2), (5, 3, 1), (6, 4, 6)])
def test_probabilities_equal_enumeration(e, k, nodes):
    counts = [0] * (nodes + 1)
    for chosen in itertools.combinations(range(e), k):
        counts[len({i // (e // nodes) for i in chosen})] += 1
    exact = [float(Fraction(c, sum(counts))) for c in counts]
    assert node_probabilities(e, k, nodes) == pytest.approx(exact, abs=1e-14)


def test_expectation_is_that_of_one_node_times_nodes():
    missed = 1.0
    for i in range(8):  # none of 8 draws hits the 32 experts of a node
        missed *= (224 - i) / (256 - i)
    assert expected_nodes(256, 8, 8) == pytest.approx(8 * (1 - missed), rel=1e-12)
    assert round(expected_nodes(256, 8, 8), 2) == 5.29
    assert sum(node_probabilities(256, 8, 8)) == pytest.approx(1, abs=1e-12)


def test_simulated_router_agrees_with_the_closed_form_and_keeps_its_limit():
    cfg, n = ModelConfig.preset("v3"), 20_000
    free = nodes_reached(simulate_routing(cfg, n, limited=False), 256, 8)
    expected = torch.tensor(node_probabilities(256, 8, 8), dtype=torch.float64)
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((node_shares(free, 8) - expected).abs() <= 5 * sigma + 1e-9 * (sigma == 0)).all()
    assert free.max() > 4
    limited = nodes_reached(simulate_routing(cfg, n), 256, 8)
    assert limited.max() == 4 and limited.double().mean() < free.double().mean()


def count_by_loops(row, e, n_nodes, n_gpus, home):
    per_node, ib, nvlink, flat = n_gpus // n_nodes, 0, 0, 0
    targets = {i // (e // n_gpus) for i in row}
    for node in {t // per_node for t in targets}:
        away = home is None or node != home // per_node
        ib += away
        arrival = None if home is None else node * per_node + home % per_node
        for gpu in targets:
            if gpu // per_node == node:
                nvlink += gpu != arrival
                flat += away
    return ib, nvlink, flat


@pytest.mark.parametrize("e, k, n_nodes, n_gpus", [(16, 4, 4, 8), (16, 6, 2, 16), (24, 8, 3, 6), (8, 2, 1, 4)])
@pytest.mark.parametrize("at_home", [True, False])
def test_copies_equal_loops_over_tokens(e, k, n_nodes, n_gpus, at_home):
    indices = random_indices(200, e, k)
    home = torch.arange(200) % n_gpus if at_home else None
    copies = count_copies(indices, e, n_nodes, n_gpus, home)
    for t in range(200):
        want = count_by_loops(indices[t].tolist(), e, n_nodes, n_gpus, int(home[t]) if at_home else None)
        assert (int(copies.ib[t]), int(copies.nvlink[t]), int(copies.ib_flat[t])) == want
    assert (copies.ib <= copies.ib_flat).all(), "two hops never send more over InfiniBand"


def test_bytes_of_a_v3_token():
    assert dispatch_bytes(7168) == 7168 + 56 * 4
    assert dispatch_bytes(130) == 130 + 2 * 4  # a cut tile has a scale too
    assert combine_bytes(7168) == 14336


def test_a_token_on_four_nodes_with_3_2_experts_each_keeps_both_wires_busy():
    """[V3 3.2.2] 13 experts on 4 nodes cost what 8 cost."""
    assert experts_at_same_cost(1) == 3.2
    assert experts_at_same_cost(4) == 12.8 and round(experts_at_same_cost(4)) == 13
    ones = torch.ones(5, dtype=torch.int64)
    balanced = traffic(Copies(5 * ones, 16 * ones, 16 * ones), 7168)  # 5 nodes: 16 experts exactly
    assert balanced.ib_seconds == pytest.approx(balanced.nvlink_seconds, rel=1e-12)
    v3, more = (traffic(Copies(4 * ones, n * ones, n * ones), 7168) for n in (8, 12))
    assert v3.seconds == more.seconds == v3.ib_seconds
    beyond = traffic(Copies(4 * ones, 13 * ones, 13 * ones), 7168)  # 12.8 rounded up costs 1.6% more, exactly
    assert beyond.seconds / v3.seconds == pytest.approx(13 / 12.8, rel=1e-12)
    assert traffic(Copies(4 * ones, 8 * ones, 8 * ones), 7168, two_hops=False).seconds == pytest.approx(2 * v3.seconds)
    assert v3.ib_bytes == 4 * (7392 + 14336)


def test_hierarchical_placement_keeps_the_limit_and_global_breaks_it():
    """Experts of one group stay on one node; so does a limited token. The global placement spreads every group."""
    cfg = ModelConfig.preset("toy", n_routed_experts=32, n_group=8, topk_group=2, num_experts_per_tok=4)
    indices = simulate_routing(cfg, 500)
    load = torch.bincount(indices.flatten(), minlength=32)[None] ** 2
    reached = {}
    for name, groups in (("hierarchical", 8), ("global", 1)):
        slot_to_expert, expert_to_slots, _ = rebalance_experts(load, 48, groups, 4 if groups == 8 else 1, 8)
        node_of_expert = expert_to_slots[0, :, 0] // 12  # of the first replica; nodes have 12 slots
        reached[name] = visited(node_of_expert[indices], 4, 4).sum(1)
    assert reached["hierarchical"].max() <= 2
    assert reached["global"].max() > 2


@pytest.mark.parametrize("call, message", [
    (lambda: nodes_reached(torch.zeros(2, 2, dtype=torch.int64), 8, 3), "n_parts=3: allowed are divisors of n_experts=8"),
    (lambda: nodes_reached(torch.full((2, 2), 8), 8, 2), "indices holds 8 to 8: allowed is 0 to 7"),
    (lambda: nodes_reached(torch.zeros(2, 2), 8, 2), "indices is torch.float32"),
    (lambda: nodes_reached(torch.zeros(0, 2, dtype=torch.int64), 8, 2), "N at least 1"),
    (lambda: count_copies(torch.zeros(2, 2, dtype=torch.int64), 8, 3, 8), "n_nodes=3: allowed are divisors of n_gpus=8"),
    (lambda: count_copies(torch.zeros(2, 2, dtype=torch.int64), 8, 2, 4, torch.tensor([0, 4])), "home holds 0 to 4"),
    (lambda: count_copies(torch.zeros(2, 2, dtype=torch.int64), 8, 2, 4, torch.tensor([0])), r"home has shape \(1,\)"),
    (lambda: node_probabilities(8, 9, 2), "n_chosen=9: allowed is 1 to n_experts=8"),
    (lambda: dispatch_bytes(0), "hidden=0: allowed is an integer of at least 1"),
    (lambda: simulate_routing(ModelConfig.preset("toy"), 0), "n_tokens=0"),
    (lambda: experts_at_same_cost(0), "n_nodes=0"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
