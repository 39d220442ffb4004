"""FP8 operands turned, in one pass each: weights, tokens, and the slots of experts (V3 sections 3.3.1 to 3.3.3).

FP8 tensor cores want the summed index adjacent in memory in both factors. Dgrad sums over a weight's rows and Wgrad over
tokens, so both read transposes. As torch operations a transpose for Wgrad is five passes over memory: the bytes become
FP32, are multiplied by their scales, gathered, rounded, turned. Each function here is one:

    weight_both    W, 128 x 128          -> q, scales; q^T, scales^T
    columns        q and 1 x 128 scales  -> what they mean, quantised 128 x 1, turned; of the experts' slots if asked
    slots          the same              -> rows of the experts' slots, zeros where slots only fill up a block
    keep_wide      o_proj's input        -> its operand for Fprop, and E5M6 numbers to keep [V3 3.3.3]
    wide_columns   E5M6                  -> as `columns`

Bytes are slow to turn, so threads make words of four rows' bytes and turn those, as in minids/kernels/quantize.py.

The references, which run wherever the kernels do not, are the operations of minids/fp8/operands.py; bits are the same.

Shapes: N tokens, K chosen, M slots or rows, C columns, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minids.fp8.formats import E5M6
from minids.fp8.operands import Kept12, Operand, keep_12_bits
from minids.fp8.words import largest, over, word_of
from minids.kernels import quantize_block
from minids.kernels.backend import cdiv, choose, jit, tl
from minids.kernels.quantize import e4m3_scale, magnitude_bits, quantize_tile, quantize_tile_t, to_e4m3
from minids.model.moe import Dispatch

FP8 = torch.float8_e4m3fn
WIDE_TOP = tl.constexpr(0x7E0000)  # the mantissa of E5M6's largest number, as FP32 has it
WIDE_SMALLEST = tl.constexpr(16 << 23 | 0x7E0000)  # the smallest magnitude whose scale is normal, 65024 * 2^-126
assert E5M6.max == 65024
COLUMNS = (32, 8, 2)  # of a program of `_columns`; how many a thread loads at once; warps. From a sweep on an H200


class Turned(NamedTuple):
    """An operand for Wgrad: the transpose of (M, C), quantised along M."""

    q: Tensor  # (C, M) float8_e4m3fn, rows a multiple of 16 bytes apart
    scale_inv: Tensor  # (C, ceil(M / 128)) float32, column-major


def on_device(x: Tensor) -> bool:
    """Whether the kernels run for x."""
    return choose(None, x) == "triton"


# ---- weights ----------------------------------------------------------------------------------------------------------


def weight_both(w: Tensor, scale: str) -> tuple[Operand, Operand]:
    """W (..., N, K) quantised 128 x 128, and its transpose, (..., K, N)."""
    w = w.detach().contiguous()
    *lead, n, k = w.shape
    if not on_device(w) or n % 128 or k % 128:
        found = Operand(*quantize_block(w, scale=scale), (128, 128))
        return found, turn(found)
    q, q_t = w.new_empty(w.shape, dtype=FP8), w.new_empty((*lead, k, n), dtype=FP8)
    s, s_t = (w.new_empty((*lead, *blocks), dtype=torch.float32) for blocks in ((n // 128, k // 128), (k // 128, n // 128)))
    _weight[(k // 128, n // 128, w[..., 0, 0].numel())](w, q, s, q_t.view(torch.int32), s_t, n, k, scale == "ue8m0",
                                                        num_warps=8)  # fmt: skip
    return Operand(q, s, (128, 128)), Operand(q_t, s_t, (128, 128))


@jit
def _weight(w_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, N, K, UE8M0: tl.constexpr):
    """One program: a block of one expert's weight, read once and stored twice. qt_ptr points to words of four rows."""
    expert, quad = tl.program_id(2).to(tl.int64), tl.program_id(1) * 32 + tl.arange(0, 32)
    column = tl.program_id(0) * 128 + tl.arange(0, 128)
    at = expert * N * K + (quad * 4).to(tl.int64)[:, None] * K + column[None, :]
    x0, x1 = tl.load(w_ptr + at).to(tl.float32), tl.load(w_ptr + at + K).to(tl.float32)
    x2, x3 = tl.load(w_ptr + at + 2 * K).to(tl.float32), tl.load(w_ptr + at + 3 * K).to(tl.float32)
    bits = magnitude_bits(largest(largest(x0, x1), largest(x2, x3)))
    scale = e4m3_scale(tl.max(tl.max(bits, axis=1), axis=0, keep_dims=True), UE8M0)
    one, rows, columns = tl.arange(0, 1), tl.num_programs(1), tl.num_programs(0)
    tl.store(s_ptr + (expert * rows + tl.program_id(1)) * columns + tl.program_id(0) + one, scale)
    tl.store(st_ptr + (expert * columns + tl.program_id(0)) * rows + tl.program_id(1) + one, scale)
    scale = scale[:, None]
    x0, x1, x2, x3 = over(x0, scale, UE8M0), over(x1, scale, UE8M0), over(x2, scale, UE8M0), over(x3, scale, UE8M0)
    tl.store(q_ptr + at, x0.to(tl.float8e4nv))
    tl.store(q_ptr + at + K, x1.to(tl.float8e4nv))
    tl.store(q_ptr + at + 2 * K, x2.to(tl.float8e4nv))
    tl.store(q_ptr + at + 3 * K, x3.to(tl.float8e4nv))
    at_t = (expert * K + column)[:, None] * (N // 4) + quad[None, :]
    tl.store(qt_ptr + at_t, tl.trans(word_of(x0, x1, x2, x3)))


def turn(operand: Operand) -> Operand:
    """The transpose of the last two dimensions, copied."""
    q, scale_inv = operand.q, operand.scale_inv.transpose(-1, -2).contiguous()
    *lead, n, k = q.shape
    if on_device(q) and n % 4 == 0 and q.is_contiguous():
        q_t, grid = q.new_empty((*lead, k, n)), (cdiv(k, 64), cdiv(n, 128), q[..., 0, 0].numel())
        _turn[grid](q.view(torch.uint8), q_t.view(torch.int32), n, k, num_warps=4)
    else:
        q_t = q.view(torch.uint8).transpose(-1, -2).contiguous().view(FP8)
    return Operand(q_t, scale_inv, operand.group[::-1], operand.joined)


@jit
def _turn(q_ptr, qt_ptr, N, K):
    """One program: 128 rows of 64 columns of one expert's bytes. qt_ptr points to words of four rows."""
    expert = tl.program_id(2).to(tl.int64)
    quad = tl.program_id(1) * 32 + tl.arange(0, 32)
    column = tl.program_id(0) * 64 + tl.arange(0, 64)
    at = expert * N * K + (quad * 4).to(tl.int64)[:, None] * K + column[None, :]
    inside = (quad * 4 < N)[:, None] & (column < K)[None, :]  # N is a multiple of 4: all rows of a quad or none
    b0 = tl.load(q_ptr + at, mask=inside, other=0).to(tl.int32)
    b1 = tl.load(q_ptr + at + K, mask=inside, other=0).to(tl.int32)
    b2 = tl.load(q_ptr + at + 2 * K, mask=inside, other=0).to(tl.int32)
    b3 = tl.load(q_ptr + at + 3 * K, mask=inside, other=0).to(tl.int32)
    word, words = b0 | (b1 << 8) | (b2 << 16) | (b3 << 24), N // 4
    at_t = expert * K * words + column.to(tl.int64)[:, None] * words + quad[None, :]
    tl.store(qt_ptr + at_t, tl.trans(word), mask=(column < K)[:, None] & (quad < words)[None, :])


# ---- tokens and slots -------------------------------------------------------------------------------------------------


def slots(rows: Operand, plan: Dispatch) -> Operand:
    """The rows of tokens (N, C) in the order of the experts, (M, C); zeros in slots that fill up a block."""
    if not on_device(rows.q):
        found, limit = rows.gather(plan.token_M), plan.slot_NK.numel()
        if len(plan.choice_M) > limit:
            found.q.view(torch.uint8).masked_fill_((plan.choice_M >= limit).unsqueeze(1), 0)
        return found
    (n, c), m, k = rows.q.shape, len(plan.choice_M), plan.slot_NK.shape[1]
    q, s = rows.q.new_empty((m, c)), empty_scales(rows.scale_inv, m, c)
    _slots[(cdiv(m, 32), cdiv(c, 128))](
        rows.q.view(torch.uint8), rows.scale_inv, plan.choice_M, q.view(torch.uint8), s, m, n * k, c, rows.q.stride(0),
        *rows.scale_inv.stride(), *s.stride(), k, num_warps=4,
    )  # fmt: skip
    return Operand(q, s, (1, 128))


def columns(rows: Operand, scale: str, plan: Dispatch | None = None) -> Turned:
    """Quantised rows (N, C), dequantised, quantised again along the rows: of the tokens, or with ``plan`` of the slots."""
    if not on_device(rows.q):
        wide = (rows if plan is None else slots(rows, plan)).dequantize()
        return Turned(*quantize_tile_t(wide, scale=scale, column_major=True))
    (n, c), k = rows.q.shape, 0 if plan is None else plan.slot_NK.shape[1]
    m, choice = (len(plan.choice_M), plan.choice_M) if k else (n, rows.q)
    found, stride = empty_turned(rows.q, m, c), rows.q.stride(0)
    width, step, warps = COLUMNS
    _columns[(cdiv(c, width), cdiv(m, 128))](
        rows.q, rows.scale_inv, choice, words(found), found.scale_inv, m, n * max(k, 1), c, stride,
        *rows.scale_inv.stride(), found.q.stride(0) // 4, *found.scale_inv.stride(), k, scale == "ue8m0", width,
        1 if stride % step else step, num_warps=warps,
    )  # fmt: skip
    return found


def empty_turned(like: Tensor, m: int, c: int) -> Turned:
    """Room for the transpose of (M, C)."""
    return Turned(like.new_empty((c, cdiv(m, 16) * 16), dtype=FP8)[:, :m], empty_scales(like, c, m))


def empty_scales(like: Tensor, m: int, c: int) -> Tensor:
    """Room for the column-major scales of (M, C)."""
    return like.new_empty((cdiv(c, 128), cdiv(m, 4) * 4), dtype=torch.float32).t()[:m]


def words(turned: Turned) -> Tensor:
    """The rows of a turned operand, with what fills them up, as int32."""
    q = turned.q
    return q.as_strided((len(q), q.stride(0)), (q.stride(0), 1)).view(torch.int32)


@jit(varying=("M", "limit"))
def _slots(q_ptr, s_ptr, choice_ptr, out_ptr, s_out_ptr, M, limit, C, q_stride, s_stride_m, s_stride_c,
           so_stride_m, so_stride_c, CHOSEN: tl.constexpr):
    slot = tl.program_id(0) * 32 + tl.arange(0, 32)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    choice = tl.load(choice_ptr + slot, mask=slot < M, other=limit)
    token = choice // CHOSEN
    valid = choice < limit
    inside = (column < C)[None, :]
    q = tl.load(q_ptr + token[:, None] * q_stride + column[None, :], mask=valid[:, None] & inside, other=0)
    tl.store(out_ptr + slot.to(tl.int64)[:, None] * C + column[None, :], q, mask=(slot < M)[:, None] & inside)
    scale = tl.load(s_ptr + token * s_stride_m + tl.program_id(1) * s_stride_c, mask=valid, other=1.0)
    tl.store(s_out_ptr + slot * so_stride_m + tl.program_id(1) * so_stride_c, scale, mask=slot < M)


@jit
def _meant(q_ptr, s_ptr, choice_ptr, slot, column, M, limit, C, q_stride, s_stride_m, s_stride_c, CHOSEN: tl.constexpr):
    """q times its scale for the tokens in these slots (CHOSEN 0: of these tokens); zeros where there is none."""
    if CHOSEN:
        choice = tl.load(choice_ptr + slot, mask=slot < M, other=limit)
        token = choice // CHOSEN
    else:
        choice = slot.to(tl.int64)
        token = choice
    valid = choice < limit
    q = tl.load(q_ptr + token[:, None] * q_stride + column[None, :], mask=valid[:, None] & (column < C)[None, :], other=0.0)
    scale = tl.load(s_ptr + token * s_stride_m + tl.min(column, axis=0) // 128 * s_stride_c, mask=valid, other=0.0)
    return q.to(tl.float32) * scale[:, None]


@jit
def store_turned(x0, x1, x2, x3, qt_ptr, st_ptr, quad, block, column, C, row_words, st_stride_c, st_stride_m,
                 UE8M0: tl.constexpr):
    """Rows 4 quad to 4 quad + 3 of 128 rows, quantised down the columns and stored turned. A scale a column."""
    bits = magnitude_bits(largest(largest(x0, x1), largest(x2, x3)))
    scale = e4m3_scale(tl.max(bits, axis=0), UE8M0)
    tl.store(st_ptr + column.to(tl.int64) * st_stride_c + block * st_stride_m, scale, mask=column < C)
    scale = scale[None, :]
    word = word_of(over(x0, scale, UE8M0), over(x1, scale, UE8M0), over(x2, scale, UE8M0), over(x3, scale, UE8M0))
    mask = (column < C)[:, None] & (quad < row_words)[None, :]
    tl.store(qt_ptr + column.to(tl.int64)[:, None] * row_words + quad[None, :], tl.trans(word), mask=mask)


@jit(varying=("M", "limit", "q_stride", "row_words"))
def _columns(q_ptr, s_ptr, choice_ptr, qt_ptr, st_ptr, M, limit, C, q_stride, s_stride_m, s_stride_c, row_words,
             st_stride_c, st_stride_m, CHOSEN: tl.constexpr, UE8M0: tl.constexpr, COLUMNS: tl.constexpr,
             STEP: tl.constexpr):
    """One program: 128 rows of COLUMNS columns, which share a scale a row."""
    q_stride = q_stride // STEP * STEP  # nothing changes; it says how many numbers of a row a thread may load at once
    quad = tl.program_id(1) * 32 + tl.arange(0, 32)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x0 = _meant(q_ptr, s_ptr, choice_ptr, quad * 4, column, M, limit, C, q_stride, s_stride_m, s_stride_c, CHOSEN)
    x1 = _meant(q_ptr, s_ptr, choice_ptr, quad * 4 + 1, column, M, limit, C, q_stride, s_stride_m, s_stride_c, CHOSEN)
    x2 = _meant(q_ptr, s_ptr, choice_ptr, quad * 4 + 2, column, M, limit, C, q_stride, s_stride_m, s_stride_c, CHOSEN)
    x3 = _meant(q_ptr, s_ptr, choice_ptr, quad * 4 + 3, column, M, limit, C, q_stride, s_stride_m, s_stride_c, CHOSEN)
    store_turned(x0, x1, x2, x3, qt_ptr, st_ptr, quad, tl.program_id(1), column, C, row_words, st_stride_c, st_stride_m,
                 UE8M0)


# ---- the input of o_proj ----------------------------------------------------------------------------------------------


def keep_wide(x: Tensor) -> tuple[Operand, Kept12]:
    """(M, C) -> the operand for Fprop, with powers of two for scales, and what is kept, in E5M6."""
    (m, c) = x.shape
    if not on_device(x) or m % 2 or c % 128 or x.stride(1) != 1:
        rows = Operand(*quantize_tile(x.contiguous(), scale="ue8m0", column_major=True), (1, 128))
        return rows, keep_12_bits(x, (1, 128))
    q, s, wide = x.new_empty((m, c), dtype=FP8), empty_scales(x, m, c), x.new_empty((m, c // 128), dtype=torch.float32)
    low, high = x.new_empty(m * c, dtype=torch.uint8), x.new_empty(m * c // 2, dtype=torch.uint8)
    _keep_wide[(cdiv(m // 2, 16), c // 128)](x, q, s, low, high, wide, m // 2, c, x.stride(0), *s.stride(), num_warps=4)
    return Operand(q, s, (1, 128)), Kept12(low, high, wide, (1, 128), x.shape)


def wide_columns(kept: Kept12) -> Turned:
    """What was kept, quantised along the rows with powers of two for scales."""
    (m, c) = kept.shape
    if not on_device(kept.low) or m % 2 or c % 128 or kept.group != (1, 128):
        return Turned(*quantize_tile_t(kept.dequantize(), scale="ue8m0", column_major=True))
    found = empty_turned(kept.low, m, c)
    _wide_columns[(c // 64, cdiv(m, 128))](kept.low, kept.high, kept.scale_inv, words(found), found.scale_inv, m, c,
                                           found.q.stride(0) // 4, *found.scale_inv.stride(), num_warps=4)  # fmt: skip
    return found


@jit
def _wide_scale(amax_bits):
    """The power of two of E5M6 tiles, from the bits of their largest magnitudes."""
    bits = tl.maximum(amax_bits, WIDE_SMALLEST) + (0x7FFFFF - WIDE_TOP)  # the next exponent for larger mantissas
    scale = ((bits & 0x7F800000) - (15 << 23)).to(tl.float32, bitcast=True)
    return tl.where(amax_bits >= 0x7F800000, float("nan"), tl.where(amax_bits == 0, 1.0, scale))


@jit
def _wide_codes(x, scale):
    """The 12 bits of x / scale, rounded to nearest even as minids.fp8.operands.e5m6_codes does."""
    x = x / scale  # exact: a power of two
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 14) << 23)
    anchor = (exponent + (17 << 23)).to(tl.float32, bitcast=True) * 1.5
    rounded = (x + anchor) - anchor
    half = tl.abs(rounded).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (half >> 4) | ((x.to(tl.int32, bitcast=True) >> 20) & 0x800)


@jit
def _keep_rows(x_ptr, q_ptr, s_ptr, low_ptr, wide_ptr, row, inside, C, x_stride, s_stride_m, s_stride_c):
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    row = row.to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    bits = tl.max(magnitude_bits(x), axis=1)
    scale = e4m3_scale(bits, True)
    tl.store(s_ptr + row * s_stride_m + tl.program_id(1) * s_stride_c, scale, mask=inside)
    at = row[:, None] * C + column[None, :]
    tl.store(q_ptr + at, to_e4m3(x, scale[:, None]), mask=inside[:, None])
    wide = _wide_scale(bits)
    tl.store(wide_ptr + row * (C // 128) + tl.program_id(1), wide, mask=inside)
    codes = _wide_codes(x, wide[:, None])
    tl.store(low_ptr + at, (codes & 0xFF).to(tl.uint8), mask=inside[:, None])
    return codes >> 8


@jit(varying=("half",))
def _keep_wide(x_ptr, q_ptr, s_ptr, low_ptr, high_ptr, wide_ptr, half, C, x_stride, s_stride_m, s_stride_c):
    """One program: 16 rows of the first half and the same of the second, whose upper bits share bytes."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    inside = row < half
    first = _keep_rows(x_ptr, q_ptr, s_ptr, low_ptr, wide_ptr, row, inside, C, x_stride, s_stride_m, s_stride_c)
    second = _keep_rows(x_ptr, q_ptr, s_ptr, low_ptr, wide_ptr, row + half, inside, C, x_stride, s_stride_m, s_stride_c)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(high_ptr + at, (first | (second << 4)).to(tl.uint8), mask=inside[:, None])


@jit
def _wide_rows(low_ptr, high_ptr, wide_ptr, row, column, M, C):
    valid = row < M
    row = row.to(tl.int64)
    second = row >= M // 2
    at = row[:, None] * C + column[None, :]
    low = tl.load(low_ptr + at, mask=valid[:, None], other=0).to(tl.int32)
    pair = tl.load(high_ptr + at - tl.where(second, M // 2 * C, 0)[:, None], mask=valid[:, None], other=0).to(tl.int32)
    high = tl.where(second[:, None], pair >> 4, pair & 15)
    x = (((high << 12) | (low << 4)).to(tl.int16)).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.load(wide_ptr + row * (C // 128) + tl.min(column, axis=0) // 128, mask=valid, other=0.0)
    return x * scale[:, None]


@jit(varying=("M", "row_words"))
def _wide_columns(low_ptr, high_ptr, wide_ptr, qt_ptr, st_ptr, M, C, row_words, st_stride_c, st_stride_m):
    quad = tl.program_id(1) * 32 + tl.arange(0, 32)
    column = tl.program_id(0) * 64 + tl.arange(0, 64)
    x0 = _wide_rows(low_ptr, high_ptr, wide_ptr, quad * 4, column, M, C)
    x1 = _wide_rows(low_ptr, high_ptr, wide_ptr, quad * 4 + 1, column, M, C)
    x2 = _wide_rows(low_ptr, high_ptr, wide_ptr, quad * 4 + 2, column, M, C)
    x3 = _wide_rows(low_ptr, high_ptr, wide_ptr, quad * 4 + 3, column, M, C)
    store_turned(x0, x1, x2, x3, qt_ptr, st_ptr, quad, tl.program_id(1), column, C, row_words, st_stride_c, st_stride_m,
                 True)
