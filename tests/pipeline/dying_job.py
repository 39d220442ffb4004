"""Run by test_runtime.py in a fresh process: 4 ranks step for ever; rank 2 kills itself. Nobody but the ranks themselves
ends the others. Prints one line a rank with its exit code and the seconds since the death."""

import multiprocessing
import os
import signal
import time

import torch

from minids.pipeline.check import LAMBDA, MICRO_BATCHES, batches, tiny_config, train_config
from minids.pipeline.launch import free_port, initialise
from minids.pipeline.runtime import Pipeline, Placement


def rank_process(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    with initialise("cpu", patience=4):
        device = torch.device("cpu")
        config = train_config("dualpipe", device)
        pipeline = Pipeline(Placement.plan(config, tiny_config(4), 4), config, device)
        data, steps = batches(0, 97)[0], 0
        while True:
            pipeline.compute_gradients(*data, LAMBDA, MICRO_BATCHES)
            steps += 1
            if rank == 2 and steps == 3:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=rank_process, args=(rank, port)) for rank in range(4)]
    for process in processes:
        process.start()
    processes[2].join()
    died = time.monotonic()
    for rank, process in enumerate(processes):
        process.join(60)
        print(f"rank {rank}: exit code {process.exitcode} after {time.monotonic() - died:.1f} s", flush=True)
        process.kill()
