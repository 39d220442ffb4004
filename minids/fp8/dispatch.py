"""FP8 dispatch, BF16 combine: what expert parallelism sends over the wire (V3 section 3.3.3).

The problem: in expert parallelism every token travels to the ranks of its experts (dispatch) and back (combine), so that
bytes on the wire bound the speed. V3 sends FP8 where a GEMM would quantise the numbers anyway, and BF16 where results
are added up:

                 there (to the experts)                                back (to the tokens)
    forward      dispatch: input of the up-projections, FP8            combine: the experts' outputs, BF16
    backward     of combine: gradient for the down-projections, FP8    of dispatch: gradient of the input, BF16

Each dispatched row carries its own scales: 1 x 128 tiles, powers of two, one E8M0 byte each, behind its E4M3 bytes. So a
row is D + D/128 bytes and one all-to-all is enough:

    x (T, D)  ->  rows (T, D + ceil(D / 128)) uint8      7,168 numbers: 7,224 bytes instead of 14,336

Powers of two are there so that nothing is lost twice: q 2^e is a BF16 number, for 4 significant bits fit into 8, and
quantising it again into 1 x 128 tiles with powers of two gives the same numbers. So what arrives may be handled as plain
BF16 by code that knows nothing of FP8, and an FP8 linear there multiplies the very numbers that were sent.

This is the plain form, in torch operations; minids/fp8/rows.py makes the same rows by one kernel, for real wires.

`there` and `back` are any two functions that move rows (n, bytes) between ranks and are each other's inverse, for example
`torch.distributed.all_to_all_single` with its splits exchanged. All rows cross as uint8: gloo moves no float8.

Shapes: T rows sent, R rows received (a token is one row for each rank that it goes to), D hidden, k = ceil(D / 128).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minids.fp8.formats import E4M3, E8M0, decode, encode
from minids.fp8.quantize import BLOCK, Quantized, dequantize, quantize_tile

Exchange = Callable[[Tensor], Tensor]


def pack(x: Tensor) -> Tensor:
    """(T, D) -> (T, D + k) uint8: each row's E4M3 codes, then its E8M0 scales. T may be 0.

    Raises TypeError, ValueError: as quantize_tile; x is no matrix.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (T, D)")
    if len(x) == 0:
        return torch.empty(0, row_bytes(x.shape[1]), dtype=torch.uint8, device=x.device)
    q, scale_inv = quantize_tile(x, scale="ue8m0")
    return torch.cat([q.view(torch.uint8), encode(scale_inv, E8M0)], dim=1)


def unpack(rows: Tensor, hidden: int) -> Quantized:
    """Rows of `pack` -> q (R, D) float8_e4m3fn and scale_inv (R, k) float32, ready for an FP8 GEMM. D = hidden.

    Raises TypeError: rows are not uint8. ValueError: rows do not have D + k bytes.
    """
    if rows.dtype != torch.uint8:
        raise TypeError(f"rows: got dtype {rows.dtype}, expected torch.uint8")
    if rows.ndim != 2 or rows.shape[1] != row_bytes(hidden):
        raise ValueError(f"rows: got shape {tuple(rows.shape)}, expected (R, {row_bytes(hidden)}) for hidden = {hidden}")
    q = rows[:, :hidden].contiguous().view(E4M3.dtype)
    return q, decode(rows[:, hidden:], E8M0)


def row_bytes(hidden: int) -> int:
    """Bytes of one dispatched row: a byte a number, a byte a tile."""
    return hidden + -(-hidden // BLOCK)


def dispatch(x: Tensor, there: Exchange, back: Exchange) -> Tensor:
    """Sends rows to the experts in FP8; their gradients come back in BF16.

    Args:
        x: (T, D) float32 or bfloat16, rows in the order in which `there` sends them.
        there: (T, bytes) uint8 -> (R, bytes) uint8. back: its inverse, (R, bytes) -> (T, bytes).

    Returns:
        (R, D) in x's dtype: exactly q * scale_inv of each received row.
    """
    return _Dispatch.apply(x, there, back)


def combine(y: Tensor, there: Exchange, back: Exchange) -> Tensor:
    """Sends the experts' outputs back in BF16; the gradients that they get come in FP8.

    Args:
        y: (R, D) float32 or bfloat16, in the order of dispatch's result. there, back: as in dispatch.

    Returns:
        (T, D) in y's dtype, rounded to BF16. Rows of the same token are still apart: the sum over a token's experts, with
        their gate values, is the caller's.
    """
    return _Combine.apply(y, there, back)


def _send_fp8(x: Tensor, exchange: Exchange) -> Tensor:
    q, scale_inv = unpack(exchange(pack(x)), x.shape[1])
    if len(q) == 0:
        return x.new_empty(q.shape)
    return dequantize(q, scale_inv, (1, BLOCK), x.dtype)


def _send_bf16(x: Tensor, exchange: Exchange) -> Tensor:
    rows = exchange(x.to(torch.bfloat16).contiguous().view(torch.uint8))
    return rows.view(torch.bfloat16).to(x.dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return _send_fp8(x, there)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _send_bf16(grad, ctx.back), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.there = there
        return _send_bf16(y, back)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _send_fp8(grad, ctx.there), None, None
