"""Dispatch and combine against loops over tokens and experts, on threads: values, gradients, what crosses which wire."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.fp8.dispatch import pack
from minids.fp8.dispatch import row_bytes as fp8_row_bytes
from minids.fp8.quantize import BLOCK, dequantize, quantize_tile
from minids.parallel import dispatch, timing
from minids.parallel.dispatch import Hop, Wire, decode, encode, row_bytes, sum_rows
from minids.parallel.experts import ROADS, build_road
from minids.parallel.mesh import Layout, run_on_threads
from minids.parallel.nodes import count_copies, nodes_reached
from minids.parallel.peers import Tally


def draw(tokens: list[int], k: int, e: int, d: int, seed: int, dtype=torch.float64) -> list[tuple]:
    """(x, gates, experts) of each rank."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, d, generator=generator, dtype=dtype), torch.rand(n, k, generator=generator),
             torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(n)]) if n else
             torch.empty(0, k, dtype=torch.int64)) for n in tokens]  # fmt: skip


def expert_matrices(e: int, d: int) -> torch.Tensor:
    return torch.randn(e, d, d, generator=torch.Generator().manual_seed(e), dtype=torch.float64)


def by_loops(x, gates, experts, matrices):
    """sum_k g_k A_k x, token by token."""
    out = [sum(g.double() * (matrices[e] @ row) for g, e in zip(gs, es, strict=True))
           for row, gs, es in zip(x, gates, experts.tolist(), strict=True)]  # fmt: skip
    return torch.stack(out) if out else x.new_zeros(x.shape)


def travel(mesh, kind, e, matrices, mine, wire=None, gradient=None):
    """One layer on one rank: rows go, the rank's own matrices multiply them, results come back."""
    road = build_road(mesh, e, kind, wire)
    x, gates = mine[0].clone().requires_grad_(), mine[1].clone().requires_grad_()
    arrived = road.send(x, gates, mine[2])
    held, rows = mesh.experts(e), []
    for row, gs, es in zip(arrived.x_RD, arrived.gates_RK, arrived.experts_RK.tolist(), strict=True):
        there = [g.to(x.dtype) * (matrices[i].to(x.dtype) @ row) for g, i in zip(gs, es, strict=True) if i in held]
        assert there, "a row came here that no expert of this rank wants"
        rows.append(sum(there))
    y = torch.stack(rows) if rows else arrived.x_RD + 0 * arrived.gates_RK.sum()
    out = arrived.back(y)
    out.backward(torch.ones_like(out) if gradient is None else gradient)
    return {"out": out.detach(), "dx": x.grad, "dg": gates.grad, "tally": road.tally, "arrived": arrived}


cases = st.tuples(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (6, 2)]), st.integers(1, 2), st.integers(1, 3),
                  st.lists(st.integers(0, 4), min_size=6, max_size=6), st.integers(1, 4), st.integers(0, 99))  # fmt: skip


@settings(max_examples=25)
@given(cases, st.sampled_from(ROADS))
def test_all_roads_compute_the_sum_over_experts_and_its_gradients(case, kind):
    (ep, gpus), replicas, each, tokens, k, seed = case
    layout, e = Layout(ep * replicas, ep, gpus_per_node=gpus), ep * each
    k = min(k, e)
    ranks, matrices = draw((tokens * 2)[: layout.world], k, e, 3, seed), expert_matrices(e, 3)
    found = run_on_threads(layout, lambda mesh: travel(mesh, kind, e, matrices, ranks[mesh.rank]))
    for one, (x, gates, experts) in zip(found, ranks, strict=True):
        x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
        want = by_loops(x, gates, experts, matrices)
        torch.testing.assert_close(one["out"], want.detach(), rtol=1e-12, atol=1e-12)
        if len(x):
            want.sum().backward()
            torch.testing.assert_close(one["dx"], x.grad, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(one["dg"], gates.grad, rtol=1e-5, atol=1e-5)  # gate values are float32


@settings(max_examples=25)
@given(cases)
def test_rows_and_bytes_are_those_of_the_closed_forms(case):
    (ep, gpus), replicas, each, tokens, k, seed = case
    layout, e, d = Layout(ep * replicas, ep, gpus_per_node=gpus), ep * each, 5
    k = min(k, e)
    tokens = [n + 1 for n in (tokens * 2)[: layout.world]]
    ranks, matrices = draw(tokens, k, e, d, seed), expert_matrices(e, d)
    indices = torch.cat([experts for _, _, experts in ranks])
    home = torch.cat([torch.full((n,), rank % ep) for rank, n in enumerate(tokens)])
    copies, n = count_copies(indices, e, layout.nodes, ep, home), len(indices)
    total = {kind: Tally.sum([one["tally"] for one in run_on_threads(
        layout, lambda mesh, kind=kind: travel(mesh, kind, e, matrices, ranks[mesh.rank]))]) for kind in ROADS}  # fmt: skip
    assert total["flat"].total("dispatch")[0] == n * k
    away = (indices // (e // layout.nodes)) != (home // layout.gpus)[:, None]
    assert total["flat"].total("dispatch", "ib")[0] == int(away.sum())
    assert total["once"].total("dispatch", "ib")[0] == int(copies.ib_flat.sum())
    assert total["two_hop"].total("dispatch", "ib")[0] == int(copies.ib.sum())
    assert total["two_hop"].total("dispatch", "nvlink")[0] == int(copies.nvlink.sum())
    assert total["two_hop"].total("dispatch", hop="node")[0] == int(nodes_reached(indices, e, layout.nodes).sum())
    for tally in total.values():
        for what in ("dispatch", "combine", "dispatch backward", "combine backward"):
            for link in ("ib", "nvlink", "here"):
                crossed = tally.total("dispatch", link)[0]
                assert tally.total(what, link) == (crossed, crossed * 8 * d)


def test_64_tokens_of_4_experts_on_two_nodes():
    """The hand-sized figure: 256 rows flat; with two hops one a token and node, 122 for this draw."""
    layout, e, d = Layout(4, 4, gpus_per_node=2), 16, 4
    ranks, matrices = draw([16] * 4, 4, e, d, seed=7), expert_matrices(e, d)
    indices = torch.cat([experts for _, _, experts in ranks])
    rows = {}
    for kind in ("flat", "two_hop"):
        found = run_on_threads(layout, lambda mesh, kind=kind: travel(mesh, kind, e, matrices, ranks[mesh.rank]))
        total = Tally.sum([one["tally"] for one in found])
        rows[kind] = total.total("dispatch", hop="flat" if kind == "flat" else "node")[0]
    assert rows == {"flat": 256, "two_hop": int(nodes_reached(indices, e, 2).sum())}
    assert rows["two_hop"] == 122


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_of_rows_equal_loops_and_are_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    y, source = torch.randn(40, 24, generator=generator).to(dtype), torch.randint(0, 9, (40,), generator=generator)
    source[source == 4] = 5  # nobody sends for token 4
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = torch.stack([sum((y[s].to(wide) for s in range(40) if source[s] == i), torch.zeros(24, dtype=wide))
                        for i in range(10)]).to(dtype)  # fmt: skip
    torch.testing.assert_close(sum_rows(y, source, 10), want, rtol=1e-6 if dtype != torch.bfloat16 else 0, atol=1e-6)
    assert not sum_rows(y, source, 10)[4].any() and sum_rows(y[:0], source[:0], 3).shape == (3, 24)


def test_v3_rows_on_the_wire():
    assert row_bytes(7168, "fp8", 2) == 7168 + 56 + 8 and row_bytes(7168, "bf16", 4) == row_bytes(7168, "exact", 2) == 14336


# ---- FP8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 256), (1, 130), (0, 128), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rows_are_those_of_the_reference_and_come_back_exactly(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    rows = encode(x, "fp8")
    packed = pack(x)
    assert packed.shape[1] == fp8_row_bytes(shape[1]) and torch.equal(rows[:, : packed.shape[1]], packed)
    assert rows.shape[1] == row_bytes(shape[1], "fp8", 1) and rows.shape[1] % 16 == 0
    assert 0 <= rows.shape[1] - packed.shape[1] < 16 and not rows[:, packed.shape[1] :].any()
    if shape[0]:
        want = dequantize(*quantize_tile(x, scale="ue8m0"), (1, BLOCK), dtype)
        assert torch.equal(decode(rows, "fp8", shape[1], dtype), want)
        again = decode(encode(want, "fp8"), "fp8", shape[1], dtype)
        assert torch.equal(again, want), "the second hop quantises to the same numbers"


@pytest.mark.parametrize("kind", dispatch.KINDS)
def test_a_gradient_without_rows_may_be_expanded(kind):
    """What sum().backward() gives to a rank without tokens: strides of 0, which torch calls contiguous."""
    rows = encode(torch.ones(()).expand(0, 256), kind)
    assert rows.shape == (0, row_bytes(256, kind, 4)) and rows.dtype == torch.uint8
    assert decode(rows, kind, 256, torch.float32).shape == (0, 256)


def test_a_tile_that_is_not_finite_arrives_as_nan():
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = torch.inf, torch.nan
    found = decode(encode(x, "fp8"), "fp8", 256, torch.float32)
    assert found[0, :128].isnan().all() and found[1, 128:].isnan().all()
    assert (found[0, 128:] == 1).all() and (found[1, :128] == 1).all()


@pytest.mark.parametrize("kind", ROADS)
def test_fp8_there_bf16_back_and_the_gradients_alike(kind):
    """Every expert is the identity with gate 1, so that what comes home is K roundings of x, and of the gradient."""
    layout, e, k, d = Layout(4, 4, gpus_per_node=2), 8, 2, 256
    ranks = [(x.float(), torch.ones_like(g), i) for x, g, i in draw([6, 1, 0, 9], k, e, d, seed=1)]
    identity = torch.eye(d, dtype=torch.float64).expand(e, d, d)
    gradients = [torch.randn(x.shape, generator=torch.Generator().manual_seed(r)) for r, (x, _, _) in enumerate(ranks)]
    found = run_on_threads(layout, lambda mesh: travel(mesh, kind, e, identity, ranks[mesh.rank], Wire.v3(),
                                                       gradients[mesh.rank]))  # fmt: skip
    for one, (x, _, _), gradient in zip(found, ranks, gradients, strict=True):
        if len(x):
            rounded, turned = (decode(encode(t, "fp8"), "fp8", d, torch.float32) for t in (x, gradient))
            # E4M3 numbers with a power of two, once or twice: BF16 holds them, and their sums to a rounding.
            torch.testing.assert_close(one["out"], k * rounded, rtol=2**-8, atol=0)
            torch.testing.assert_close(one["dx"], k * turned, rtol=2**-8, atol=0)
            assert not torch.equal(one["out"], k * x)
    total = Tally.sum([one["tally"] for one in found])
    for what, size in (("dispatch", 272), ("combine backward", 272), ("combine", 2 * d), ("dispatch backward", 2 * d)):
        rows, sent = total.total(what)
        assert rows > 0 and sent == rows * size, what


def test_two_hops_bring_the_very_numbers_that_one_brings():
    layout, e, k, d = Layout(8, 8, gpus_per_node=2), 16, 4, 130
    ranks, matrices = draw([5] * 8, k, e, d, seed=3, dtype=torch.float32), expert_matrices(e, d)
    rows = {}
    for kind in ROADS:
        found = run_on_threads(
            layout, lambda mesh, kind=kind: travel(mesh, kind, e, matrices, ranks[mesh.rank], Wire("fp8")))
        rows[kind] = [{tuple(row) for row in one["arrived"].x_RD.tolist()} for one in found]
    assert rows["flat"] == rows["once"] == rows["two_hop"] and any(map(len, rows["flat"]))


# ---- mistakes ------------------------------------------------------------------------------------------------------


def run_all(kind="two_hop"):
    layout, e = Layout(4, 4, gpus_per_node=2), 8
    ranks, matrices = draw([5, 3, 4, 6], 3, e, 3, seed=2), expert_matrices(e, 3)
    found = run_on_threads(layout, lambda mesh: travel(mesh, kind, e, matrices, ranks[mesh.rank]))
    apart = [float((one["out"] - by_loops(*mine, matrices)).abs().max()) for one, mine in zip(found, ranks, strict=True)]
    return max(apart)


def test_a_wrong_inverse_permutation_is_seen(monkeypatch):
    assert run_all() < 1e-12
    monkeypatch.setattr(dispatch, "sum_rows", lambda y, source, n, real=dispatch.sum_rows: real(y, source.flip(0), n))
    assert run_all() > 0.1


def test_rows_in_another_order_than_announced_are_seen(monkeypatch):
    real = Hop.of_rows.__func__

    def shuffled(cls, source_S, peer_S, *rest):
        return real(cls, source_S.roll(1), peer_S, *rest)

    monkeypatch.setattr(Hop, "of_rows", classmethod(shuffled))
    assert run_all("flat") > 0.1


@pytest.mark.parametrize("road", ROADS)
def test_timing_counts_what_leaves_a_rank_and_checks_before_it_times(road, monkeypatch):
    layout, cpu = Layout(4, 4, gpus_per_node=2), torch.device("cpu")
    found = run_on_threads(layout, lambda mesh: timing.measure(mesh, road, "FP8 there", 16, 256, cpu, rounds=1))
    for rank, one in enumerate(found):
        experts = timing.routed(16, 256, 4, rank, cpu)[2]
        copies = count_copies(experts, 256, 2, 4, torch.full((16,), rank))
        away = int((experts // 64 != rank).sum())
        other_gpus = sum(len(set(row) - {rank}) for row in (experts // 64).tolist())
        if road == "two_hop":  # the second hop's rows are of everybody's tokens
            assert one.rows >= int(copies.ib.sum())
        else:
            assert one.rows == {"flat": away, "once": other_gpus}[road]
            assert one.bytes_there == one.rows * (256 + 2 + 14)
        assert min(one.dispatch, one.combine, one.wire_there, one.wire_back) > 0
    assert sum(one.bytes_back for one in found) == sum(one.rows for one in found) * 2 * 256
    monkeypatch.setattr(dispatch, "sum_rows", lambda y, source, n, real=dispatch.sum_rows: 2 * real(y, source, n))
    with pytest.raises(RuntimeError, match="tokens came home changed"):
        run_on_threads(layout, lambda mesh: timing.measure(mesh, road, "BF16", 16, 256, cpu, rounds=1))


@pytest.mark.parametrize("call, message", [
    (lambda: Wire("fp4"), "dispatch='fp4': allowed are exact, bf16, fp8"),
    (lambda: Wire(combine="int8"), "combine='int8': allowed are exact, bf16, fp8"),
    (lambda: run_on_threads(Layout(2, 2), lambda mesh: build_road(mesh, 8, "three_hop")), "dispatch='three_hop': allowed"),
    (lambda: run_on_threads(Layout(4, 4), lambda mesh: build_road(mesh, 6)), "ep=4: allowed are divisors of n_experts=6"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
