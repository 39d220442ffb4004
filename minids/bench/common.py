"""What every benchmark needs: fair timing, the machine's own limit beside each figure, and one way to report.

How the figures are made comparable. Machines slow down and speed up while a benchmark runs, so candidates are never
timed one after the other: each round times every candidate once, in rotating order, and the figure is the median over
the rounds. The ratio of two candidates is the median of the ratios within a round, since both saw the same machine
there. The matmul rate is measured in the same run: it says which part of the machine's arithmetic a figure reaches.

Units: seconds, FLOP/s (a multiply-add counts two).
"""

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch


@dataclass
class Report:
    """A benchmark's table: cells under `columns`, `notes` to print below it, and `data`, raw figures for the JSON."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    """Targets that were not reached, in words; empty when all were."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread, as all of this package's CPU figures do, and put the setting back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize() -> None:
    """Wait for work that was only queued, so that a timer sees it. Does nothing without CUDA."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, matmul_dtype: torch.dtype | None = None,
    settle: int = 0,
) -> dict[str, list[float]]:
    """Time the candidates against each other: name -> seconds of each round. Garbage is collected between, never
    inside, calls.

    With `matmul_dtype`, each round also measures the matmul rate, under the name "matmul" (seconds a FLOP, see
    `matmul_seconds`).

    settle: untimed calls of a candidate before each timed one, so that it is measured as it runs alone, step after step,
    and not with the caches that another program has just filled (oneDNN's 1,024 compiled products among them).
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(candidates)
    for name in names * warmup:
        candidates[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    if matmul_dtype is not None:
        times["matmul"] = []
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(settle):
                candidates[name]()
            times[name].append(quiet(lambda name=name: seconds(candidates[name])))
        if matmul_dtype is not None:
            times["matmul"].append(quiet(lambda: matmul_seconds(matmul_dtype)))
    return times


def quiet(function: Callable[[], float]) -> float:
    """Call with the garbage collector off, having collected before."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return function()
    finally:
        if enabled:
            gc.enable()


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`: the median over rounds of the ratio within a round."""
    return median(s / f for s, f in zip(times[slow], times[fast], strict=True))


def matmul_seconds(dtype: torch.dtype, size: int = 1024, device: str = "cpu") -> float:
    """Seconds a FLOP of a square matrix product, the best of three: the limit of what dense arithmetic reaches here."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return min(seconds(lambda: a @ b) for _ in range(3)) / (2 * size**3)


def environment() -> dict[str, Any]:
    """Versions and machine, for the head of a report."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import transformers

        versions["transformers"] = transformers.__version__
    except ImportError:
        versions["transformers"] = "not installed"
    return versions | {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cell(value: Any) -> str:
    """A table cell: three significant digits for floats, thousands separators for integers."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns: text to the left, figures to the right."""
    table = [list(columns), *[[cell(value) for value in row] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    right = [bool(rows) and isinstance(rows[0][i], int | float) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ":" if r else "-" * (w + 2) for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(table[0]), rule, *map(line, table[1:])])


def format_report(report: Report, machine: Mapping[str, Any]) -> str:
    """The report as text: title, machine, table, notes, missed targets."""
    head = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    lines = [report.title, head, "", format_table(report.columns, report.rows), *report.notes]
    return "\n".join(lines + [f"target missed: {miss}" for miss in report.missed])


def write_json(report: Report, machine: Mapping[str, Any], path: Path) -> None:
    """The report and the machine as JSON, written to a temporary name and renamed so that no reader sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"machine": dict(machine), **asdict(report)}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
