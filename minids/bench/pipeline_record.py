"""One step of a pipeline as it ran: when each action of each rank started and ended, to be drawn beside the simulation.

On a GPU the moments are CUDA events in the stream, so starting kernels ahead of time costs nothing and a rank's wait for a
message lies before the action that needs it. All ranks count from their own start behind a barrier: their zeros differ by
some microseconds. On a CPU they are readings of the clock, which the processes of a machine share, and so is the zero.
"""

import time
from collections.abc import Callable
from functools import wraps

import torch
import torch.distributed as dist

from minids.bench.common import synchronize
from minids.pipeline.action import Action, Schedule
from minids.pipeline.simulate import Cell, Timeline, peak_activations
from minids.pipeline.torch_engine import Engine, local_numbers

KINDS = "FBIW"
Row = tuple[int, int, int, float, float]  # kind's place in KINDS, torch's stage, micro-batch of the direction, seconds


def _now(device: torch.device) -> torch.cuda.Event | float:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _shared(zero: torch.cuda.Event | float) -> torch.cuda.Event | float:
    """The earliest rank's zero, if it is a reading of the clock that all ranks read; two machines differ by more."""
    if not isinstance(zero, float):
        return zero
    readings = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    readings[dist.get_rank()] = zero
    dist.all_reduce(readings)
    return readings.min().item() if readings.max() - readings.min() < 60 else zero


def _between(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def record(engine: Engine, run: Callable[[], None], device: torch.device) -> list[Row]:
    """Calls ``run``, a step of the engine; returns this rank's actions in their order, with seconds from its start."""
    taken: list[tuple] = []

    def watch(stage, method: str, kind_of: Callable[[dict], str]) -> None:
        inner = getattr(stage, method)

        @wraps(inner)
        def outer(micro_batch, *arguments, **options):
            start = _now(device)
            value = inner(micro_batch, *arguments, **options)
            taken.append((KINDS.index(kind_of(options)), stage.stage_index, micro_batch, start, _now(device)))
            return value

        setattr(stage, method, outer)

    methods = {"forward_one_chunk": lambda options: "F",
               "backward_one_chunk": lambda options: "B" if options.get("full_backward", True) else "I",
               "backward_weight_one_chunk": lambda options: "W"}  # fmt: skip
    for stage in engine._stages:
        for method, kind_of in methods.items():
            watch(stage, method, kind_of)
    synchronize()
    dist.barrier()
    zero = _shared(_now(device))
    run()
    synchronize()
    for stage in engine._stages:
        for method in methods:
            delattr(stage, method)  # the class's own again
    return [(*what, _between(zero, start), _between(zero, end)) for *what, start, end in taken]


def gather_rows(rows: list[Row], device: torch.device) -> list[list[list[float]]]:
    """The rows of all ranks, on every rank."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    table = torch.zeros(len(counts), int(counts.max()), 5, dtype=torch.float64, device=device)
    table[dist.get_rank(), : len(rows)] = torch.tensor(rows, dtype=torch.float64, device=device)
    dist.all_reduce(table)
    return [[[int(kind), int(stage), int(m), round(start, 6), round(end, 6)] for kind, stage, m, start, end in own[:count]]
            for own, count in zip(table.tolist(), counts.tolist(), strict=True)]  # fmt: skip


def recorded_timeline(schedule: Schedule, rows: list[list[list[float]]]) -> Timeline:
    """What was recorded, as a simulation would give it; a pair is two cells, its F and its B, as it ran. Times in seconds
    from the first start anywhere."""
    numbers = {local: m for m, local in local_numbers(schedule).items()}
    first = min(row[3] for own in rows for row in own)
    cells = []
    for own in rows:
        cells.append([])
        for kind, stage, micro_batch, start, end in own:
            direction, place = divmod(stage, schedule.stages)
            action = Action(KINDS[kind], place, numbers[direction, micro_batch], direction)
            cells[-1].append(Cell(action, start - first, end - first))
    busy = [sum(cell.end - cell.start for cell in row) for row in cells]
    makespan = max(row[-1].end for row in cells)
    peaks = [peak_activations([cell.action for cell in row]) for row in cells]
    return Timeline(schedule, cells, makespan, busy, [0.0] * schedule.ranks, peaks)
