"""The kernels of notebook 06, from the obvious one to the fast one, measured by `minids.bench.kernel_ladder`.

Two operations, each a ladder: every rung changes one thing and computes the same.

    quantise 1 x 128    s = max |x| / 448 of 128 channels, q = round_to_E4M3(x / s): bound by memory
    FP8 product         C = A B^T with a scale for 1 x 128 of A and for 128 x 128 of B: bound by arithmetic

The last rung of each is the package's own kernel, `minids.kernels`. Simplified here: whole tiles only (the notebook's
exercise 2 lifts that), no NaN, no infinity. Each kernel rounds to the type that its result's tensor has: under Triton's
CPU interpreter, whose conversion to FP8 is wrong, that is FP32, and torch rounds.

The notebook shows the same functions and asserts that their text is the same, hence their lines of 79.
Shapes: M tokens (rows of A), N output channels (rows of B), K input channels.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minids.kernels.backend import TILE, TensorDescriptor, cdiv, jit, tl
from minids.kernels.gemm_fp8 import tile_of

# ---- quantise 1 x 128 ----


@jit
def one_tile(x_ptr, q_ptr, s_ptr, tiles):
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    x = tl.load(x_ptr + at).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=0)
    scale = tl.where(amax == 0, 1.0, amax / 448)
    tl.store(s_ptr + tl.program_id(0), scale)
    tl.store(q_ptr + at, (x / scale).to(q_ptr.dtype.element_ty))


@jit
def many_tiles(x_ptr, q_ptr, s_ptr, tiles, TILES: tl.constexpr):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    at = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = tile < tiles
    x = tl.load(x_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    scale = tl.where(amax == 0, 1.0, amax / 448)
    tl.store(s_ptr + tile, scale, mask=mask)
    q = x / scale[:, None]
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), mask=mask[:, None])


@jit
def true_division(x_ptr, q_ptr, s_ptr, tiles, TILES: tl.constexpr):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    at = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = tile < tiles
    x = tl.load(x_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    scale = tl.where(amax == 0, 1.0, tl.div_rn(amax, 448.0))
    tl.store(s_ptr + tile, scale, mask=mask)
    q = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), mask=mask[:, None])


@jit
def reciprocal(x_ptr, q_ptr, s_ptr, tiles, TILES: tl.constexpr):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    at = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = tile < tiles
    x = tl.load(x_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    scale = tl.where(amax == 0, 1.0, tl.div_rn(amax, 448.0))
    tl.store(s_ptr + tile, scale, mask=mask)
    q = x * (1.0 / scale)[:, None]
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), mask=mask[:, None])


@jit
def corrected(x_ptr, q_ptr, s_ptr, tiles, TILES: tl.constexpr):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    at = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = tile < tiles
    x = tl.load(x_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    scale = tl.where(amax == 0, 1.0, tl.div_rn(amax, 448.0))
    tl.store(s_ptr + tile, scale, mask=mask)
    minus = x * -1.0                   # all signs are turned: so -0 stays -0
    inverse = tl.broadcast_to((-1.0 / scale)[:, None], x.shape)
    scale = tl.broadcast_to(scale[:, None], x.shape)
    q = minus * inverse                # off by a unit or two
    missing = tl.fma(q, scale, minus)  # q s - x, rounded once
    q = tl.fma(missing, inverse, q)
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), mask=mask[:, None])


# ---- FP8 product ----


@jit
def one_number(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr,
               M, N, K, a_stride):
    m, n = tl.program_id(0) // N, tl.program_id(0) % N
    total = 0.0
    for k in range(K // 128):
        c = k * 128 + tl.arange(0, 128)
        a = tl.load(a_ptr + m * K + c).to(tl.float32)
        b = tl.load(b_ptr + n * K + c).to(tl.float32)
        a_scale = tl.load(a_scale_ptr + k * a_stride + m)
        b_scale = tl.load(b_scale_ptr + n // 128 * (K // 128) + k)
        total += tl.sum(a * b, axis=0) * (a_scale * b_scale)
    tl.store(c_ptr + m * N + n, total.to(c_ptr.dtype.element_ty))


@jit
def widened_tiles(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr,
                  M, N, K, a_stride, BM: tl.constexpr, BN: tl.constexpr):
    n_tiles = tl.cdiv(N, BN)
    m = tl.program_id(0) // n_tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % n_tiles * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(K // 128):
        c = k * 128 + tl.arange(0, 128)
        a = tl.load(a_ptr + m[:, None] * K + c[None, :]).to(tl.float32)
        b = tl.load(b_ptr + n[None, :] * K + c[:, None]).to(tl.float32)
        a_scale = tl.load(a_scale_ptr + k * a_stride + m)
        b_scale = tl.load(b_scale_ptr + n // 128 * (K // 128) + k)
        a, b = a * a_scale[:, None], b * b_scale[None, :]
        total = tl.dot(a, b, total)
    at = c_ptr + m[:, None] * N + n[None, :]
    tl.store(at, total.to(c_ptr.dtype.element_ty))


@jit
def scaled_tiles(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr,
                 M, N, K, a_stride, BM: tl.constexpr, BN: tl.constexpr):
    n_tiles = tl.cdiv(N, BN)
    m = tl.program_id(0) // n_tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % n_tiles * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(K // 128):
        c = k * 128 + tl.arange(0, 128)
        a = tl.load(a_ptr + m[:, None] * K + c[None, :])  # FP8, as it is
        b = tl.load(b_ptr + n[None, :] * K + c[:, None])
        a_scale = tl.load(a_scale_ptr + k * a_stride + m)
        b_scale = tl.load(b_scale_ptr + n // 128 * (K // 128) + k)
        total += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
    at = c_ptr + m[:, None] * N + n[None, :]
    tl.store(at, total.to(c_ptr.dtype.element_ty))


@jit
def grouped_tiles(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr,
                  M, N, K, a_stride, BM: tl.constexpr, BN: tl.constexpr,
                  GROUP: tl.constexpr):
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM),
                          tl.cdiv(N, BN), GROUP)
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(K // 128):
        c = k * 128 + tl.arange(0, 128)
        a = tl.load(a_ptr + m[:, None] * K + c[None, :])
        b = tl.load(b_ptr + n[None, :] * K + c[:, None])
        scale = tl.load(a_scale_ptr + k * a_stride + m)
        scale *= tl.load(b_scale_ptr + column * BN // 128 * (K // 128) + k)
        total += tl.dot(a, b) * scale[:, None]
    at = c_ptr + m[:, None] * N + n[None, :]
    tl.store(at, total.to(c_ptr.dtype.element_ty))


@jit
def copied_tiles(a_desc, a_scale_ptr, b_desc, b_scale_ptr, c_ptr,
                 M, N, K, a_stride, BM: tl.constexpr, BN: tl.constexpr,
                 GROUP: tl.constexpr):
    row, column = tile_of(tl.program_id(0), tl.cdiv(M, BM),
                          tl.cdiv(N, BN), GROUP)
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(K // 128):
        a = a_desc.load([row * BM, k * 128])
        b = b_desc.load([column * BN, k * 128])
        scale = tl.load(a_scale_ptr + k * a_stride + m)
        scale *= tl.load(b_scale_ptr + column * BN // 128 * (K // 128) + k)
        total += tl.dot(a, b.T) * scale[:, None]
    at = c_ptr + m[:, None] * N + n[None, :]
    tl.store(at, total.to(c_ptr.dtype.element_ty))


# ---- a limit ----


@jit
def read_again(x_ptr, out_ptr, blocks, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    """Reads TIMES blocks of a buffer that fits into L2, past the multiprocessor's own cache."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in range(TIMES):
        block = (tl.program_id(0) + 7 * turn) % blocks
        total += tl.load(x_ptr + block * BLOCK + i, cache_modifier=".cg")
    tl.store(out_ptr + tl.program_id(0) * BLOCK + i, total)


# ---- the ladders ----


@dataclass(frozen=True)
class Rung:
    """A kernel, how it is cut (its constants), and how it is launched (warps, stages)."""

    name: str
    kernel: Any
    cut: dict[str, int] = field(default_factory=dict)
    launch: dict[str, int] = field(default_factory=dict)


QUANTIZE = [
    Rung("one tile a program", one_tile, {}, {"num_warps": 4}),
    Rung("one warp a program", one_tile, {}, {"num_warps": 1}),
    Rung("16 tiles a program", many_tiles, {"TILES": 16}, {"num_warps": 4}),
    Rung("a true division", true_division, {"TILES": 16}, {"num_warps": 4}),
    Rung("times the reciprocal", reciprocal, {"TILES": 16}, {"num_warps": 4}),
    Rung("reciprocal, corrected", corrected, {"TILES": 16}, {"num_warps": 4}),
]
PRODUCT = [
    Rung("one number a program", one_number, {}, {"num_warps": 1}),
    Rung("tiles, widened to FP32", widened_tiles, {"BM": 64, "BN": 64}, {"num_warps": 4, "num_stages": 2}),
    Rung("FP8 tiles, sums scaled", scaled_tiles, {"BM": 64, "BN": 64}, {"num_warps": 4, "num_stages": 3}),
    Rung("wider tiles", scaled_tiles, {"BM": 64, "BN": 128}, {"num_warps": 4, "num_stages": 3}),
    Rung("one scale of B a tile", grouped_tiles, {"BM": 64, "BN": 128, "GROUP": 1}, {"num_warps": 4, "num_stages": 3}),
    Rung("tiles in groups of rows", grouped_tiles, {"BM": 64, "BN": 128, "GROUP": 16}, {"num_warps": 4, "num_stages": 3}),
    Rung("the copy engine (TMA)", copied_tiles, {"BM": 64, "BN": 128, "GROUP": 16}, {"num_warps": 4, "num_stages": 3}),
]


def quantize(rung: Rung, x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """One rung of the first ladder.

    Args:
        x: (M, K) contiguous, K a multiple of 128. dtype: of q; FP32 gives the quotients before they are rounded.

    Returns:
        q (M, K) and its scales (M, K / 128) in FP32.
    """
    if x.ndim != 2 or x.shape[1] % TILE or not x.is_contiguous():
        raise ValueError(f"x: got shape {tuple(x.shape)}, strides {x.stride()}; expected contiguous (M, K), 128 dividing K")
    q, s = torch.empty_like(x, dtype=dtype), x.new_empty((len(x), x.shape[1] // TILE), dtype=torch.float32)
    rung.kernel[(cdiv(s.numel(), rung.cut.get("TILES", 1)),)](x, q, s, s.numel(), **rung.cut, **rung.launch)
    return q, s


def product(
    rung: Rung, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """One rung of the second ladder: A B^T.

    Args:
        a: (M, K). b: (N, K). a_scale: (M, K / 128), tokens adjacent in memory. b_scale: (N / 128, K / 128) contiguous.
        M, N multiples of the rung's tile, K of 128. dtype: of the result.
    """
    (m, k), n, cut = a.shape, len(b), rung.cut
    bm, bn = cut.get("BM", 1), cut.get("BN", 1)
    if m % bm or n % bn or k % TILE or a_scale.stride(0) != 1:
        raise ValueError(
            f"a, b, a_scale: got shapes {tuple(a.shape)}, {tuple(b.shape)} and strides {a_scale.stride()}; expected "
            f"(M, K), (N, K) in multiples of {bm}, {bn} and 128, and scales with tokens adjacent"
        )
    c = a.new_empty((m, n), dtype=dtype)
    if rung.kernel is copied_tiles:
        a, b = TensorDescriptor.from_tensor(a, [bm, TILE]), TensorDescriptor.from_tensor(b, [bn, TILE])
    rung.kernel[(m // bm * (n // bn),)](a, a_scale, b, b_scale, c, m, n, k, a_scale.stride(1), **cut, **rung.launch)
    return c
