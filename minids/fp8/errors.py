"""What quantisation costs: error statistics for any format and granularity (V3 section 3.3.2's reasons in numbers).

The problem: "how good is FP8" has no single answer. Rounding errs relative to each number (half a unit in the last place,
2^-4 for E4M3), falling below the range errs absolutely, and a scale decides which numbers that happens to. So:

    relative error    ||x - x^|| / ||x||, the error of the whole in units of the whole
    SQNR              -20 log10 of it, signal over quantisation noise, in decibels; +6 dB are one more bit
    median            median of |x - x^| / |x| over numbers that are not 0: what a typical number loses
    underflow         share of the non-zero numbers that became 0
    subnormal         share of the non-zero numbers that lost bits at the lower end: |q| below the smallest normal number
    saturation        share of the numbers beyond the format's largest number before rounding
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minids.fp8.formats import Format
from minids.fp8.mx import MX_BLOCK, MX_ELEMENTS, quantize_mx
from minids.fp8.quantize import BLOCK, ELEMENTS, Quantized, quantize_block, quantize_row, quantize_tensor, quantize_tile

GRANULARITIES = ("tile", "block", "row", "tensor", "mx")


@dataclass(frozen=True)
class ErrorStats:
    """One row of a table of formats. Shares are between 0 and 1; bits count the scales."""

    fmt: str
    granularity: str
    scale: str
    bits: float
    relative_error: float
    sqnr_db: float
    median: float
    underflow: float
    subnormal: float
    saturation: float


def error_stats(x: Tensor, fmt: str = "e4m3", granularity: str = "tile", scale: str = "fp32") -> ErrorStats:
    """Quantises x and measures what was lost, in float64.

    Args:
        x: (T, K), finite, at least one number other than 0.
        fmt: "e4m3", "e5m2", "e5m6"; with granularity "mx" also "e2m3", "e3m2", "e2m1".
        granularity: "tile" (1 x 128), "block" (128 x 128), "row", "tensor", or "mx" (1 x 32, the floor of a power of two).
        scale: "fp32" or "ue8m0"; granularity "mx" has its own and names it "e8m0".

    Raises:
        TypeError, ValueError: as quantize_tile; x is no matrix or all zeros; unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: got {granularity!r}, expected one of {', '.join(GRANULARITIES)}")
    if x.ndim != 2 or not (x != 0).any():
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (T, K) with a number other than 0")
    (q, scale_inv), group = _quantize(x, fmt, granularity, scale)
    form: Format = MX_ELEMENTS[fmt] if granularity == "mx" else ELEMENTS[fmt]
    s = _spread(scale_inv, x.shape, group)
    exact, units = x.double(), q.double()
    error, some = (exact - units * s).abs(), exact != 0
    norm = (error.norm() / exact.norm()).item()
    return ErrorStats(
        fmt=fmt, granularity=granularity, scale="e8m0" if granularity == "mx" else scale,
        bits=form.bits + (32 if granularity != "mx" and scale == "fp32" else 8) * scale_inv.numel() / x.numel(),
        relative_error=norm, sqnr_db=-20 * math.log10(norm) if norm else math.inf,
        median=(error[some] / exact[some].abs()).median().item(),
        underflow=(units[some] == 0).double().mean().item(),
        subnormal=(units[some].abs() < 2.0**form.min_exponent).double().mean().item(),
        saturation=((exact / s).abs() > form.max * (1 + 2.0**-22)).double().mean().item(),  # FP32's rounding of s is none
    )  # fmt: skip


def error_table(x: Tensor, rows: list[tuple[str, str, str]]) -> list[ErrorStats]:
    """error_stats of the same x for each (fmt, granularity, scale)."""
    return [error_stats(x, *row) for row in rows]


def _quantize(x: Tensor, fmt: str, granularity: str, scale: str) -> tuple[Quantized, tuple[int, int]]:
    rows, columns = x.shape
    if granularity == "mx":
        return quantize_mx(x, fmt), (1, MX_BLOCK)
    if granularity == "tile":
        return quantize_tile(x, fmt=fmt, scale=scale), (1, BLOCK)
    if granularity == "block":
        return quantize_block(x, fmt=fmt, scale=scale), (BLOCK, BLOCK)
    if granularity == "row":
        return quantize_row(x, fmt=fmt, scale=scale), (1, columns)
    q, scale_inv = quantize_tensor(x, fmt=fmt, scale=scale)
    return (q, scale_inv.view(1, 1)), (rows, columns)


def _spread(scale_inv: Tensor, shape: torch.Size, group: tuple[int, int]) -> Tensor:
    """The scale of each number: (n, k) -> (T, K), float64."""
    s = scale_inv.double().repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)
    return s[: shape[0], : shape[1]]
