"""Starting and watching the processes of a pipeline: a rank that dies ends the job with a message that names it.

The problem: a rank whose neighbour has died waits for a message that never comes. gloo notices a closed connection, and
then only the neighbour does; NCCL waits on. So every rank keeps a thread that writes a sign of life into the job's store
each second and reads the others'. A rank whose sign stands still for PATIENCE seconds is dead: the reader says so and
ends its own process, whatever its main thread waits for. A rank that fails with an error leaves the error in the store, so
that the others can repeat it.

Under torchrun the store belongs to the agent and outlives every rank; started here, it belongs to rank 0, and losing it
means that rank 0 is gone.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = 12.0  # seconds without a sign of life; a rank that only computes gives one each second
LINGER = 3.0  # seconds that rank 0, where the store may be, stays for the others to read the reason
VERDICT = "minids/verdict"  # key of the store: why the job ends
TIMEOUT = timedelta(minutes=10)  # of one collective, for ranks that are alive but wait for each other


class Watch:
    """The thread of one rank. ``failed`` tells the others why this one ends."""

    def __init__(self, rank: int, ranks: int, host: str, port: int, patience: float = PATIENCE):
        self.rank, self.ranks, self.patience, self.word = rank, ranks, patience, "alive"
        self.store = dist.TCPStore(host, port, None, False, timedelta(seconds=30))  # a connection of its own
        self._tell(f"minids/sign/{rank}", "alive")  # at once: a rank may die in its first second
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Inside, Python may stand still for minutes (a tokenizer is trained): be patient with this rank."""
        self.word = "busy"
        self._tell(f"minids/sign/{self.rank}", "busy")
        yield
        self.word = "alive"

    def failed(self, error: BaseException) -> None:
        """Leave the error where the others find it."""
        self._tell(VERDICT, f"rank {self.rank} failed with {type(error).__name__}: {error}"[:600])

    def end(self) -> None:
        """This rank is done; the others no longer expect signs of it."""
        self.stop.set()
        self.thread.join()
        self._tell(f"minids/sign/{self.rank}", "done")

    def _tell(self, key: str, value: str) -> None:
        try:
            self.store.set(key, value)
        except (RuntimeError, dist.DistError):
            pass  # the store is gone, and rank 0 with it: the thread says so

    def _run(self) -> None:
        seen = {rank: ("", time.monotonic()) for rank in range(self.ranks) if rank != self.rank}
        count = 0
        while not self.stop.wait(1.0):
            count += 1
            try:
                self.store.set(f"minids/sign/{self.rank}", f"{self.word} {count}")
                if self.store.check([VERDICT]):
                    self._die(self.store.get(VERDICT).decode())
                dead = [other for other in seen if self._is_dead(other, seen)]
            except (RuntimeError, dist.DistError):
                if not self.stop.is_set():
                    self._die("rank 0 died: it kept the job's store, which does not answer any more")
                return
            if dead:
                why = f"rank {dead[0]} died: no sign of life for {self.patience:.0f} s"
                self._tell(VERDICT, why)
                self._die(why)

    def _is_dead(self, other: int, seen: dict[int, tuple[str, float]]) -> bool:
        key, now = f"minids/sign/{other}", time.monotonic()
        sign = self.store.get(key).decode() if self.store.check([key]) else ""
        if sign != seen[other][0] or sign in ("", "done"):
            seen[other] = (sign, now)
        return now - seen[other][1] > self.patience * (20 if sign.startswith("busy") else 1)

    def _die(self, why: str) -> None:
        print(f"error: rank {self.rank} ends because {why}", file=sys.stderr, flush=True)
        time.sleep(LINGER if self.rank == 0 else 0)
        os._exit(1)


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Ranks that wait for each other for ever give signs of life all the while. Inside, no longer than ``seconds``: then
    every rank says where it stands (the stacks of its threads) and ends."""
    rank = dist.get_rank() if dist.is_initialized() else 0

    def over() -> None:
        print(f"error: rank {rank} ends because {what} is not done after {seconds:.0f} s; it stands here:", file=sys.stderr,
              flush=True)  # fmt: skip
        faulthandler.dump_traceback()
        os._exit(1)

    timer = threading.Timer(seconds, over)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def device_of(kind: str, backend: str | None = None) -> torch.device:
    """This process's device: the CPU, or the GPU of its local rank. With ``backend`` gloo ranks may share a GPU."""
    if torch.device(kind).type != "cuda":
        return torch.device("cpu")
    local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if backend == "gloo" and devices:
        return torch.device("cuda", local % devices)
    if local >= devices:
        raise ValueError(f"device=cuda with local rank {local}: this machine has {devices} CUDA devices, allowed is at "
                         "most one process for each")  # fmt: skip
    return torch.device("cuda", local)


@contextmanager
def initialise(kind: str, patience: float = PATIENCE, backend: str | None = None) -> Iterator[Watch]:
    """The process group of torchrun's environment, with its watch. ``backend``: by default NCCL for ``kind`` cuda and gloo
    for cpu; gloo for cuda sends messages through the host (messages.py).

    An error inside is told to the other ranks and raised again, unless it is the work of a dead neighbour: then the process
    ends with a message that names the dead rank.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = device_of(kind, backend)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    options = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if backend == "nccl":  # a device known now makes communicators now, of sub-groups too: by all ranks, in one order
        options["device_id"] = device
    dist.init_process_group(backend, timeout=TIMEOUT, **options)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    watch = Watch(rank, ranks, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), patience)
    try:
        yield watch
        dist.barrier()
    except Exception as error:
        traceback.print_exc()  # now: the others, who read of it, may end this process before the error is handled
        if _is_communication(error):
            # The neighbour, or one behind it, has died. Which, the watch finds out, and ends this process.
            time.sleep(watch.patience + 8)
        watch.failed(error)
        time.sleep(LINGER if rank == 0 else 0)
        raise
    watch.end()
    dist.destroy_process_group()


def _is_communication(error: BaseException) -> bool:
    text = str(error).lower()
    words = ("connection", "gloo", "nccl", "timed out", "socket", "peer", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _local_rank(index: int, function: Callable, ranks: int, port: int, arguments: tuple) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    with initialise("cpu"):
        function(index, *arguments)


def start_local(function: Callable, ranks: int, *arguments: object) -> None:
    """``function(rank, *arguments)`` in ``ranks`` forked CPU processes of this machine, with gloo; returns when all have
    ended. Raises ``torch.multiprocessing.ProcessRaisedException`` or ``ProcessExitedException``, which name the rank.

    Forking takes a second where spawning takes ten, but only a process that has run neither CUDA nor a backward may be
    forked: call this from a fresh one, not from a notebook or a test.
    """
    torch.multiprocessing.start_processes(_local_rank, (function, ranks, free_port(), arguments), nprocs=ranks,
                                          start_method="fork")  # fmt: skip
