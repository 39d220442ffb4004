"""Operands of FP8 products: what a tensor becomes before it is multiplied, and what is kept of it for backward.

A layer y = x W^T of M tokens has three products, each a sum over another dimension, and a scale must not change inside a
group of products that are summed before it is applied:

    product                       sum over   x or dy                      W
    Fprop   y  = x  W^T           K inputs   x: 1 x 128 (`rows`)          128 x 128
    Dgrad   dx = dy W             N outputs  dy: 1 x 128 (`rows`)         the same blocks, turned
    Wgrad   dW = dy^T x           M tokens   dy, x: 128 x 1 (`columns`)   -

So an activation is quantised along its channels for Fprop and along the tokens for Wgrad. What is kept of it in between
is the first, one byte a number and a scale a tile; for Wgrad it is dequantised and quantised again.

The input of o_proj, which attention's backward reads too, is kept in E5M6: 12 bits, with powers of two for scales, so
that changing tiles can only move exponents [V3 3.3.3].

These functions are `quantize_tile` and `quantize_block` without their look at every value, for which a GPU would have
to stop: where x is NaN or infinite the group's scale is NaN, so that the loss becomes NaN and the trainer skips the
step. The bits are the same, as tests hold.

Shapes: M rows, C columns, r x c a group; leading dimensions (experts) pass through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minids.fp8.formats import E4M3, E5M6, Format
from minids.fp8.quantize import _to_groups, scale_of

E4M3_AS_HALF = 2.0**8  # E4M3's bits, put where FP16 has them, mean 2^-8 of the number: the biases are 7 and 15


class Operand(NamedTuple):
    """x ~ q * scale_inv, a scale for each group of ``group`` = (rows, columns) numbers."""

    q: Tensor  # (..., M, C) float8_e4m3fn
    scale_inv: Tensor  # (..., ceil(M / r), ceil(C / c)) float32
    group: tuple[int, int]
    joined: bool = False  # (..., 2, F, K): two matrices that are multiplied as one of 2F rows

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., M, C): the product in FP32, rounded once to ``dtype``."""
        if self.q.is_cpu:
            values, factor = _half_bits(self.q).float(), E4M3_AS_HALF
        else:
            values, factor = self.q.float(), 1.0
        groups = _to_groups(values, *self.group).mul_((self.scale_inv * factor)[..., :, None, :, None])
        return _trim(groups, self.q.shape).to(dtype)

    def gather(self, index: Tensor) -> Operand:
        """Rows ``index`` of q with their scales; groups are one row high, or the whole tensor."""
        q = self.q.view(torch.uint8).index_select(0, index).view(torch.float8_e4m3fn)
        if self.group[0] > 1:
            return Operand(q, self.scale_inv, (len(index), self.group[1]))
        return Operand(q, self.scale_inv.index_select(0, index), self.group)


def quantize(x: Tensor, group: tuple[int, int], scale: str = "fp32") -> Operand:
    """(..., M, C) of any float dtype -> Operand with one scale a group; NaN or infinity: a scale of NaN."""
    group = (min(group[0], max(x.shape[-2], 1)), min(group[1], x.shape[-1]))  # a smaller matrix needs no filling up
    groups = _to_groups(x.float(), *group)
    scale_inv = _scales(groups, E4M3, scale)
    # No clamp: amax / scale exceeds 448 by a rounding at most, which the cast takes back.
    q = (groups / scale_inv[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return Operand(_trim(q, x.shape), scale_inv, group)


def _scales(groups: Tensor, fmt: Format, scale: str) -> Tensor:
    amax = groups.abs().amax(-1).amax(-2)  # one dimension after the other: twice as fast as both at once
    return torch.where(amax.isfinite(), scale_of(amax, fmt, scale), torch.nan)


def _half_bits(q: Tensor) -> Tensor:
    """float16 of 2^-8 times the number each E4M3 code means, NaN apart: torch's own cast takes ten times as long on a
    CPU. NaN codes occur only under a scale of NaN."""
    bits = q.view(torch.int8).to(torch.int16)  # the sign is copied into the upper byte
    return bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)


def _trim(groups: Tensor, shape: torch.Size) -> Tensor:
    """(..., n, r, k, c) -> (..., M, C) without the filling, nor its memory."""
    whole = groups.flatten(-2).flatten(-3, -2)
    if whole.shape == shape:
        return whole
    return whole[..., : shape[-2], : shape[-1]].clone(memory_format=torch.contiguous_format)


def join(first: Operand, second: Operand) -> Operand:
    """Two weights (F, K) as one operand (2, F, K)."""
    q = torch.stack([first.q.view(torch.uint8), second.q.view(torch.uint8)]).view(torch.float8_e4m3fn)
    return Operand(q, torch.stack([first.scale_inv, second.scale_inv]), first.group, joined=True)


class Kept12(NamedTuple):
    """E5M6 codes, two in three bytes, and a power of two for each group."""

    low: Tensor  # (n,) uint8: the lower byte of each code
    high: Tensor  # (ceil(n / 2),) uint8: the upper four bits of a code of the first half, then of one of the second
    scale_inv: Tensor
    group: tuple[int, int]
    shape: torch.Size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(M, C), exactly."""
        high = torch.cat([self.high & 15, self.high >> 4])[: len(self.low)]
        # E5M6 is FP16 without its last four bits of mantissa.
        bits = high.to(torch.int16).bitwise_left_shift_(12).bitwise_or_(self.low.to(torch.int16) << 4)
        groups = _to_groups(bits.view(torch.float16).float().view(self.shape), *self.group)
        return _trim(groups.mul_(self.scale_inv[..., :, None, :, None]), self.shape).to(dtype)


def keep_12_bits(x: Tensor, group: tuple[int, int]) -> Kept12:
    """(M, C) -> E5M6 with one power of two a group; NaN or infinity: a scale of NaN."""
    group = (min(group[0], max(x.shape[-2], 1)), min(group[1], x.shape[-1]))
    groups = _to_groups(x.float(), *group)
    scale_inv = _scales(groups, E5M6, "ue8m0")
    codes = e5m6_codes(_trim(groups / scale_inv[..., :, None, :, None], x.shape)).flatten()
    high = (codes >> 8).to(torch.uint8)
    half = (len(high) + 1) // 2
    pairs = high[:half].clone()
    pairs[: len(high) - half] |= high[half:] << 4
    return Kept12(codes.to(torch.uint8), pairs, scale_inv, group, x.shape)


def e5m6_codes(x: Tensor) -> Tensor:
    """int16 codes of the nearest E5M6 numbers, ties to even, of float32 not above the format's largest in magnitude.

    The same integers as `formats.encode`. In the binade of x the numbers lie u apart; x + 1.5 * 2^23 u has u as its last
    place, so that FP32 itself rounds x, to nearest even, when the sum is formed.
    """
    exponent = (x.view(torch.int32) & 0x7F800000).clamp_min_((127 + E5M6.min_exponent) << 23)
    anchor = exponent.add_((23 - E5M6.mantissa_bits) << 23).view(torch.float32).mul_(1.5)
    rounded = (x + anchor).sub_(anchor).copysign_(x)  # the sign of what became 0
    # Exact: FP16 holds every E5M6 number. A shift of int16 copies the sign into the bits that it frees.
    return (rounded.to(torch.float16).view(torch.int16) >> 4).bitwise_and_(0xFFF)
