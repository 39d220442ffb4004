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
`torch._grouped_mm`; FlashInfer where it is installed. Rates: TB/s or TFLOP/s.
Shapes: M rows, N outputs, K inputs, E experts, T tokens.
"""

from collections.abc import Callable
from math import exp, log
from statistics import median
from typing import Any

import torch

from minids import kernels
from minids.bench.common import Report
from minids.bench.gpu_cases import BF16, Case, fp8_products, grouped_products, normal, quantizations
from minids.bench.gpu_layers import mla_decoding, moe_layers, small_operations


def run(rounds: int) -> Report:
    columns = ["operation", "shape", "minids", "unit", "of floor", "error", "best peer", "its rate", "ratio"]
    report = Report("Kernels on the GPU", columns, [])
    if not torch.cuda.is_available():
        report.notes.append("There is no CUDA device here: nothing was measured.")
        return report
    torch.manual_seed(0)
    limits = measure_limits(rounds)
    rows = []
    for build in (quantizations, fp8_products, grouped_products, moe_layers, small_operations, mla_decoding):
        for make in build(limits):
            rows.append(measure(make(), rounds))
            report.rows.append(table_row(rows[-1]))
            torch.cuda.empty_cache()
    report.notes = [f"limits: {', '.join(f'{name} {value:.4g}' for name, value in limits.items())}", *summaries(rows)]
    report.data = {"limits": limits, "rows": rows, "triton": kernels.backend.triton.__version__}
    report.missed = missed(rows)
    return report


# ---- measuring ----


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times all candidates of a case; a peer that cannot run is named with its error."""
    graphs, refused = {}, {}
    for name, call in case.candidates.items():
        try:
            graphs[name] = record(call)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if name == "minids":
                raise
            refused[name] = str(error).splitlines()[0][:120]
    times = time_all(graphs, rounds)
    seconds = {name: median(values) for name, values in times.items()}
    peers = {name: value for name, value in seconds.items() if name != "minids"}
    best = min(peers, key=peers.get) if peers else None
    return {
        "operation": case.operation, "shape": case.shape, "unit": case.unit, "seconds": seconds, "refused": refused,
        "rate": {name: case.work / value / 1e12 for name, value in seconds.items()},
        "share_of_floor": case.floor / seconds["minids"], "error": case.error, "best_peer": best,
        "ratio": median(p / m for p, m in zip(times[best], times["minids"], strict=True)) if best else None,
    }  # fmt: skip


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


# ---- reporting ----


def table_row(row: dict[str, Any]) -> list[Any]:
    best = row["best_peer"]
    return [
        row["operation"], row["shape"], row["rate"]["minids"], row["unit"], row["share_of_floor"], f"{row['error']:.1e}",
        best or "-", row["rate"][best] if best else None, row["ratio"],
    ]  # fmt: skip


def against(row: dict[str, Any], peer: str) -> float:
    """How many times the peer's rate ours is; NaN if it did not run."""
    return row["rate"]["minids"] / row["rate"].get(peer, float("nan"))


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def of(rows: list[dict[str, Any]], operation: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["operation"] == operation]


def summaries(rows: list[dict[str, Any]]) -> list[str]:
    mean = geometric_mean([against(row, "cuBLASLt") for row in of(rows, "FP8 prefill")])
    return [f"FP8 prefill against cuBLASLt, geometric mean of six shapes: {mean:.3f}"]


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The issue's minimum targets that these rows do not reach."""
    targets = [
        ("quantise 1 x 128, TB/s", of(rows, "quantise 1 x 128")[0]["rate"]["minids"], 3.5),
        ("FP8 prefill, geometric mean against cuBLASLt",
         geometric_mean([against(row, "cuBLASLt") for row in of(rows, "FP8 prefill")]), 0.85),
        ("MoE forward BF16, TFLOP/s", of(rows, "MoE forward BF16")[0]["rate"]["minids"], 550),
        ("MoE forward FP8, TFLOP/s", of(rows, "MoE forward FP8")[0]["rate"]["minids"], 800),
    ]  # fmt: skip
    targets += [
        (f"MLA decoding {row['shape']}, against FlashInfer FA3", against(row, "FlashInfer FA3"), 0.8)
        for row in of(rows, "MLA decoding")[:2] if "FlashInfer FA3" in row["rate"]
    ]  # fmt: skip
    targets += [(f"FP8 decoding {r['shape']}, against the better peer", r["ratio"], 1.0) for r in of(rows, "FP8 decoding")]
    return [f"{name}: {found:.3g}, wanted {wanted}" for name, found, wanted in targets if not found >= wanted]
