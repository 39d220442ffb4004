"""Who talks to whom: the few collectives that expert parallelism and ZeRO-1 need, over processes or over threads.

    all_to_all        each peer gets its own rows of mine, and I get mine of each
    all_reduce        everybody gets the sum
    reduce_scatter    everybody gets the sum of a slice of his own
    all_gather        everybody gets all slices

``ProcessPeers`` is a process group of torch.distributed: NCCL, or gloo, which knows the host's memory only.
``ThreadPeers`` is a group of threads of one process that hand tensors over in a list: 64 "GPUs" run in a notebook or a
test, by the code that runs on 64 GPUs. ``run_threads`` starts them.

``Tally`` counts what crosses which wire: rows and bytes, by what was sent and by link: "ib" between nodes, "nvlink"
inside a node, "here" for what stays on the GPU.
"""

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

LINKS = ("here", "nvlink", "ib")
# torch 2.13 renames what 2.11 calls *_tensor.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Tally:
    """What one rank sent; (what, hop, link) -> rows, and the same of bytes. What: dispatch, gates, experts, combine, and
    with " backward" behind it their gradients. Hop: flat; or node, then gpu."""

    rows: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)

    def add(self, what: str, hop: str, links: Sequence[str], counts: Sequence[int], row_bytes: int) -> None:
        """``counts[i]`` rows of ``row_bytes`` bytes each went over ``links[i]``."""
        for link, count in zip(links, counts, strict=True):
            self.rows[what, hop, link] += count
            self.bytes[what, hop, link] += count * row_bytes

    def total(self, what: str, *links: str, hop: str | None = None) -> tuple[int, int]:
        """(rows, bytes) of ``what`` over ``links``, all three if none is named, in ``hop`` or all."""
        for link in links:
            if link not in LINKS:
                raise ValueError(f"link {link!r}: allowed are {', '.join(LINKS)}")
        keys = [key for key in self.rows if key[0] == what and (not links or key[2] in links) and hop in (None, key[1])]
        return sum(self.rows[key] for key in keys), sum(self.bytes[key] for key in keys)

    def clear(self) -> None:
        self.rows.clear()
        self.bytes.clear()

    @staticmethod
    def sum(tallies: Sequence["Tally"]) -> "Tally":
        rows, sizes = (sum((getattr(t, name) for t in tallies), Counter()) for name in ("rows", "bytes"))
        return Tally(rows, sizes)


class Peers(ABC):
    """A group of ranks that talk to each other. ``per_node``: so many consecutive ones share a node."""

    rank: int  # mine, among the peers
    size: int
    per_node: int

    @property
    def links(self) -> list[str]:
        """The wire to each peer."""
        node = self.rank // self.per_node
        return ["here" if p == self.rank else "nvlink" if p // self.per_node == node else "ib" for p in range(self.size)]

    @abstractmethod
    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """The first send[0] of ``rows`` (T, ...) go to peer 0, and so on; the result has receive[p] rows of peer p."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all peers, in place."""

    @abstractmethod
    def reduce_scatter(self, flat: Tensor) -> Tensor:
        """(n / size,): slice ``rank`` of the sum over all peers of ``flat`` (n,)."""

    @abstractmethod
    def all_gather(self, piece: Tensor) -> Tensor:
        """(n,): the slices (n / size,) of all peers, in their order."""

    def exchange_counts(self, send: Sequence[int], device: torch.device) -> list[int]:
        """How many rows each peer will send me. The host waits for the device."""
        ones, counts = [1] * self.size, torch.tensor(send, dtype=torch.int64, device=device).unsqueeze(1)
        return self.all_to_all(counts, ones, ones).flatten().tolist()


class ProcessPeers(Peers):
    """A process group; ``group`` None is all processes."""

    def __init__(self, group: dist.ProcessGroup | None = None, per_node: int | None = None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.per_node = per_node or self.size
        self.gloo = dist.get_backend(group) == "gloo"

    def _near(self, tensor: Tensor) -> Tensor:
        """Dense, and where the backend reads it."""
        return tensor.contiguous().cpu() if self.gloo else tensor.contiguous()

    def all_to_all(self, rows, send, receive):
        near = self._near(rows)
        found = near.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(found, near, list(receive), list(send), group=self.group)
        return found.to(rows.device)

    def all_reduce(self, tensor):
        near = self._near(tensor)
        dist.all_reduce(near, group=self.group)
        return tensor if near is tensor else tensor.copy_(near)

    def reduce_scatter(self, flat):
        near = self._near(flat)
        found = near.new_empty(len(flat) // self.size)
        REDUCE_SCATTER(found, near, group=self.group)
        return found.to(flat.device)

    def all_gather(self, piece):
        near = self._near(piece)
        found = near.new_empty(len(piece) * self.size)
        ALL_GATHER(found, near, group=self.group)
        return found.to(piece.device)


class Meeting:
    """Where the threads of a group put what they have for each other."""

    def __init__(self, size: int):
        self.table, self.barrier = [None] * size, threading.Barrier(size)


class ThreadPeers(Peers):
    """Threads of one process; all collectives are one: everybody shows everybody a tensor."""

    def __init__(self, meeting: Meeting, rank: int, per_node: int | None = None):
        self.meeting, self.rank, self.size = meeting, rank, len(meeting.table)
        self.per_node = per_node or self.size

    def _meet(self, mine: object, read: Callable[[list], Tensor]) -> Tensor:
        """``read`` of what all peers show, in their order; a new tensor. Nobody goes on before all have read: what was
        shown is others' memory, and they may write to it."""
        self.meeting.table[self.rank] = mine
        self.meeting.barrier.wait()
        found = read(list(self.meeting.table))
        self.meeting.barrier.wait()
        return found

    def all_to_all(self, rows, send, receive):
        def mine(shown: list) -> Tensor:
            found = [pieces[self.rank] for pieces in shown]
            if [len(piece) for piece in found] != list(receive):
                raise ValueError(f"receive={list(receive)}: the peers send {[len(piece) for piece in found]} rows")
            return torch.cat(found)

        return self._meet(rows.detach().split(list(send)), mine)

    def all_reduce(self, tensor):
        return tensor.copy_(self._meet(tensor.detach().clone(), lambda shown: torch.stack(shown).sum(0)))

    def reduce_scatter(self, flat):
        def mine(shown: list) -> Tensor:
            return torch.stack([other.chunk(self.size)[self.rank] for other in shown]).sum(0)

        return self._meet(flat.detach(), mine)

    def all_gather(self, piece):
        return self._meet(piece.detach(), torch.cat)


def run_threads(size: int, function: Callable[[int, Callable[[Sequence[int], int], ThreadPeers]], object]) -> list:
    """``function(rank, join)`` in ``size`` threads; returns what each returned. ``join(members, per_node)`` gives a thread
    its peers among the ranks ``members``, of which it is one. The first error of a thread is raised here."""
    meetings, lock, results, errors = {}, threading.Lock(), [None] * size, []

    def run(rank: int) -> None:
        def join(members: Sequence[int], per_node: int | None = None) -> ThreadPeers:
            with lock:
                if errors:
                    raise threading.BrokenBarrierError
                meeting = meetings.setdefault(tuple(members), Meeting(len(members)))
            return ThreadPeers(meeting, list(members).index(rank), per_node)

        try:
            results[rank] = function(rank, join)
        except BaseException as error:  # raised again by the caller's thread
            with lock:
                errors.append(error)
                for meeting in meetings.values():
                    meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:  # those of the others are broken barriers
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
