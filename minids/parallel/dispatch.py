"""Dispatch and combine: tokens travel to their experts' GPUs, and results travel back [V3 sections 3.2.2, 3.3.3].

    dispatch   every peer that a token wants gets the token's row, with its gate values and experts
    combine    out[n] = sum over the rows that token n was sent as, of what came back for each

The two are each other's transpose. Write dispatch as a matrix S of zeros and ones, rows sent by tokens, and a permutation P
that carries rows to peers: dispatch is P S x, combine is S^T P^T y. So the backward of dispatch is a combine of gradients,
and the backward of combine is a dispatch of gradients; here each calls the other's function (``spread`` and ``gather``).

Three ways to say which rows there are:

    flat        a row for each choice: K N rows, whatever the layout
    once        a row for each GPU that holds any of a token's experts; several choices share it
    two hops    a row for each node, then one for each GPU there: two_hop.py

With a row for several choices, the expert's GPU adds their results up before it sends them back.

On the wire a row is what `Wire` says: as it is, or V3's FP8 there (1 x 128 tiles, power-of-two scales, D + D / 128 bytes
filled up to a multiple of 16: 7,232 for V3) and BF16 back, the gradients alike. Sums are made in FP32. Gate values travel
exactly, 8 bytes a choice with the expert.

Simplification: the host waits for the device once a hop, to learn how many rows come; V3's kernels learn it on the device.

Shapes: N tokens here, K chosen, E experts, S rows sent, R rows received, P peers, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.fp8 import rows as fp8_rows
from minids.parallel.peers import Peers, Tally

KINDS = ("exact", "bf16", "fp8")


@dataclass(frozen=True)
class Wire:
    """What rows are on their way: "exact" (as they are), "bf16" or "fp8". ``Wire.v3()``: FP8 there, BF16 back."""

    dispatch: str = "exact"
    combine: str = "exact"

    def __post_init__(self):
        for name in ("dispatch", "combine"):
            if getattr(self, name) not in KINDS:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(KINDS)}")

    @classmethod
    def v3(cls) -> Wire:
        return cls("fp8", "bf16")


def row_bytes(hidden: int, kind: str, itemsize: int) -> int:
    """Bytes of a row on the wire."""
    return fp8_rows.row_bytes(hidden) if kind == "fp8" else hidden * (2 if kind == "bf16" else itemsize)


def encode(x: Tensor, kind: str, source_S: Tensor | None = None) -> Tensor:
    """Rows (T, D) as bytes, (T, b) uint8; with ``source`` rows x[source], (S, b). In FP8 the same bytes as
    `minids.fp8.dispatch.pack` and zeros behind, but a tile that is not finite becomes NaN: the loss will tell."""
    if not len(x):  # torch takes a tensor without rows for contiguous, whatever its strides are
        return torch.empty(0, row_bytes(x.shape[1], kind, x.element_size()), dtype=torch.uint8, device=x.device)
    if kind == "fp8":
        return fp8_rows.pack(x, source_S)
    rows = (x.to(torch.bfloat16) if kind == "bf16" else x).contiguous().view(torch.uint8)
    return rows if source_S is None else select_rows(rows, source_S)


def decode(rows: Tensor, kind: str, hidden: int, dtype: torch.dtype) -> Tensor:
    """The numbers (T, D) of ``encode``'s rows, in ``dtype``."""
    if kind == "fp8":
        return fp8_rows.unpack(rows, hidden, dtype)
    return rows.view(torch.bfloat16 if kind == "bf16" else dtype).to(dtype)


def select_rows(rows: Tensor, source_S: Tensor) -> Tensor:
    """rows[source] of bytes, eight at a time where they divide."""
    wide = torch.int64 if rows.shape[1] % 8 == 0 else torch.uint8
    return rows.view(wide).index_select(0, source_S).view(torch.uint8)


def sum_rows(y_SD: Tensor, source_S: Tensor, n: int) -> Tensor:
    """out[i] = sum of y[s] over source[s] = i, (n, D): in FP32 at least, rounded once, in the order of s. An embedding bag
    for each token, as the sum over slots in minids/model/moe.py, but of any number of rows."""
    if not len(source_S):
        return y_SD.new_zeros(n, y_SD.shape[1])
    sorted_S, order_S = source_S.sort(stable=True)
    starts_n = torch.searchsorted(sorted_S, torch.arange(n, device=source_S.device))
    low = y_SD.is_cpu and y_SD.element_size() < 4  # there the sum itself would be BF16
    return F.embedding_bag(order_S, y_SD.float() if low else y_SD, starts_n, mode="sum").to(y_SD.dtype)


@dataclass
class Hop:
    """One all-to-all: which rows go to which peer, known to both sides, and back."""

    peers: Peers
    source_S: Tensor  # int64: the token of each row sent; rows are in the order of peers
    send: list[int]  # rows to each peer
    receive: list[int]  # rows from each peer
    n: int  # tokens here
    tally: Tally
    name: str  # of the hop, for the tally

    @classmethod
    def plan(cls, wanted_NP: Tensor, peers: Peers, tally: Tally, name: str) -> Hop:
        """``wanted`` (N, P) bool: whether a token's row goes to a peer. Tells all peers how many rows they will get; the
        host waits once, for both counts together."""
        counts_P1, ones = wanted_NP.sum(0).unsqueeze(1), [1] * peers.size
        send, receive = torch.cat([counts_P1, peers.all_to_all(counts_P1, ones, ones)], 1).t().tolist()
        source_S = torch.nonzero_static(wanted_NP.t(), size=sum(send))[:, 1].contiguous()
        return cls(peers, source_S, send, receive, len(wanted_NP), tally, name)

    @classmethod
    def of_rows(cls, source_S: Tensor, peer_S: Tensor, n: int, peers: Peers, tally: Tally, name: str) -> Hop:
        """Row s is token ``source[s]`` and goes to ``peer[s]``, in ascending order."""
        send = torch.bincount(peer_S, minlength=peers.size).tolist()
        return cls(peers, source_S, send, peers.exchange_counts(send, source_S.device), n, tally, name)

    def there(self, rows: Tensor, what: str) -> Tensor:
        """(S, ...) -> (R, ...) to the peers."""
        self._count(what, self.send, rows)
        return self.peers.all_to_all(rows, self.send, self.receive)

    def back(self, rows: Tensor, what: str) -> Tensor:
        """(R, ...) -> (S, ...) from the peers: the inverse of ``there``."""
        self._count(what, self.receive, rows)
        return self.peers.all_to_all(rows, self.receive, self.send)

    def _count(self, what: str, counts: list[int], rows: Tensor) -> None:
        self.tally.add(what, self.name, self.peers.links, counts, rows.shape[1] * rows.element_size())

    def spread(self, x_ND: Tensor, kind: str, what: str) -> Tensor:
        """(N, D) -> (R, D): each token's row to every peer that it goes to."""
        rows = self.there(encode(x_ND, kind, self.source_S), what)
        return decode(rows, kind, x_ND.shape[1], x_ND.dtype)

    def gather(self, y_RD: Tensor, kind: str, what: str) -> Tensor:
        """(R, D) -> (N, D): the sum of what comes back for each token. The transpose of ``spread``."""
        rows = self.back(encode(y_RD, kind), what)
        return sum_rows(decode(rows, kind, y_RD.shape[1], y_RD.dtype), self.source_S, self.n)


class _Dispatch(torch.autograd.Function):
    """Rows and gate values together, so that every rank's backward makes its calls in the same order."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, gates_SK: Tensor, hop: Hop, wire: Wire):
        ctx.hop, ctx.wire = hop, wire
        return hop.spread(x_ND, wire.dispatch, "dispatch"), hop.there(gates_SK, "gates")

    @staticmethod
    def backward(ctx, dx_RD: Tensor, d_gates_RK: Tensor):
        hop, wire = ctx.hop, ctx.wire
        return hop.gather(dx_RD, wire.combine, "dispatch backward"), hop.back(d_gates_RK, "gates backward"), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD: Tensor, hop: Hop, wire: Wire) -> Tensor:
        ctx.hop, ctx.wire = hop, wire
        return hop.gather(y_RD, wire.combine, "combine")

    @staticmethod
    def backward(ctx, d_ND: Tensor):
        return ctx.hop.spread(d_ND, ctx.wire.dispatch, "combine backward"), None, None


def dispatch(x_ND: Tensor, gates_SK: Tensor, hop: Hop, wire: Wire) -> tuple[Tensor, Tensor]:
    """Rows (R, D) and gate values (R, K) as the peers receive them, differentiable in both. ``gates``: float32, a row for
    each row sent."""
    return _Dispatch.apply(x_ND, gates_SK, hop, wire)


def combine(y_RD: Tensor, hop: Hop, wire: Wire) -> Tensor:
    """(N, D): for each token the sum of what its rows' peers send back, differentiable."""
    return _Combine.apply(y_RD, hop, wire)


@dataclass
class Arrived:
    """Rows that this GPU's experts have to work on, and the way back."""

    x_RD: Tensor
    gates_RK: Tensor  # float32, differentiable
    experts_RK: Tensor  # int64 of all E; those that another GPU holds are not this one's to compute
    hops: list[Hop]  # that they came by, in order
    wire: Wire

    def back(self, y_RD: Tensor) -> Tensor:
        """(R, D) -> (N, D) at home: sums over each token's rows, hop by hop."""
        for hop in reversed(self.hops):
            y_RD = combine(y_RD, hop, self.wire)
        return y_RD


def wanted_peers(experts_NK: Tensor, first: int, each: int, peers: int) -> Tensor:
    """(N, P) bool: peer p holds any of a token's experts, where p has those from first + p * each on. Experts outside of
    all peers' count for none."""
    place = torch.div(experts_NK - first, each, rounding_mode="floor")
    place = place.where((place >= 0) & (place < peers), peers)
    found = torch.zeros(len(place), peers + 1, dtype=torch.bool, device=place.device)
    return found.scatter_(1, place, True)[:, :peers]


class FlatDispatch:
    """One all-to-all over the whole expert group. ``once``: a row for each GPU, else one for each choice."""

    def __init__(self, peers: Peers, n_experts: int, once: bool = False, wire: Wire | None = None):
        self.peers, self.once, self.wire, self.tally = peers, once, wire or Wire(), Tally()
        self.each = n_experts // peers.size

    def send(self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor) -> Arrived:
        """x (N, D), gate values (N, K) float32 and experts (N, K) int64 -> the rows for this GPU's experts."""
        n, k = experts_NK.shape
        if self.once:
            wanted_NP = wanted_peers(experts_NK, 0, self.each, self.peers.size)
            hop = Hop.plan(wanted_NP, self.peers, self.tally, "flat")
            label_S = hop.source_S
        else:
            gates_NK, experts_NK = gates_NK.reshape(-1, 1), experts_NK.reshape(-1, 1)
            peer_S, label_S = (experts_NK.squeeze(1) // self.each).sort(stable=True)
            hop = Hop.of_rows(label_S.div(k, rounding_mode="floor"), peer_S, n, self.peers, self.tally, "flat")
        x_RD, gates_RK = dispatch(x_ND, gates_NK.index_select(0, label_S), hop, self.wire)
        experts_RK = hop.there(experts_NK.index_select(0, label_S).to(torch.int32), "experts").long()
        return Arrived(x_RD, gates_RK, experts_RK, [hop], self.wire)
