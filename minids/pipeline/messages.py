"""One tensor from a rank to another: the messages of a pipeline, on NCCL, on gloo, and on gloo from GPU to GPU.

NCCL refuses two ranks of one communicator on one GPU. More ranks than GPUs still make sense for one purpose, to run a
schedule of four stages with real kernels where there are two GPUs; then gloo carries the messages. gloo knows the host's
memory only, so such a message is copied there and back:

    send      device -> host at once (the device is waited for), then gloo
    receive   gloo -> host, and host -> device when somebody waits for it

Every message is dense, and goes as a batch of one. NCCL would give a lone message a communicator of its own, or put it in
line with the group's collectives and warn; in a batch it takes the group's communicator, which exists from the start. There
messages between all ranks run in the order in which they were posted: lower.py gives all ranks parts of one order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Staged:
    """A message that passes through ``host`` memory, where torch expects its handle."""

    work: dist.Work
    host: Tensor  # kept until the message has arrived
    target: Tensor | None = None  # a received message's place on the device

    def wait(self) -> None:
        self.work.wait()
        if self.target is not None:
            with torch.no_grad():
                self.target.copy_(self.host)
            self.target = None


def through_host(tensor: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether a message must be copied to the host: a GPU's tensor and a group of gloo."""
    return tensor.is_cuda and dist.get_backend(group) == "gloo"


def send_from_host(tensor: Tensor, **where) -> Staged:
    """``dist.isend`` of a copy. ``where``: group, tag, and the peer as group_dst or, from torch's batches, as group_src."""
    host = tensor.detach().to("cpu", copy=True)
    peer = where.pop("group_dst", where.pop("group_src", None))
    return Staged(dist.isend(host, group_dst=peer, **where), host)


def receive_by_host(tensor: Tensor, **where) -> Staged:
    """``dist.irecv`` into a copy, which ``wait`` brings to ``tensor``."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return Staged(dist.irecv(host, **where), host, tensor)


def route(op: dist.P2POp) -> dist.P2POp:
    """The same message, dense, and through the host where it must."""
    if op.op is dist.isend:
        op.tensor = op.tensor.contiguous()
    if through_host(op.tensor, op.group):
        op.op = send_from_host if op.op is dist.isend else receive_by_host
    return op


def transfer(operation: Callable, tensor: Tensor, peer: int, group: dist.ProcessGroup | None = None) -> None:
    """One tensor to (``dist.isend``) or from (``dist.irecv``) the global rank ``peer``; then a stream may use it."""
    for work in dist.batch_isend_irecv([route(dist.P2POp(operation, tensor, peer, group))]):
        work.wait()
