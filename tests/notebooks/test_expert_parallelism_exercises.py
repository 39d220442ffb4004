"""The checks of notebook 08's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

from fractions import Fraction

import pytest
import torch
from exercises import Lesson

NEEDED = ("from minids.parallel import eplb", "R, NODES, E, K, N, D =")  # imports, and one process' MoE layer


@pytest.fixture(scope="module")
def lesson():
    stubs = {"1": "my_rows", "2": "my_weights", "3": "my_longest", "4": "my_homes"}
    return Lesson("08_expert_parallelism", stubs, needed=NEEDED)


@pytest.mark.parametrize("number", "1234")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


# ---- 1, rows ---------------------------------------------------------------------------------------------------------


def rows(experts, home, n_experts, n_nodes, n_gpus, per_choice=False, per_gpu=False, own_node=False, own_rail=False):
    """Token by token, with sets."""
    on_node, ib, nvlink = n_gpus // n_nodes, 0, 0
    for chosen, at in zip(experts.tolist(), home.tolist(), strict=True):
        gpus = [e * n_gpus // n_experts for e in chosen]
        far = [g for g in gpus if own_node or g // on_node != at // on_node]
        ib += len(far if per_choice else set(far) if per_gpu else {g // on_node for g in far})
        nvlink += len({g for g in gpus if own_rail or g % on_node != at % on_node})
    return ib, nvlink


def test_rows(lesson, capsys):
    lesson.accepts("1", rows, capsys)


@pytest.mark.parametrize("mistake,hint", [
    ("per_choice", "not for each choice"), ("per_gpu", "not for each GPU there"), ("own_node", "own node needs no"),
    ("own_rail", "needs no NVLink"),
])  # fmt: skip
def test_wrong_rows_are_named(lesson, mistake, hint):
    lesson.refuses("1", lambda *case: rows(*case, **{mistake: True}), hint)


def test_rows_in_the_wrong_order_or_without_those_at_home_are_named(lesson):
    def far_nodes_only(experts, home, n_experts, n_nodes, n_gpus):
        ib, nvlink = rows(experts, home, n_experts, n_nodes, n_gpus)
        on_node = n_gpus // n_nodes
        for chosen, at in zip(experts.tolist(), home.tolist(), strict=True):
            gpus = {e * n_gpus // n_experts for e in chosen} - {at}
            nvlink -= sum(g // on_node == at // on_node for g in gpus)
        return ib, nvlink

    lesson.refuses("1", far_nodes_only, "in its own node a row goes over NVLink")
    lesson.refuses("1", lambda *case: rows(*case)[::-1], "first between nodes")


def test_any_other_rows_are_refused(lesson):
    lesson.refuses("1", lambda *case: (rows(*case)[0] + 1, rows(*case)[1]), "not equal")


# ---- 2, weights of losses --------------------------------------------------------------------------------------------


def shares(tokens):
    return [float(Fraction(n, sum(tokens))) for n in tokens]


def test_weights(lesson, capsys):
    lesson.accepts("2", shares, capsys)


@pytest.mark.parametrize("wrong,hint", [
    (lambda tokens: [1 / len(tokens)] * len(tokens), "short rank"),
    (lambda tokens: [1.0] * len(tokens), "sum of four means"),
    (lambda tokens: [len(tokens) * s for s in shares(tokens)], "averaged"),
    (lambda tokens: [float(n) for n in tokens], "divided by all"),
    (lambda tokens: shares(tokens)[::-1], "not the gradient"), (lambda tokens: [1.0], "a weight for each rank"),
])  # fmt: skip
def test_wrong_weights_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


# ---- 3, what hides ---------------------------------------------------------------------------------------------------


def test_the_longest_computation(lesson, capsys):
    lesson.accepts("3", min, capsys)


@pytest.mark.parametrize("wrong,hint", [
    (lambda d, c: (d + c) / 2, "in no order"), (max, "the shorter does not"), (lambda d, c: d, "combine is the shorter"),
    (lambda d, c: min(d, c) - 1, "not equal"),
])  # fmt: skip
def test_wrong_computations_are_named(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)


# ---- 4, neighbours ---------------------------------------------------------------------------------------------------


def neighbours(experts, n_experts, n_nodes):
    """Each node's first expert is any that is left; then, again and again, the one most often chosen with those there."""
    chosen = torch.zeros(len(experts), n_experts).scatter_(1, experts, 1.0)
    together, homes = chosen.T @ chosen, [-1] * n_experts
    for node in range(n_nodes):
        members = [homes.index(-1)]
        while len(members) < n_experts // n_nodes:
            left = [e for e in range(n_experts) if homes[e] < 0 and e not in members]
            members.append(max(left, key=lambda e: together[e, members].sum().item()))
        for e in members:
            homes[e] = node
    return homes


def by_load(experts, n_experts, n_nodes):
    order = torch.bincount(experts.flatten(), minlength=n_experts).argsort(descending=True).tolist()
    return [order.index(e) % n_nodes for e in range(n_experts)]


def test_neighbours(lesson, capsys):
    lesson.accepts("4", neighbours, capsys)


def swapped(experts, n_experts, n_nodes):
    homes = neighbours(experts, n_experts, n_nodes)
    pairs = [(homes.index(node), homes.index(node + 1)) for node in range(n_nodes - 1)]
    for a, b in pairs:
        homes[a], homes[b] = homes[b], homes[a]
    return homes


@pytest.mark.parametrize("wrong,hint", [
    (lambda experts, n, g: [e // (n // g) for e in range(n)], "in order"), (by_load, "in order"),
    (lambda experts, n, g: [0] * n, "8 experts a node"), (lambda experts, n, g: [0] * (n - 1), "a node for each"),
    (swapped, "is possible"),
])  # fmt: skip
def test_wrong_homes_are_named(lesson, wrong, hint):
    lesson.refuses("4", wrong, hint)
