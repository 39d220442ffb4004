"""Two hops: a token crosses to each node once, and is copied to the GPUs there [V3 section 3.2.2].

The problem: nodes talk over InfiniBand at 50 GB/s, the GPUs of a node over NVLink at 160. A token with experts on three
GPUs of another node would cross InfiniBand three times in a flat all-to-all. Here it crosses once:

    1. over InfiniBand to the GPU of the same number on each node that it wants, one row a node
    2. over NVLink from there to the GPUs that hold its experts, one row a GPU

and back the same way: a GPU adds up its experts' results, the GPU where the token arrived adds up its node's, and one row a
node goes home, where they are added up. So InfiniBand carries at most M = topk_group rows a token (4 in V3), however many
experts it has on each node; with 3.2 experts a node both wires are busy alike (nodes.py).

In FP8 the row is forwarded as it came: a number q 2^e of the first hop is quantised to the same q and e in the second.
Results are BF16 on both wires, and added up in FP32 where they meet.

Rows that stay on a GPU, and the first hop of tokens that want their own node, cost no wire; `Tally` counts them as "here".

Shapes: as in dispatch.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minids.parallel.dispatch import Arrived, Hop, Wire, dispatch, wanted_peers
from minids.parallel.peers import Peers, Tally


class TwoHopDispatch:
    """``across``: the GPUs of the same number on all nodes of the expert group; ``inside``: the group's GPUs on my node.
    A node has E / nodes experts in order, a GPU its share of them."""

    def __init__(self, across: Peers, inside: Peers, n_experts: int, wire: Wire | None = None):
        self.across, self.inside, self.wire, self.tally = across, inside, wire or Wire(), Tally()
        self.per_node = n_experts // across.size
        self.per_gpu = self.per_node // inside.size

    def send(self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor) -> Arrived:
        """x (N, D), gate values (N, K) float32 and experts (N, K) int64 -> the rows for this GPU's experts."""
        nodes_NP = wanted_peers(experts_NK, 0, self.per_node, self.across.size)
        first = Hop.plan(nodes_NP, self.across, self.tally, "node")
        x, gates, experts = self._hop(first, x_ND, gates_NK, experts_NK)
        here = self.across.rank * self.per_node
        gpus_RP = wanted_peers(experts, here, self.per_gpu, self.inside.size)
        second = Hop.plan(gpus_RP, self.inside, self.tally, "gpu")
        x, gates, experts = self._hop(second, x, gates, experts)
        return Arrived(x, gates, experts, [first, second], self.wire)

    def _hop(self, hop: Hop, x: Tensor, gates: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gates_RK = dispatch(x, gates.index_select(0, hop.source_S), hop, self.wire)
        labels = experts.index_select(0, hop.source_S).to(torch.int32)
        return x, gates_RK, hop.there(labels, "experts").long()
