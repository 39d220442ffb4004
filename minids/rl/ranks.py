"""Data parallelism for RL: each rank answers a share of the questions, all take one step together.

Under torchrun every rank holds the whole policy. A step's questions are dealt out; each rank samples and scores its own;
the counts that a loss is divided by, the gradients and the routers' loads are summed over ranks. One rank is the same code
with sums over itself. Weights that were made on each rank are overwritten by rank 0's: equal seeds make equal weights on a
CPU, not to the last bit on GPUs.

Simplification: nothing is sharded; larger policies want FSDP2 around the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)  # a rollout may take minutes on one rank and seconds on another


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, device: str) -> Ranks:
        """From torchrun's environment: joins its process group (NCCL on CUDA, one GPU a local rank; gloo else)."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        cuda = torch.device(device).type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
        return cls(dist.get_rank(), world)

    def stop(self) -> None:
        """Leaves the process group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def share(self, items: Sequence) -> list:
        """This rank's part; the parts are equally long."""
        return list(items[self.rank :: self.world])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Adds each tensor over all ranks, in place; one message for all of a dtype."""
        if self.world == 1:
            return
        for dtype in {tensor.dtype for tensor in tensors}:
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in same])
            dist.all_reduce(flat)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank passes, in the order of ranks, on all of them."""
        if self.world == 1:
            return [data]
        sizes = [self.tensor([0]) for _ in range(self.world)]
        dist.all_gather(sizes, self.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        found = [self.tensor([0] * longest).byte() for _ in sizes]
        dist.all_gather(found, self.tensor(list(data.ljust(longest, b"\0"))).byte())
        return [bytes(part.tolist())[: int(size)] for part, size in zip(found, sizes, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is True on one rank at least; on all ranks the same."""
        if self.world == 1:
            return flag
        count = self.tensor([int(flag)])
        dist.all_reduce(count)
        return bool(count)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites each tensor by rank 0's."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            dist.barrier()

    @staticmethod
    def tensor(values: list) -> Tensor:
        """Where the backend can send it."""
        return torch.tensor(values, device="cuda" if dist.get_backend() == "nccl" else "cpu")

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over ranks of each figure, the same names on all of them."""
        if self.world == 1:
            return values
        figures = self.tensor([float(value) for value in values.values()]).double()
        self.sum([figures])
        return dict(zip(values, (figures / self.world).tolist(), strict=True))
