"""How long dispatch and combine take on real wires, beside an all-to-all of the same bytes and nothing else.

    torchrun --nproc-per-node 8 -m minids.parallel.timing --device cuda        # V3's layer: 4,096 tokens of 7,168 numbers
    python -m minids.parallel.timing --tokens 256 --hidden 512                 # 4 processes of this machine, gloo

Each line is one way to send (dispatch.py, two_hop.py) in BF16 or with V3's FP8 there. A road is learnt, walked there and
back, and its result is checked, before anything is timed: the experts are the identity here, so each token comes home as
often as it had rows. Times are medians over rounds on rank 0, all ranks starting together:

    dispatch    plan the rows, tell everybody how many come, quantise, copy, send, and decode what came
    combine     send back and add up
    wire        the one or two all-to-alls of the very rows, there and back

What lies between the first two and the third is torch's passes over memory and the host, which waits once a hop. V3 fuses
those passes into the kernels that send.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.parallel.dispatch import Hop, Wire, row_bytes
from minids.parallel.experts import ROADS, build_road
from minids.parallel.mesh import Layout, Mesh
from minids.parallel.nodes import simulate_routing
from minids.parallel.peers import Tally
from minids.pipeline.launch import device_of, initialise, start_local
from minids.train.state import write_atomic

WIRES = {"BF16": Wire("bf16", "bf16"), "FP8 there": Wire.v3()}


@dataclass
class Timing:
    """Of one road; bytes that this rank sends to other ranks, seconds."""

    road: str
    wire: str
    rows: int  # to other ranks
    bytes_there: int
    bytes_back: int
    dispatch: float
    combine: float
    wire_there: float
    wire_back: float


def routed(tokens: int, hidden: int, ep: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D) bfloat16, gate values (N, K) and experts (N, K) as V3's router chooses among evenly distributed scores."""
    generator = torch.Generator().manual_seed(rank)
    experts = simulate_routing(ModelConfig.preset("v3"), tokens, seed=rank)
    x = torch.randn(tokens, hidden, generator=generator).to(device, torch.bfloat16)
    return x, torch.full(experts.shape, 1 / 8, device=device), experts.to(device)


def median_seconds(function: Callable[[], object], mesh: Mesh, device: torch.device, rounds: int) -> float:
    """All ranks begin together; the first two rounds do not count."""
    found = []
    for _ in range(rounds + 2):
        mesh.peers["data"].all_reduce(torch.zeros(1, device=device))
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure(mesh: Mesh, road: str, wire: str, tokens: int, hidden: int, device: torch.device, rounds: int = 10) -> Timing:
    """Times one road on all ranks. Raises RuntimeError if tokens do not come home as they should."""
    x, gates, experts = routed(tokens, hidden, mesh.layout.ep, mesh.rank, device)
    way = build_road(mesh, 256, road, WIRES[wire])
    arrived = way.send(x, gates, experts)
    back = arrived.back(arrived.x_RD)
    check_home(x, back, experts, mesh.layout, road)
    tally = Tally.sum([way.tally])
    rows, there = tally.total("dispatch", "ib", "nvlink")
    dispatch = median_seconds(lambda: way.send(x, gates, experts), mesh, device, rounds)
    combine = median_seconds(lambda: arrived.back(arrived.x_RD), mesh, device, rounds)
    there_s = median_seconds(lambda: walk(arrived.hops, hidden, way.wire.dispatch, device, True), mesh, device, rounds)
    back_s = median_seconds(lambda: walk(arrived.hops, hidden, way.wire.combine, device, False), mesh, device, rounds)
    return Timing(road, wire, rows, there, tally.total("combine", "ib", "nvlink")[1], dispatch, combine, there_s, back_s)


def walk(hops: list[Hop], hidden: int, kind: str, device: torch.device, there: bool) -> None:
    """The all-to-alls of a road, with rows of the right size and no other work."""
    width = row_bytes(hidden, kind, 2)
    for hop in hops if there else reversed(hops):
        send, receive = (hop.send, hop.receive) if there else (hop.receive, hop.send)
        hop.peers.all_to_all(torch.empty(sum(send), width, dtype=torch.uint8, device=device), send, receive)


def check_home(x: Tensor, back: Tensor, experts: Tensor, layout: Layout, road: str) -> None:
    """Each row came back unchanged but for its rounding, as often as it was sent."""
    places = experts // (256 // layout.ep)
    counts = torch.zeros(len(x), layout.ep, device=x.device).scatter_(1, places, 1.0).sum(1, keepdim=True)
    want = x.float() * (experts.shape[1] if road == "flat" else counts)
    apart = (back.float() - want).abs()
    if not bool((apart <= 2**-3 * want.abs() + 0.02).all()):  # E4M3's half a unit, 2^-4, and a BF16 sum
        raise RuntimeError(f"{road}: tokens came home changed, by up to {float(apart.max()):.3g}; nothing was timed")


def line(t: Timing) -> str:
    rate = (t.bytes_there + t.bytes_back) / (t.wire_there + t.wire_back) / 1e9
    return (f"{t.road:<9}{t.wire:<11}{t.rows:9,}{t.bytes_there / 1e6:12.1f}{t.bytes_back / 1e6:11.1f}"
            f"{1e3 * t.dispatch:13.3f}{1e3 * t.combine:12.3f}{1e3 * t.wire_there:12.3f}{1e3 * t.wire_back:11.3f}"
            f"{rate:9.1f}")  # fmt: skip


TITLE = (f"{'road':<9}{'wire':<11}{'rows':>9}{'MB there':>12}{'MB back':>11}{'dispatch ms':>13}{'combine ms':>12}"
         f"{'wire there':>12}{'wire back':>11}{'GB/s':>9}")  # fmt: skip


def run(rank: int, options: argparse.Namespace) -> None:
    """What each process does; rank 0 prints and writes."""
    device, found = device_of(options.device), []
    mesh = Mesh.connect(Layout(options.ranks, options.ranks, gpus_per_node=options.gpus_per_node), device.type)
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{options.ranks} ranks ({name}), nodes of {options.gpus_per_node}, {options.tokens} tokens of "
              f"{options.hidden} numbers a rank, 8 of 256 experts; what rank 0 sends to others, and its times\n{TITLE}",
              flush=True)  # fmt: skip
    for road in ROADS:
        for wire in WIRES:
            found.append(measure(mesh, road, wire, options.tokens, options.hidden, device, options.rounds))
            if rank == 0:
                print(line(found[-1]), flush=True)
    if rank == 0 and options.json is not None:
        write_atomic(options.json, json.dumps([asdict(one) for one in found], indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minids.parallel.timing", description=__doc__.splitlines()[0])
    sizes = {"ranks": 4, "gpus-per-node": 2, "tokens": 4096, "hidden": 7168, "rounds": 10}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    if low := [name for name in sizes if getattr(options, name.replace("-", "_")) < 1]:
        parser.error(f"--{low[0]}: allowed is a number of at least 1")
    try:
        Layout(options.ranks, options.ranks, gpus_per_node=options.gpus_per_node).check_experts(256)
    except ValueError as error:
        parser.error(str(error))
    if "RANK" in os.environ:
        with initialise(options.device):
            run(int(os.environ["RANK"]), options)
    else:
        start_local(run, options.ranks, options)


if __name__ == "__main__":
    sys.exit(main())
