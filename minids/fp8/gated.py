"""SwiGLU between two FP8 products, forward and backward, in one pass each (V3 sections 3.3.2, 3.3.3).

    forward     z (M, 2F)                -> h = silu(z_gate) z_up g, 1 x 128, for the second product; z, 1 x 128, to keep
    backward    dh and the kept z        -> dz 1 x 128 for Dgrad, dz and h turned, 128 x 1, for the two Wgrads, and dg

    with s = sigma(z_gate):    dz_gate = dh g z_up s (1 + z_gate (1 - s))      dz_up = dh g z_gate s
                               dg = sum over F of dh z_gate s z_up

As torch operations this is twenty passes over 2F numbers a slot, several in FP32; it took longer than the products that
it stands between. Here forward reads z once and writes 3 bytes for 2 numbers of it, backward reads 4 F bytes a slot and
writes 5 F. Everything in between is FP32, where `Simulated` rounds each step to the model's dtype.

Floors for M slots, z and dh in BF16, at B bytes a second: forward 7 M F / B, backward 9 M F / B. Backward is bound by
instructions instead, about 110 a number of z: five quantisations, and dz made twice, since a number's row and its column
have their scales from 128 others each, which no multiprocessor can hold. So a tile of 128 x 128 is the work of a few small
programs, that read all of it between them twice, the second time from the cache; none waits for another's warps.

Shapes: M slots or tokens, F width, a multiple of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minids.fp8.operands import Operand, quantize
from minids.fp8.turned import FP8, Turned, empty_scales, empty_turned, on_device, store_turned, words
from minids.fp8.words import sigmoid
from minids.kernels.backend import cdiv, jit, tl
from minids.kernels.quantize import e4m3_scale, magnitude_bits, quantize_tile_t, to_e4m3
from minids.model.layers import swiglu_backward, swiglu_forward

BACKWARD = (8, 8, 16, 1)  # rows and columns at a time, programs a tile, warps. From a sweep on an H200


def gated(z_MF: Tensor, weight_M1: Tensor | None, scale: str) -> tuple[Operand, Operand]:
    """z (M, 2F) in any float dtype, gate columns first; weight (M, 1) or None. Returns the operands of h and of z."""
    (m, width) = z_MF.shape
    if not on_device(z_MF):
        return quantize(swiglu_forward(z_MF, None, weight_M1), (1, 128), scale), quantize(z_MF, (1, 128), scale)
    f, z = width // 2, Operand(z_MF.new_empty(z_MF.shape, dtype=FP8), empty_scales(z_MF, m, width), (1, 128))
    h = Operand(z_MF.new_empty((m, f), dtype=FP8), empty_scales(z_MF, m, f), (1, 128))
    _gated[(cdiv(m, 16), f // 128)](
        z_MF, z_MF if weight_M1 is None else weight_M1, h.q, h.scale_inv, z.q, z.scale_inv, m, f, z_MF.stride(0),
        *h.scale_inv.stride(), *z.scale_inv.stride(), weight_M1 is not None, scale == "ue8m0", num_warps=4,
    )  # fmt: skip
    return h, z


def gated_backward(
    dh_MF: Tensor, z: Operand, weight_M1: Tensor | None, scale: str
) -> tuple[Operand, Turned, Turned, Tensor | None]:
    """dz for Dgrad, dz for Wgrad, h for Wgrad, and the gradient of the weight, (M, 1) in its dtype."""
    (m, f) = dh_MF.shape
    if not on_device(dh_MF):
        return _reference(dh_MF, z, weight_M1, scale)
    dz = Operand(dh_MF.new_empty((m, 2 * f), dtype=FP8), empty_scales(dh_MF, m, 2 * f), (1, 128))
    dz_t, h_t = empty_turned(dh_MF, m, 2 * f), empty_turned(dh_MF, m, f)
    parts = dh_MF.new_empty((f // 128, m), dtype=torch.float32)
    weight = dh_MF if weight_M1 is None else weight_M1
    rows, columns, programs, warps = BACKWARD
    _backward[(f // 128 * programs, cdiv(m, 128))](
        dh_MF, z.q, z.scale_inv, weight, dz.q, dz.scale_inv, words(dz_t), dz_t.scale_inv, words(h_t), h_t.scale_inv, parts,
        m, f, dz_t.q.stride(0) // 4, *z.scale_inv.stride(), *dz.scale_inv.stride(), *dz_t.scale_inv.stride(),
        *h_t.scale_inv.stride(), weight_M1 is not None, scale == "ue8m0", rows, columns, programs, num_warps=warps,
    )  # fmt: skip
    d_weight = None if weight_M1 is None else parts.sum(0).unsqueeze(-1).to(weight_M1.dtype)
    return dz, dz_t, h_t, d_weight


def _reference(dh_MF: Tensor, z: Operand, weight_M1: Tensor | None, scale: str):
    z_MF = z.dequantize(dh_MF.dtype)
    h = swiglu_forward(z_MF, None, weight_M1)
    dz, _, d_weight = swiglu_backward(dh_MF, z_MF, None, weight_M1)
    turned = [Turned(*quantize_tile_t(t, scale=scale, column_major=True)) for t in (dz, h)]
    return quantize(dz, (1, 128), scale), *turned, d_weight


@jit
def _store_tile(x, q_ptr, s_ptr, at, row, inside, s_stride_m, UE8M0: tl.constexpr):
    """A tile of each row: its numbers and its scale."""
    scale = e4m3_scale(tl.max(magnitude_bits(x), axis=1), UE8M0)
    tl.store(s_ptr + row * s_stride_m, scale, mask=inside)
    tl.store(q_ptr + at, to_e4m3(x, scale[:, None]), mask=inside[:, None])


@jit(varying=("M",))
def _gated(z_ptr, weight_ptr, hq_ptr, hs_ptr, zq_ptr, zs_ptr, M, F, z_stride, hs_stride_m, hs_stride_f, zs_stride_m,
           zs_stride_f, WEIGHTED: tl.constexpr, UE8M0: tl.constexpr):
    """One program: 16 rows of 128 channels."""
    row = (tl.program_id(0) * 16 + tl.arange(0, 16)).to(tl.int64)
    tile = tl.program_id(1)
    column = tile * 128 + tl.arange(0, 128)
    inside = row < M
    at = z_ptr + row[:, None] * z_stride + column[None, :]
    gate = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside[:, None], other=0.0).to(tl.float32)
    h = gate * sigmoid(gate) * up
    if WEIGHTED:
        h *= tl.load(weight_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = row[:, None] * F + column[None, :]
    _store_tile(h, hq_ptr, hs_ptr + tile * hs_stride_f, at, row, inside, hs_stride_m, UE8M0)
    at += row[:, None] * F
    _store_tile(gate, zq_ptr, zs_ptr + tile * zs_stride_f, at, row, inside, zs_stride_m, UE8M0)
    _store_tile(up, zq_ptr, zs_ptr + (tile + F // 128) * zs_stride_f, at + F, row, inside, zs_stride_m, UE8M0)


@jit
def _gradients(dh_ptr, zq_ptr, zs_ptr, weight_ptr, row, column, M, F, zs_stride_m, zs_stride_f, WEIGHTED: tl.constexpr):
    """dz_gate, dz_up, h and each row's share of dg, of these rows and columns; the columns are of one tile."""
    inside = row < M
    row = row.to(tl.int64)
    at = row[:, None] * F + column[None, :]
    dh = tl.load(dh_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    at += row[:, None] * F
    gate = tl.load(zq_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    up = tl.load(zq_ptr + at + F, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = zs_ptr + row * zs_stride_m + tl.min(column, axis=0) // 128 * zs_stride_f
    gate *= tl.load(scale, mask=inside, other=0.0)[:, None]
    up *= tl.load(scale + F // 128 * zs_stride_f, mask=inside, other=0.0)[:, None]
    sigma = sigmoid(gate)
    silu = gate * sigma
    h = silu * up
    part = tl.sum(dh * h, axis=1)
    if WEIGHTED:
        weight = tl.load(weight_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        h *= weight
        dh *= weight
    return dh * up * (sigma + silu * (1.0 - sigma)), dh * silu, h, part


@jit
def _row_pass(dh_ptr, zq_ptr, zs_ptr, weight_ptr, dq_ptr, ds_ptr, part_ptr, row, tile, M, F, zs_stride_m, zs_stride_f,
              ds_stride_m, ds_stride_f, WEIGHTED: tl.constexpr, UE8M0: tl.constexpr):
    """dz of these rows for Dgrad."""
    column = tile * 128 + tl.arange(0, 128)
    d_gate, d_up, _, part = _gradients(dh_ptr, zq_ptr, zs_ptr, weight_ptr, row, column, M, F, zs_stride_m, zs_stride_f,
                                       WEIGHTED)
    inside = row < M
    row = row.to(tl.int64)
    if WEIGHTED:
        tl.store(part_ptr + tile.to(tl.int64) * M + row, part, mask=inside)
    at = row[:, None] * (2 * F) + column[None, :]
    _store_tile(d_gate, dq_ptr, ds_ptr + tile * ds_stride_f, at, row, inside, ds_stride_m, UE8M0)
    _store_tile(d_up, dq_ptr, ds_ptr + (tile + F // 128) * ds_stride_f, at + F, row, inside, ds_stride_m, UE8M0)


@jit(varying=("M", "row_words"))
def _backward(dh_ptr, zq_ptr, zs_ptr, weight_ptr, dq_ptr, ds_ptr, dt_ptr, dts_ptr, ht_ptr, hts_ptr, part_ptr, M, F,
              row_words, zs_stride_m, zs_stride_f, ds_stride_m, ds_stride_f, dts_stride_f, dts_stride_m, hts_stride_f,
              hts_stride_m, WEIGHTED: tl.constexpr, UE8M0: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              PARTS: tl.constexpr):
    """PARTS programs: a tile of 128 rows and 128 channels; each takes a share of its rows, ROWS at a time, and a share of
    its columns, COLUMNS at a time."""
    tl.static_assert(128 // PARTS % ROWS == 0 and 128 // PARTS % COLUMNS == 0)
    tile, block, share = tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(0) % PARTS
    for part in range(128 // PARTS // ROWS):
        row = block * 128 + share * (128 // PARTS) + part * ROWS + tl.arange(0, ROWS)
        _row_pass(dh_ptr, zq_ptr, zs_ptr, weight_ptr, dq_ptr, ds_ptr, part_ptr, row, tile, M, F, zs_stride_m, zs_stride_f,
                  ds_stride_m, ds_stride_f, WEIGHTED, UE8M0)
    quad = block * 32 + tl.arange(0, 32)
    for part in range(128 // PARTS // COLUMNS):
        column = tile * 128 + share * (128 // PARTS) + part * COLUMNS + tl.arange(0, COLUMNS)
        g0, u0, h0, _ = _gradients(dh_ptr, zq_ptr, zs_ptr, weight_ptr, quad * 4, column, M, F, zs_stride_m, zs_stride_f,
                                   WEIGHTED)
        g1, u1, h1, _ = _gradients(dh_ptr, zq_ptr, zs_ptr, weight_ptr, quad * 4 + 1, column, M, F, zs_stride_m,
                                   zs_stride_f, WEIGHTED)
        g2, u2, h2, _ = _gradients(dh_ptr, zq_ptr, zs_ptr, weight_ptr, quad * 4 + 2, column, M, F, zs_stride_m,
                                   zs_stride_f, WEIGHTED)
        g3, u3, h3, _ = _gradients(dh_ptr, zq_ptr, zs_ptr, weight_ptr, quad * 4 + 3, column, M, F, zs_stride_m,
                                   zs_stride_f, WEIGHTED)
        store_turned(g0, g1, g2, g3, dt_ptr, dts_ptr, quad, block, column, F, row_words, dts_stride_f, dts_stride_m, UE8M0)
        store_turned(u0, u1, u2, u3, dt_ptr + F.to(tl.int64) * row_words, dts_ptr + F * dts_stride_f, quad, block, column,
                     F, row_words, dts_stride_f, dts_stride_m, UE8M0)
        store_turned(h0, h1, h2, h3, ht_ptr, hts_ptr, quad, block, column, F, row_words, hts_stride_f, hts_stride_m, UE8M0)
