"""What `minids.bench.gpu` says about its rows: the table, the targets that were missed, and what to know beside them.

A row is a dict with operation, shape, unit, seconds and rate of each candidate, share_of_floor, error, best_peer, its ratio
to ours within a round, and refused: peers that did not run, with their errors.
"""

from collections.abc import Callable
from math import exp, log
from statistics import median
from typing import Any

Row = dict[str, Any]
COLUMNS = ["operation", "shape", "minids", "unit", "of floor", "error", "best peer", "its rate", "ratio"]
FLASHINFER = "FlashInfer FA3"
# TFLOP/s (16 heads: TB/s) of FlashInfer 0.6.1 on an H200 in another run: said beside ours where it is not installed.
FLASHINFER_ELSEWHERE = {
    "128 heads, 128 x 4096": 533, "128 heads, 128 x 8192": 539, "128 heads, 16 x 8192": 466,
    "128 heads, 1 x 131072": 413, "16 heads, 128 x 4096": 3.892,
}  # fmt: skip


def row_of(operation: str, shape: str, unit: str, work: float, floor: float, error: float,
           times: dict[str, list[float]]) -> Row:  # fmt: skip
    """The figures of a row from the seconds of each round."""
    seconds = {name: median(values) for name, values in times.items()}
    peers = {name: value for name, value in seconds.items() if not name.startswith("minids")}
    best = min(peers, key=peers.get) if peers else None
    scale = 1.0 if unit == "tokens/s" else 1e12
    return {
        "operation": operation, "shape": shape, "unit": unit, "seconds": seconds,
        "rate": {name: work / value / scale for name, value in seconds.items()},
        "share_of_floor": floor / seconds["minids"], "error": error, "best_peer": best,
        "ratio": median(p / m for p, m in zip(times[best], times["minids"], strict=True)) if best else None,
    }  # fmt: skip


def table_row(row: Row) -> list[Any]:
    best = row["best_peer"]
    return [
        row["operation"], row["shape"], row["rate"]["minids"], row["unit"], row["share_of_floor"], f"{row['error']:.1e}",
        best or "-", row["rate"][best] if best else None, row["ratio"],
    ]  # fmt: skip


def against(row: Row, peer: str) -> float:
    """How many times the peer's rate ours is; NaN if it did not run."""
    return row["rate"]["minids"] / row["rate"].get(peer, float("nan"))


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def of(rows: list[Row], operation: str) -> list[Row]:
    return [row for row in rows if row["operation"] == operation]


def remarks(limits: dict[str, float], rows: list[Row]) -> list[str]:
    notes = [f"limits: {', '.join(f'{name} {value:.4g}' for name, value in limits.items())}"]
    if prefill := of(rows, "FP8 prefill"):
        mean = geometric_mean([against(row, "cuBLASLt") for row in prefill])
        notes.append(f"FP8 prefill against cuBLASLt, geometric mean of {len(prefill)} shapes: {mean:.3f}")
    for row in of(rows, "MLA decoding"):
        if FLASHINFER not in row["rate"] and row["shape"] in FLASHINFER_ELSEWHERE:
            known = FLASHINFER_ELSEWHERE[row["shape"]]
            notes.append(f"MLA decoding, {row['shape']}: {row['rate']['minids'] / known:.2f} of {FLASHINFER} on an H200 in "
                         f"another run ({known} {row['unit']})")  # fmt: skip
    refused = {f"{name}: {why}" for row in rows for name, why in row.get("refused", {}).items()}
    return notes + [f"did not run, {line}" for line in sorted(refused)]


def missed(rows: list[Row]) -> list[str]:
    """The minimum targets that these rows do not reach."""

    def rate(row: Row) -> float:
        return row["rate"]["minids"]

    def ratio(row: Row) -> float:
        return row["ratio"]

    def torch_ratio(row: Row) -> float:
        return min((against(row, peer) for peer in ("cuBLASLt", "BF16") if peer in row["rate"]), default=float("nan"))

    single: list[tuple[str, Callable[[Row], float], str, float]] = [
        ("quantise 1 x 128", rate, "TB/s", 3.5),
        ("MoE forward BF16", rate, "TFLOP/s", 550),
        ("MoE forward FP8", rate, "TFLOP/s", 800),
        ("FP8 decoding", torch_ratio, "times the better of cuBLASLt and BF16", 1.0),
        ("training step BF16", ratio, "times transformers", 1.5),
        ("training step FP8", ratio, "times transformers in BF16", 2.0),
    ]
    found = [
        (f"{name} {row['shape']}", measure(row), what, wanted)
        for name, measure, what, wanted in single for row in of(rows, name)
    ]  # fmt: skip
    if prefill := of(rows, "FP8 prefill"):
        mean = geometric_mean([against(row, "cuBLASLt") for row in prefill])
        found.append(("FP8 prefill, geometric mean", mean, "times cuBLASLt", 0.85))
    for row in of(rows, "MLA decoding")[:2]:
        if FLASHINFER in row["rate"]:
            found.append((f"MLA decoding {row['shape']}", against(row, FLASHINFER), f"times {FLASHINFER}", 0.8))
    return [f"{name}: {value:.3g} {what}, wanted {wanted}" for name, value, what, wanted in found if not value >= wanted]
