"""Layouts by loops and by hand; the groups of a mesh; threads that talk, and threads that fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minids.parallel.mesh import Layout, Mesh, run_on_threads
from minids.parallel.peers import Tally


def test_v3_on_2048_gpus():
    """[V3 3.2] PP 16, EP 64 over 8 nodes, what is left is data parallelism."""
    v3 = Layout.v3()
    assert (v3.world, v3.pp, v3.dp, v3.ep, v3.nodes, v3.gpus, v3.replicas) == (2048, 16, 128, 64, 8, 8, 2)
    assert v3.experts(0, 256) == range(0, 4) and v3.experts(2047, 256) == range(252, 256)
    assert v3.holders(255, 256, pp=3) == [3 * 128 + 63, 3 * 128 + 127]
    node_of_expert = [v3.coordinates(v3.holders(e, 256)[0]).node for e in range(256)]
    assert node_of_expert == [e // 32 for e in range(256)]  # each of the 8 routing groups on one node


layouts = st.builds(
    lambda pp, replicas, nodes, gpus: Layout(pp * replicas * nodes * gpus, nodes * gpus, pp,
                                             gpus if nodes > 1 else 2 * gpus),
    *[st.integers(1, 3)] * 4)  # fmt: skip


@given(layouts)
def test_ranks_experts_and_groups_by_enumeration(layout):
    places = [(p, r, n, g) for p in range(layout.pp) for r in range(layout.replicas) for n in range(layout.nodes)
              for g in range(layout.gpus)]  # fmt: skip
    assert [tuple(layout.coordinates(rank)) for rank in range(layout.world)] == places
    n_experts = 2 * layout.ep
    for rank, (p, r, n, g) in enumerate(places):
        groups = layout.members(rank)
        alike = {"node": (p, r, None, g), "gpu": (p, r, n, None), "ep": (p, r, None, None), "replica": (p, None, n, g),
                 "data": (p, None, None, None), "pp": (None, r, n, g), "world": (None,) * 4}  # fmt: skip
        for name, pattern in alike.items():
            want = [q for q, place in enumerate(places)
                    if all(w is None or w == x for w, x in zip(pattern, place, strict=True))]  # fmt: skip
            assert groups[name] == want, name
        held = layout.experts(rank, n_experts)
        assert [e for e in range(n_experts) if rank in layout.holders(e, n_experts, p)] == list(held)


def everybody(mesh: Mesh) -> dict:
    data, mine = mesh.peers["data"], torch.arange(4.0) + 10 * mesh.rank
    send = [(mesh.rank + peer) % 3 for peer in range(data.size)]
    counts = data.exchange_counts(send, torch.device("cpu"))
    rows = torch.cat([torch.full((n, 1), 100.0 * mesh.rank + peer) for peer, n in enumerate(send)])
    return {"sum": data.all_reduce(mine.clone()), "slice": data.reduce_scatter(mine), "counts": counts,
            "all": data.all_gather(mine[:1]), "rows": data.all_to_all(rows, send, counts)}  # fmt: skip


def test_threads_have_the_collectives_of_processes():
    found = run_on_threads(Layout(4, 4, gpus_per_node=2), everybody)
    for rank, one in enumerate(found):
        assert one["sum"].tolist() == [60.0, 64.0, 68.0, 72.0]
        assert one["slice"].tolist() == [60.0 + 4 * rank]
        assert one["all"].tolist() == [0.0, 10.0, 20.0, 30.0]
        assert one["counts"] == [(peer + rank) % 3 for peer in range(4)]
        assert one["rows"].flatten().tolist() == [100.0 * p + rank for p in range(4) for _ in range((p + rank) % 3)]


def test_links_of_four_ranks_on_two_nodes():
    links = run_on_threads(Layout(4, 4, gpus_per_node=2), lambda mesh: {n: p.links for n, p in mesh.peers.items()})
    assert links[1]["ep"] == ["nvlink", "here", "ib", "ib"] and links[2]["ep"] == ["ib", "ib", "here", "nvlink"]
    assert links[3]["node"] == ["ib", "here"] and links[3]["gpu"] == ["nvlink", "here"]


def test_a_thread_that_fails_ends_all_with_its_error():
    def fail(mesh):
        if mesh.rank == 2:
            raise KeyError("rank 2")
        mesh.peers["data"].all_reduce(torch.zeros(1))

    with pytest.raises(KeyError, match="rank 2"):
        run_on_threads(Layout(4), fail)


def test_tally_sums_and_selects():
    a, b = Tally(), Tally()
    a.add("dispatch", "flat", ["here", "ib"], [2, 3], 10)
    b.add("dispatch", "flat", ["nvlink", "here"], [4, 1], 10)
    total = Tally.sum([a, b])
    assert total.total("dispatch") == (10, 100) and total.total("dispatch", "ib") == (3, 30)
    assert total.total("dispatch", "ib", "nvlink") == (7, 70) and total.total("dispatch", hop="node") == (0, 0)


def test_a_device_mesh_of_one_rank_of_2048():
    """torch's own mesh, without 2,047 others: a process group that pretends."""
    text = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from minids.parallel.mesh import Layout, Mesh
dist.init_process_group("fake", rank=1000, world_size=2048, store=FakeStore())
mesh = Mesh.connect(Layout.v3())
assert mesh.device_mesh.mesh_dim_names == ("pp", "replica", "node", "gpu") and mesh.device_mesh.shape == (16, 2, 8, 8)
members = Layout.v3().members(1000)
for name, peers in mesh.peers.items():
    assert dist.get_process_group_ranks(peers.group) == members[name], name
    assert peers.rank == members[name].index(1000) and peers.size == len(members[name])
assert list(mesh.experts(256)) == list(Layout.v3().experts(1000, 256))
print("good")
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", text], env=env, timeout=120, capture_output=True, text=True)
    assert done.stdout == "good\n", done.stderr


@pytest.mark.parametrize("call, message", [
    (lambda: Layout(6, pp=4), "pp=4: allowed are divisors of world=6"),
    (lambda: Layout(8, ep=3), "ep=3: allowed are divisors of world / pp = 8"),
    (lambda: Layout(24, ep=12, gpus_per_node=8), "ep=12: allowed are divisors and multiples of gpus_per_node=8"),
    (lambda: Layout(0), "world=0: allowed is an integer of at least 1"),
    (lambda: Layout(8, ep=8).experts(0, 12), "ep=8: allowed are divisors of n_experts=12"),
    (lambda: Layout(8).coordinates(8), "rank=8: allowed is 0 to 7"),
    (lambda: Layout(8, ep=8).holders(16, 16), "expert=16: allowed is 0 to 15"),
    (lambda: Tally().total("dispatch", "usb"), "link 'usb': allowed are here, nvlink, ib"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
