"""What a run writes down: one JSON object a step in `metrics.jsonl`, and the readings taken from it.

MaxVio of a layer is max load / mean load - 1 over the global batch (0 = perfect balance); the FLOPs utilisation (MFU)
is tokens/s * FLOPs a token / the device's peak rate, where the peak is known:

    mfu = tokens_per_s * flops_per_token / peak

Simplifications: the peaks are the vendors' dense figures, without sparsity; a device that is not in the table (every
CPU) gets no utilisation rather than a guessed one.

Source: MaxVio, Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), section 4.1.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

# Dense TFLOP/s by a part of the CUDA device name, first match wins: (BF16 or FP16 tensor cores, FP32 without TF32).
PEAK_TFLOPS = (
    ("B200", 2250.0, 75.0), ("GH200", 989.4, 66.9), ("H200", 989.4, 66.9), ("H800", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.0), ("H100", 989.4, 66.9), ("H20", 148.0, 44.0), ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5), ("L40S", 362.0, 91.6), ("L4", 121.0, 30.3), ("A10", 125.0, 31.2),
    ("RTX 4090", 165.2, 82.6), ("RTX 3090", 71.0, 35.6), ("V100", 125.0, 15.7), ("T4", 65.0, 8.1),
)


def peak_flops(device_name: str, half: bool) -> float | None:
    """Peak FLOP/s of a GPU by its name as torch reports it, or None if the table does not have it."""
    for part, low, full in PEAK_TFLOPS:
        if re.search(rf"\b{part}\b", device_name) and "Laptop" not in device_name:
            return 1e12 * (low if half else full)
    return None


class MetricsLog:
    """Append-only JSONL file whose length in bytes is part of a checkpoint.

    Opened at `position`, everything behind it is cut off: lines of steps that will be run again, and the torn last
    line of a killed process.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self._file = open(path, "ab")
        size = self._file.tell()
        if size < position:
            self._file.close()
            raise ValueError(f"{path} has {size} bytes, the checkpoint was made at {position}: the file was changed")
        self._file.truncate(position)
        self._file.seek(0, os.SEEK_END)

    def write(self, record: dict) -> None:
        """Append one line and hand it to the system (a killed process loses no finished line)."""
        self._file.write((json.dumps({k: _plain(v) for k, v in record.items()}) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Flush to the disk; returns the length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _plain(value):
    """JSON has no nan or inf: a skipped step's loss is written as null."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> list[dict]:
    """All complete records of a metrics.jsonl (given as the file or its run folder), oldest first."""
    path = Path(path)
    text = (path / "metrics.jsonl" if path.is_dir() else path).read_text()
    # A line without its newline is still being written.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def spikes(losses: Sequence[float | None], window: int = 32, threshold: float = 6.0) -> list[int]:
    """Indices at which the loss jumps out of its recent past: the watch that V3's "no irrecoverable spikes" needs.

    Index i is a spike when losses[i] lies more than `threshold` robust deviations (1.4826 * median absolute deviation,
    at least 0.5% of the median) above the median of the `window` values before it, or is None or not finite. Nothing
    is judged before `window` / 2 finite values are there; a spike does not enter the past of later ones.
    """
    past: list[float] = []
    found = []
    for i, loss in enumerate(losses):
        if loss is None or not math.isfinite(loss):
            found.append(i)
            continue
        recent = past[-window:]
        if len(recent) >= max(2, window // 2):
            middle = statistics.median(recent)
            spread = 1.4826 * statistics.median(abs(x - middle) for x in recent)
            if loss > middle + threshold * max(spread, 0.005 * abs(middle)):
                found.append(i)
                continue
        past.append(loss)
    return found
