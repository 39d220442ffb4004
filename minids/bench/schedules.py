"""Pipeline schedules: how long it takes to build, check, simulate and draw them.

There is no library to time against that does the same, so the figures stand beside fixed limits: DualPipe with 16 ranks and
1,024 micro-batches simulated in under a second, and the picture of 8 ranks and 20 micro-batches in under two, so that a
notebook's slider answers while it is moved. Beside them, for one row, torch's own construction of DualPipeV's order.
"""

import tempfile
from pathlib import Path
from statistics import median

from torch.distributed.pipelining import schedules as torch_schedules

from minids.bench.common import Report, interleaved
from minids.pipeline import build_schedule
from minids.pipeline.simulate import simulate
from minids.pipeline.trace import trace_events

SIMULATE_LIMIT, DRAW_LIMIT = 1.0, 2.0  # seconds


def torch_order(ranks: int, micro_batches: int) -> list:
    """DualPipeV's actions of every rank as torch makes them; it reads sizes alone, so it needs no stages."""
    maker = object.__new__(torch_schedules.ScheduleDualPipeV)
    maker.pp_group_size, maker._n_microbatches = ranks, micro_batches
    return [maker._calculate_single_rank_operations(rank) for rank in range(ranks)]


def run(rounds: int) -> Report:
    """Each figure is the median over the rounds."""
    big = build_schedule("dualpipe", ranks=16, micro_batches=1024)
    paper = build_schedule("dualpipe", ranks=8, micro_batches=20)
    timeline = simulate(paper)
    cells = sum(len(row) for row in big.actions)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "build 16 x 1,024 DualPipe": (lambda: build_schedule("dualpipe", ranks=16, micro_batches=1024), None),
            "build 16 x 1,024 DualPipeV": (lambda: build_schedule("dualpipe_v", ranks=16, micro_batches=1024), None),
            "the same in torch": (lambda: torch_order(16, 1024), None),
            "validate 16 x 1,024": (big.validate, None),
            "simulate 16 x 1,024": (lambda: simulate(big, f=1.0, b=2.0, w=1.0, fb=2.5, comm=0.1), SIMULATE_LIMIT),
            "draw 8 x 20, SVG": (lambda: paper.draw(Path(folder) / "a.svg"), DRAW_LIMIT),
            "draw 8 x 20, PDF": (lambda: paper.draw(Path(folder) / "a.pdf"), DRAW_LIMIT),
            "draw 8 x 20, PNG": (lambda: paper.draw(Path(folder) / "a.png"), DRAW_LIMIT),
            "trace of 8 x 20": (lambda: trace_events(timeline), None),
        }
        times = interleaved({name: call for name, (call, _) in cases.items()}, rounds)
    report = Report(f"Pipeline schedules; 16 ranks x 1,024 micro-batches are {cells:,} actions, one thread",
                    ["what", "seconds", "limit"], [])  # fmt: skip
    for name, (_, limit) in cases.items():
        taken = median(times[name])
        report.rows.append([name, taken, limit if limit is not None else "-"])
        report.data[name] = {"seconds": times[name], "limit": limit}
        if limit is not None and taken > limit:
            report.missed.append(f"{name}: {taken:.2f} s, wanted at most {limit} s")
    report.notes.append("limits are the project's own. torch builds the order without its communication, as here.")
    return report
