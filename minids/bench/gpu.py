"""Kernels on the GPU beside their peers: `python -m minids.bench gpu --json figures/bench/gpu.json`.

The published shapes of V3: quantisation, FP8 products for prefill and decoding, the experts' grouped products, a whole MoE
layer forward, the small operations, MLA decoding. Every candidate of a row, peers included, runs in the same rounds in
rotating order; the figure is the median over rounds of medians of `triton.testing.do_bench`, which empties the L2 cache
before each call. Calls are recorded as CUDA graphs, so that nobody's Python is timed. Inputs are fresh random numbers with
outliers, never zeros.

Beside each time stands its error: ||out - exact|| / ||exact|| against an FP32 computation from the same inputs (for
quantisation: whether the bits are the reference's). And the share of the floor: the larger of bytes over the measured
copy rate and operations over the measured rate of the tensor core (FP8: one scale a tensor, fast accumulation), over
the time.

Peers: torch's device copy; cuBLAS in BF16; cuBLASLt's block-scaled FP8 (`torch.nn.functional.scaled_mm`);
`torch._grouped_mm`; torch's fused attention; FlashInfer and its port of DeepGEMM where it is installed; transformers for
the training step. A peer that fails is named with its error, and the report is saved after every row.
Rates: TB/s or TFLOP/s. Shapes: M rows, N outputs, K inputs, E experts, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from minids import kernels
from minids.bench import gpu_training
from minids.bench.common import Report
from minids.bench.gpu_attention import mla_decoding, prefill_attention
from minids.bench.gpu_cases import (
    BF16,
    Case,
    fp8_products,
    grouped_products,
    normal,
    quantizations,
    reset_after_capture,
)  # fmt: skip
from minids.bench.gpu_layers import moe_layers
from minids.bench.gpu_report import COLUMNS, missed, remarks, row_of, table_row
from minids.bench.gpu_small import small_operations

CASES = {
    "mla": mla_decoding, "attention": prefill_attention, "moe": moe_layers, "fp8": fp8_products,
    "quantise": quantizations, "grouped": grouped_products, "small": small_operations,
}  # fmt: skip
GROUPS = ["training", *CASES]  # a run that is cut short has what takes the longest to set up


def run(rounds: int, only: Sequence[str] = (), save: Callable[[Report], None] | None = None) -> Report:
    """Measures the rows of the groups in ``only``, all of them if it is empty, and calls ``save`` after each."""
    if unknown := sorted(set(only) - set(GROUPS)):
        raise ValueError(f"only: got {', '.join(unknown)}, expected some of {', '.join(GROUPS)}")
    report = Report("Kernels on the GPU", COLUMNS, [])
    if not torch.cuda.is_available():
        report.notes.append("There is no CUDA device here: nothing was measured.")
        return report
    torch.manual_seed(0)
    chosen = [name for name in GROUPS if not only or name in only]
    limits, rows, failed = measure_limits(rounds), [], []
    for name, make in jobs(chosen, limits, rounds):
        try:
            found = make()
        except Exception as error:  # a row that fails does not take the others with it
            reset_after_capture()
            failed.append(f"{name}: not measured, {first_line(error)}")
        else:
            rows.append(found)
            report.rows.append(table_row(found))
        report.notes = remarks(limits, rows)
        report.data = {"limits": limits, "rows": rows, "triton": kernels.backend.triton.__version__}
        report.missed = missed(rows) + failed
        if save is not None:
            save(report)
        torch.cuda.empty_cache()
    return report


def jobs(chosen: list[str], limits: dict[str, float], rounds: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """A name and a call that measures one row, one after the other."""
    for name in chosen:
        if name == "training":
            yield from gpu_training.jobs(rounds, limits)
        else:
            for number, build in enumerate(CASES[name](limits)):
                yield f"{name} {number}", lambda build=build: measure(build(), rounds)


# ---- measuring ----


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times all candidates of a case; a peer that cannot run is named with its error."""
    graphs, refused = {}, {}
    for name, call in case.candidates.items():
        try:
            graphs[name] = record(call)
        except Exception as error:
            if name == "minids":
                raise
            reset_after_capture()
            refused[name] = first_line(error)
    times = time_all(graphs, rounds)
    return row_of(case.operation, case.shape, case.unit, case.work, case.floor, case.error, times) | {"refused": refused}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def record(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """One call as a graph, after a first one that compiles."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def time_all(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, candidates in rotating order."""
    from triton.testing import do_bench

    names, times = list(graphs), {name: [] for name in graphs}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(do_bench(graphs[name].replay, warmup=5, rep=20, return_mode="median") / 1e3)
    return times


def measure_limits(rounds: int) -> dict[str, float]:
    """The device's own limits: bytes and operations a second."""
    x = normal(8192, 7168)
    y, n = torch.empty_like(x), 8192
    a, b = normal(n, n), normal(n, n)
    one = torch.ones((), device="cuda")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    times = time_all({
        "copy": record(lambda: y.copy_(x)),
        "bf16": record(lambda: a @ b.t()),
        "fp8": record(lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=BF16, use_fast_accum=True)),
    }, rounds)  # fmt: skip
    work = {"copy": 2.0 * x.numel() * x.element_size(), "bf16": 2.0 * n**3, "fp8": 2.0 * n**3}
    return {name: work[name] / median(times[name]) for name in times}
