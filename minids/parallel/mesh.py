"""Layouts: which GPU does what, as data, and this process's place in one [V3 section 3.1-3.2].

The problem: 2,048 GPUs have three jobs at once. A layer's experts are spread over EP GPUs (expert parallelism), the layers
over PP (pipeline), and what is left holds copies of the same weights (data parallelism). Experts take fewer copies than
the rest of a layer, because the EP GPUs that share one set of experts read different tokens:

    data ranks      DP = world / PP          hold the same attention, norms, gate, shared expert
    expert group    EP of them               each holds E / EP experts of a layer; tokens travel between them
    replicas        DP / EP                  hold the same experts

V3: world 2048 = PP 16 x DP 128, EP 64 over 8 nodes of 8 GPUs, so 2 replicas of each expert, and 4 experts a layer and GPU.

Ranks are numbered so that neighbours are close: rank = ((pp * replicas + replica) * nodes + node) * gpus + gpu. An expert
group is EP consecutive ranks, whole nodes; expert e of E lies on rank e // (E / EP) of it, so that a routing group, E /
n_group experts in order, lies on one node if the nodes divide the groups.

Simplification: no tensor parallelism, as in V3's training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from minids.parallel.eplb import check_positive
from minids.parallel.peers import Meeting, Peers, ProcessPeers, ThreadPeers, run_threads

DIMENSIONS = ("pp", "replica", "node", "gpu")
GROUPS = ("node", "gpu", "ep", "replica", "data", "pp", "world")


class Coordinates(NamedTuple):
    """Of one rank: pipeline stage, replica of the experts, node and GPU within the expert group."""

    pp: int
    replica: int
    node: int
    gpu: int


@dataclass(frozen=True)
class Layout:
    """world = pp * replicas * ep. Raises ValueError for sizes that do not divide."""

    world: int
    ep: int = 1
    pp: int = 1
    gpus_per_node: int = 8

    def __post_init__(self):
        check_positive(world=self.world, ep=self.ep, pp=self.pp, gpus_per_node=self.gpus_per_node)
        if self.world % self.pp:
            raise ValueError(f"pp={self.pp}: allowed are divisors of world={self.world}")
        if self.dp % self.ep:
            raise ValueError(f"ep={self.ep}: allowed are divisors of world / pp = {self.dp}")
        if self.ep % self.gpus_per_node and self.gpus_per_node % self.ep:
            raise ValueError(f"ep={self.ep}: allowed are divisors and multiples of gpus_per_node={self.gpus_per_node}")

    @classmethod
    def v3(cls) -> "Layout":
        """2,048 H800s [V3 3.2]."""
        return cls(world=2048, pp=16, ep=64, gpus_per_node=8)

    @property
    def dp(self) -> int:
        """Ranks that hold the same weights but for the experts."""
        return self.world // self.pp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp // self.ep

    @property
    def gpus(self) -> int:
        """Ranks of an expert group on one node."""
        return min(self.ep, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Nodes of an expert group."""
        return self.ep // self.gpus

    @cached_property
    def grid(self) -> Tensor:
        """(pp, replicas, nodes, gpus) int64: the rank at each place."""
        return torch.arange(self.world, device="cpu").view(self.pp, self.replicas, self.nodes, self.gpus)

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank={rank}: allowed is 0 to {self.world - 1}")
        rest, gpu = divmod(rank, self.gpus)
        rest, node = divmod(rest, self.nodes)
        pp, replica = divmod(rest, self.replicas)
        return Coordinates(pp, replica, node, gpu)

    def experts(self, rank: int, n_experts: int) -> range:
        """The experts of each layer that ``rank`` holds."""
        self.check_experts(n_experts)
        at, each = self.coordinates(rank), n_experts // self.ep
        first = (at.node * self.gpus + at.gpu) * each
        return range(first, first + each)

    def holders(self, expert: int, n_experts: int, pp: int = 0) -> list[int]:
        """Ranks of pipeline stage ``pp`` that hold ``expert``, one a replica."""
        self.check_experts(n_experts)
        if not 0 <= expert < n_experts:
            raise ValueError(f"expert={expert}: allowed is 0 to {n_experts - 1}")
        return self.grid[pp].flatten(1)[:, expert // (n_experts // self.ep)].tolist()

    def check_experts(self, n_experts: int) -> None:
        check_positive(n_experts=n_experts)
        if n_experts % self.ep:
            raise ValueError(f"ep={self.ep}: allowed are divisors of n_experts={n_experts}")

    def members(self, rank: int) -> dict[str, list[int]]:
        """The groups of ``rank``, each a list of ranks in order: "node" (across nodes, GPUs of the same number), "gpu" (the
        expert group's ranks on my node), "ep" (the expert group), "replica" (same experts), "data" (same other weights),
        "pp" (the pipeline), "world"."""
        at, grid = self.coordinates(rank), self.grid
        found = {"node": grid[at.pp, at.replica, :, at.gpu], "gpu": grid[at.pp, at.replica, at.node],
                 "ep": grid[at.pp, at.replica], "replica": grid[at.pp, :, at.node, at.gpu], "data": grid[at.pp],
                 "pp": grid[:, at.replica, at.node, at.gpu], "world": grid}  # fmt: skip
        return {name: ranks.flatten().tolist() for name, ranks in found.items()}

    def per_node(self, group: str) -> int:
        """How many consecutive ranks of a group share a node."""
        return {"node": 1, "replica": 1, "pp": 1}.get(group, self.gpus)

    def device_mesh(self, device_type: str = "cpu") -> DeviceMesh:
        """A DeviceMesh of the dimensions pp, replica, node, gpu; needs ``init_process_group`` with ``world`` processes."""
        if dist.get_world_size() != self.world:
            raise ValueError(f"world={self.world}: there are {dist.get_world_size()} processes")
        return DeviceMesh(device_type, self.grid, mesh_dim_names=DIMENSIONS)


@dataclass
class Mesh:
    """One rank's place in a layout, and its peers in each group of `Layout.members`."""

    layout: Layout
    rank: int
    peers: dict[str, Peers]
    device_mesh: DeviceMesh | None = None

    @classmethod
    def connect(cls, layout: Layout, device_type: str = "cpu") -> "Mesh":
        """This process's, after ``init_process_group``. All processes call it."""
        mesh = layout.device_mesh(device_type)
        parts = {name: mesh[name] for name in ("node", "gpu", "replica", "pp")}
        parts |= {"ep": mesh["node", "gpu"]._flatten("ep"), "data": mesh["replica", "node", "gpu"]._flatten("data")}
        groups = {name: part.get_group() for name, part in parts.items()} | {"world": dist.group.WORLD}
        peers = {name: ProcessPeers(group, layout.per_node(name)) for name, group in groups.items()}
        return cls(layout, dist.get_rank(), peers, mesh)

    @classmethod
    def alone(cls) -> "Mesh":
        """One rank that holds everything, without a process group: the same code, and nothing travels."""
        return cls(Layout(1), 0, {name: ThreadPeers(Meeting(1), 0) for name in GROUPS})

    def experts(self, n_experts: int) -> range:
        """The experts of each layer that this rank holds."""
        return self.layout.experts(self.rank, n_experts)


def run_on_threads(layout: Layout, function: Callable[[Mesh], object]) -> list:
    """``function(mesh)`` for every rank of ``layout``, each a thread of this process; returns what each returned."""

    def run(rank: int, join: Callable[[Sequence[int], int], Peers]) -> object:
        groups = layout.members(rank)
        return function(Mesh(layout, rank, {name: join(groups[name], layout.per_node(name)) for name in GROUPS}))

    return run_threads(layout.world, run)
