"""Rows for the wire in FP8: quantised, in the order in which they are sent, one pass there and one back (V3 section 3.3.3).

    pack      x (N, D), source (S,)  ->  rows (S, b) uint8:   D E4M3 codes | ceil(D / 128) exponents | zeros
    unpack    rows (R, b)            ->  x (R, D) = q 2^e

A row is what minids/fp8/dispatch.py describes, 1 x 128 tiles whose scales are powers of two, an E8M0 byte each, filled up
to a multiple of ALIGN bytes: rows that start elsewhere are sent and copied at half the speed. A tile with an infinity or a
NaN becomes NaN: the loss will tell.

The problem: as torch operations a row is quantised, copied between its scales, turned into exponents, copied again into the
order of the wire, and on the other side converted and multiplied: 134 and 364 us for 4,096 tokens of V3 that become 8,078
rows, beside 160 us on the wire. Here 48 and 47. A token that goes to several peers is quantised once for each: what is
written is the rows alone.

Floors at B bytes a second, for x in BF16: (2 D + b) S / B for each, 45 us.

Shapes: N tokens, S rows sent, R rows received, D hidden, b bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minids.fp8.quantize import BLOCK, dequantize
from minids.fp8.turned import on_device
from minids.fp8.words import over
from minids.kernels import quantize_tile
from minids.kernels.backend import cdiv, jit, tl
from minids.kernels.e4m3 import e4m3_scale, magnitude_bits

ALIGN = 16  # bytes
PACK, UNPACK = (64, 4), (8, 2)  # tiles and warps of a program. From a sweep on an H200


def row_bytes(hidden: int) -> int:
    """A byte a number and a byte a tile, filled up to a multiple of ALIGN: 7,232 for V3's 7,168."""
    return cdiv(hidden + cdiv(hidden, BLOCK), ALIGN) * ALIGN


def pack(x: Tensor, source: Tensor | None = None) -> Tensor:
    """Rows (S, b) uint8 of x (N, D), any float dtype: of x[source[s]], or of all in their order. source: (S,) int64, not
    checked."""
    x = (x.float() if x.dtype == torch.float64 else x).contiguous()
    (n, hidden), width = x.shape, row_bytes(x.shape[1])
    if not on_device(x):
        rows = _pack_reference(x, width)
        return rows if source is None else rows.index_select(0, source)
    rows = x.new_empty((n if source is None else len(source), width), dtype=torch.uint8)
    if len(rows):
        tiles, warps = PACK
        _pack[(len(rows) * cdiv(hidden, tiles * BLOCK),)](
            x, x if source is None else source, rows, hidden, width, tiles, source is not None, num_warps=warps
        )
    return rows


def unpack(rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """The numbers (R, D) of ``pack``'s rows, D = hidden; exact in BF16 too, but for what is too small for it."""
    if not on_device(rows):
        return _unpack_reference(rows, hidden, dtype)
    x = rows.new_empty((len(rows), hidden), dtype=dtype)
    if len(rows):
        tiles, warps = UNPACK
        _unpack[(len(rows) * cdiv(hidden, tiles * BLOCK),)](rows, x, hidden, rows.shape[1], tiles, num_warps=warps)
    return x


def _pack_reference(x: Tensor, width: int) -> Tensor:
    rows = x.new_zeros((len(x), width), dtype=torch.uint8)
    q, scale_inv = quantize_tile(x, scale="ue8m0")
    hidden, tiles = x.shape[1], scale_inv.shape[1]
    rows[:, :hidden] = q.view(torch.uint8)
    rows[:, hidden : hidden + tiles] = scale_inv.view(torch.int32) >> 23  # of a power of two all there is; 255 for NaN
    return rows


def _unpack_reference(rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    if not len(rows):
        return rows.new_empty((0, hidden), dtype=dtype)
    exponents = rows[:, hidden : hidden + cdiv(hidden, BLOCK)].to(torch.int32)
    return dequantize(rows[:, :hidden].view(torch.float8_e4m3fn), (exponents << 23).view(torch.float32), (1, BLOCK), dtype)


@jit
def _pack(x_ptr, source_ptr, rows_ptr, D, width, TILES: tl.constexpr, SOURCE: tl.constexpr):
    """One program: TILES tiles of a row."""
    across = tl.cdiv(D, TILES * 128)
    row, part = (tl.program_id(0) // across).to(tl.int64), tl.program_id(0) % across
    token = tl.load(source_ptr + row) if SOURCE else row
    tile = part * TILES + tl.arange(0, TILES)
    column = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    scale = e4m3_scale(tl.max(magnitude_bits(x), axis=1), True)
    q = over(x, scale[:, None], True).to(tl.float8e4nv)
    at, tiles = rows_ptr + row * width, tl.cdiv(D, 128)
    tl.store(at + column, q.to(tl.uint8, bitcast=True), mask=column < D)
    tl.store(at + D + tile, (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=tile < tiles)
    if part == across - 1:
        filler = D + tiles + tl.arange(0, 16)
        tl.store(at + filler, tl.zeros((16,), tl.uint8), mask=filler < width)


@jit
def _unpack(rows_ptr, x_ptr, D, width, TILES: tl.constexpr):
    """One program: TILES tiles of a row."""
    across = tl.cdiv(D, TILES * 128)
    row = (tl.program_id(0) // across).to(tl.int64)
    tile = (tl.program_id(0) % across) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = rows_ptr + row * width
    exponent = tl.load(at + D + tile, mask=tile < tl.cdiv(D, 128), other=0).to(tl.int32)
    q = tl.load(at + column, mask=column < D, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    x = q * (exponent << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(x_ptr + row * D + column, x.to(x_ptr.dtype.element_ty), mask=column < D)
