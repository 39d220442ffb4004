"""Node-limited routing: what a token costs on the wires between GPUs [V3 sections 2.1.2 and 3.2.2].

The problem: the GPUs of a node talk over NVLink at 160 GB/s, nodes over InfiniBand at 50 GB/s, 3.2 times slower. V3 puts
each group of experts on one node and lets a token use 4 of the 8 groups. It then travels in two hops: once over IB to each
node it needs, to the GPU of the same number there, which forwards it over NVLink to the GPUs of its experts. While b bytes
cross IB to a node, NVLink can forward it to

    160 / 50 = 3.2 experts of that node in the same time, so to 4 x 3.2 = 12.8, about 13, experts at the IB cost of V3's 8.

A token goes out as FP8, one byte an element and a scale for each 128, and comes back as BF16, two bytes an element.

Without the limit a token reaches up to min(K, G) nodes. For K experts chosen evenly from E on G nodes (e = E / G each):

    E[nodes] = G (1 - C(E - e, K) / C(E, K)),
    P(n nodes) = C(G, n) sum_j (-1)^j C(n, j) C((n - j) e, K) / C(E, K)         (inclusion and exclusion)

Simplification: where no home GPU is given, every node counts as remote and every expert as behind NVLink, as in the
paper's ratio; with homes the copies that need no wire are left out.

Shapes: N tokens, K chosen, E experts, G nodes. Experts lie on nodes, and on the GPUs of a node, in order and evenly.
"""

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.model.router import Gate
from minids.parallel.eplb import check_positive

IB_BYTES_PER_SECOND = 50e9  # of a GPU's network card, each way [V3 3.2.2]
NVLINK_BYTES_PER_SECOND = 160e9  # of a GPU to its node, each way [V3 3.2.2]
SCALE_TILE, SCALE_BYTES = 128, 4  # one float32 for 128 elements of a token [V3 3.3.2]


def _even(total: str, n_total: int, part: str, n_parts: int) -> int:
    check_positive(**{total: n_total, part: n_parts})
    if n_total % n_parts:
        raise ValueError(f"{part}={n_parts}: allowed are divisors of {total}={n_total}")
    return n_total // n_parts


def visited(indices: Tensor, n_experts: int, n_parts: int) -> Tensor:
    """(N, n_parts) bool: which nodes (or GPUs: any even division of the experts) each token's ``indices`` (N, K) are on."""
    each = _even("n_experts", n_experts, "n_parts", n_parts)
    if indices.dim() != 2 or indices.dtype != torch.int64 or not len(indices):
        raise ValueError(f"indices is {indices.dtype} {tuple(indices.shape)}: allowed is int64 (N, K), N at least 1")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n_experts:
        raise ValueError(f"indices holds {int(indices.min())} to {int(indices.max())}: allowed is 0 to {n_experts - 1}")
    found = torch.zeros(len(indices), n_parts, dtype=torch.bool, device=indices.device)
    return found.scatter_(1, indices // each, True)


def nodes_reached(indices: Tensor, n_experts: int, n_nodes: int) -> Tensor:
    """(N,) int64: nodes each token is sent to. ``indices`` (N, K) is a ``Routing``'s."""
    return visited(indices, n_experts, n_nodes).sum(1)


def node_shares(reached: Tensor, n_nodes: int) -> Tensor:
    """(n_nodes + 1,) float64: entry n is the share of tokens that reach n nodes."""
    return torch.bincount(reached, minlength=n_nodes + 1).double() / len(reached)


@dataclass
class Copies:
    """How often each token is sent, one way; (N,) int64 each."""

    ib: Tensor  # over InfiniBand: nodes reached
    nvlink: Tensor  # over NVLink: GPUs to which it is forwarded
    ib_flat: Tensor  # over InfiniBand without the second hop: one copy for each GPU on another node


def count_copies(indices: Tensor, n_experts: int, n_nodes: int, n_gpus: int, home: Tensor | None = None) -> Copies:
    """Copies of each token, given its experts ``indices`` (N, K). A GPU that hosts several of them gets one copy.

    home: (N,) int64, the GPU each token starts on. Its own node then needs no IB, and on each node the GPU that the token
    arrives at (of the same number as its home) no NVLink. Without it all copies are counted.
    """
    per_node = _even("n_gpus", n_gpus, "n_nodes", n_nodes)
    gpus = visited(indices, n_experts, n_gpus).unflatten(1, (n_nodes, per_node))
    nodes = gpus.any(2)
    if home is None:
        return Copies(nodes.sum(1), gpus.sum((1, 2)), gpus.sum((1, 2)))
    if home.shape != indices.shape[:1]:
        raise ValueError(f"home has shape {tuple(home.shape)}: allowed is ({len(indices)},), one GPU a token")
    if not 0 <= int(home.min()) <= int(home.max()) < n_gpus:
        raise ValueError(f"home holds {int(home.min())} to {int(home.max())}: allowed are GPUs 0 to {n_gpus - 1}")
    token = torch.arange(len(indices), device=indices.device)
    remote = torch.ones_like(nodes)
    remote[token, home // per_node] = False
    forwarded = gpus.clone()
    forwarded[token, :, home % per_node] = False
    return Copies((nodes & remote).sum(1), forwarded.sum((1, 2)), (gpus & remote[..., None]).sum((1, 2)))


def dispatch_bytes(hidden: int) -> int:
    """Bytes of one token on its way to the experts: FP8 elements and a scale for each 128 of them."""
    check_positive(hidden=hidden)
    return hidden + -(-hidden // SCALE_TILE) * SCALE_BYTES


def combine_bytes(hidden: int) -> int:
    """Bytes of one token on its way back: BF16."""
    check_positive(hidden=hidden)
    return 2 * hidden


@dataclass
class Traffic:
    """Means over tokens, there and back."""

    ib_bytes: float
    nvlink_bytes: float

    @property
    def ib_seconds(self) -> float:
        return self.ib_bytes / IB_BYTES_PER_SECOND

    @property
    def nvlink_seconds(self) -> float:
        return self.nvlink_bytes / NVLINK_BYTES_PER_SECOND

    @property
    def seconds(self) -> float:
        """Both wires work at once, so the slower one counts."""
        return max(self.ib_seconds, self.nvlink_seconds)


def traffic(copies: Copies, hidden: int, two_hops: bool = True) -> Traffic:
    """Bytes a token and MoE layer. ``two_hops=False``: one IB copy for each remote GPU; what NVLink then carries, the
    copies within the home node, is not counted."""
    each = dispatch_bytes(hidden) + combine_bytes(hidden)
    if not two_hops:
        return Traffic(each * copies.ib_flat.double().mean().item(), 0.0)
    return Traffic(each * copies.ib.double().mean().item(), each * copies.nvlink.double().mean().item())


def experts_at_same_cost(n_nodes: int, nvlink: float = NVLINK_BYTES_PER_SECOND, ib: float = IB_BYTES_PER_SECOND) -> float:
    """How many experts a token limited to ``n_nodes`` nodes can use before NVLink takes longer than IB: 4 x 3.2 = 12.8
    for V3, which the paper rounds to 13. [V3 3.2.2]"""
    check_positive(n_nodes=n_nodes)
    return n_nodes * nvlink / ib


def expected_nodes(n_experts: int, n_chosen: int, n_nodes: int) -> float:
    """Mean nodes reached by ``n_chosen`` experts drawn evenly, without a limit: 5.29 for V3's 8 of 256 on 8 nodes."""
    return sum(n * p for n, p in enumerate(node_probabilities(n_experts, n_chosen, n_nodes)))


def node_probabilities(n_experts: int, n_chosen: int, n_nodes: int) -> list[float]:
    """Entry n: probability that ``n_chosen`` different experts drawn evenly lie on exactly n of ``n_nodes`` nodes."""
    each = _even("n_experts", n_experts, "n_nodes", n_nodes)
    check_positive(n_chosen=n_chosen)
    if n_chosen > n_experts:
        raise ValueError(f"n_chosen={n_chosen}: allowed is 1 to n_experts={n_experts}")
    draws, sets = comb(n_experts, n_chosen), [comb(n * each, n_chosen) for n in range(n_nodes + 1)]
    exactly = [sum((-1) ** j * comb(n, j) * sets[n - j] for j in range(n + 1)) for n in range(n_nodes + 1)]
    return [comb(n_nodes, n) * count / draws for n, count in enumerate(exactly)]


def simulate_routing(cfg: ModelConfig, n_tokens: int, seed: int = 0, limited: bool = True) -> Tensor:
    """(N, K) int64: experts that the router of ``cfg`` chooses for ``n_tokens`` tokens of independent, evenly distributed
    scores, with its group limit or without."""
    check_positive(n_tokens=n_tokens)
    gate = Gate(cfg if limited else cfg.replace(topk_group=cfg.n_group))
    generator = torch.Generator().manual_seed(seed)
    return gate.choose(torch.rand(n_tokens, cfg.n_routed_experts, generator=generator))
