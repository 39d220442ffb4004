"""FP8 matrix product with block scales, summed in FP32 every 128 channels (V3 section 3.3.2, figure 7b).

The problem: A (M, K) has a scale a token and 128 channels, B (N, K) one a block of 128 x 128 (a weight) or one a row and
128 channels (both factors of a weight gradient). And Hopper's tensor core keeps about 14 bits of a running FP8 sum. Both
ask for the same: leave the tensor core every 128 channels, scale the partial sum, and add it up in FP32 registers.

    C[m, n] = sum_k  a_scale[m, k] b_scale[n / 128, k] * (sum over the 128 channels c of block k of  A[m, c] B[n, c])

The three products of a linear layer y = x W^T are this one: forward A = x, B = W; input gradient A = dy, B = W^T; weight
gradient A = dy^T, B = x^T, both quantised along tokens, FP32 out.

Floors: 2 M N K operations at the tensor core's FP8 rate; M K + N K bytes of operands, scales of 4 / 128 a number of A, and
the result. Promotion costs one multiply-add a number of C every 128 channels: a quarter of the cycles of the tensor
core's own work, which another program on the same multiprocessor must hide.

The kernel: a program has one tile of C. Tiles come in groups of rows, so that programs that run together share operands in
L2. The copy engine (TMA) brings both operands to shared memory, several steps ahead, and fills with zeros what lies
outside, so M and N are any numbers. Rows of A and B start at multiples of 16 bytes: K is one, or the rows are padded. Few
tiles and a long K (decoding) are split along K, and a second kernel sums the parts.

On Hopper, from 129 rows on, `gemm_fp8_gluon` computes the same 1.3 to 1.6 times as fast: there one program overlaps it. For
few rows `gemm_fp8_few` does where its tiles fill the multiprocessors once or twice.

Layout: A, B row-major E4M3; a_scale in either order (column-major is faster); C row-major.
Shapes: M tokens, N output channels, K input channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minids.kernels.backend import (
    OUT_DTYPES,
    TILE,
    TensorDescriptor,
    capability,
    cdiv,
    check,
    check_rows,
    check_shape,
    choose,
    jit,
    multiprocessors,
    registered,
    tl,
)  # fmt: skip


def fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """A B^T of two block-scaled E4M3 matrices.

    Args:
        a: (M, K) float8_e4m3fn. a_scale: (M, ceil(K / 128)) float32.
        b: (N, K) float8_e4m3fn. b_scale: (ceil(N / 128), ceil(K / 128)) or (N, ceil(K / 128)) float32.
        out_dtype: torch.bfloat16 or torch.float32.
        backend: see `minids.kernels.backend`.

    Returns:
        (M, N) in out_dtype.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    _check(a, a_scale, b, b_scale, out_dtype)
    if choose(backend, a, a_scale, b, b_scale) == "torch":
        return reference(a, a_scale, b, b_scale, out_dtype)
    return _fp8_gemm(a, a_scale, b, b_scale, out_dtype)


# ---- reference ----


def reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """The specification: one exact-input FP32 product every 128 channels, scaled and summed in FP32."""
    if len(b_scale) != len(b):
        b_scale = b_scale.repeat_interleave(TILE, 0)[: len(b)]
    out = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device)
    for k in range(a_scale.shape[1]):
        channels = slice(k * TILE, (k + 1) * TILE)
        out += (a[:, channels].float() @ b[:, channels].float().t()) * (a_scale[:, k, None] * b_scale[:, k])
    return out.to(out_dtype)


# ---- Triton ----


@jit
def scaled_sum(a_desc, b_desc, a_scale_ptr, b_scale_ptr, a_row, b_row, b_first, a_rows, b_rows, k_begin, k_end,
               a_stride_m, a_stride_k, b_stride_n, b_stride_k,
               BM: tl.constexpr, BN: tl.constexpr, B_ROWS: tl.constexpr, STAGES: tl.constexpr):
    """One (BM, BN) tile of A B^T over the 128-channel blocks k_begin to k_end. a_row, b_row: its first rows in A and B;
    a_rows, b_rows: how many rows A and B have. b_first: the row of b_desc where B begins, if it holds several. B_ROWS: B
    has a scale a row; else one a 128 rows."""
    m = a_row + tl.arange(0, BM)
    a_scale_ptrs = a_scale_ptr + m.to(tl.int64) * a_stride_m
    if B_ROWS:
        n = b_row + tl.arange(0, BN)
        b_scale_ptrs = b_scale_ptr + n.to(tl.int64) * b_stride_n
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(k_begin, k_end, num_stages=STAGES):  # said here, it has the scales fetched ahead as well
        a_scale = tl.load(a_scale_ptrs + k * a_stride_k, mask=m < a_rows, other=0.0)
        if B_ROWS:
            b_scale = tl.load(b_scale_ptrs + k * b_stride_k, mask=n < b_rows, other=0.0)
        else:
            a_scale *= tl.load(b_scale_ptr + (b_row // 128) * b_stride_n + k * b_stride_k)
        a = a_desc.load([a_row, k * 128])
        b = b_desc.load([b_first + b_row, k * 128])
        if B_ROWS:
            total += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
        else:
            total += tl.dot(a, b.T) * a_scale[:, None]
    return total


@jit
def store_tile(c_ptr, tile, row, column, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Writes a tile into a row-major matrix of `columns` columns; nothing at or beyond row `rows`."""
    m = row + tl.arange(0, BM)
    n = column + tl.arange(0, BN)
    mask = (m[:, None] < rows) & (n[None, :] < columns)
    tl.store(c_ptr + m.to(tl.int64)[:, None] * columns + n[None, :], tile.to(c_ptr.dtype.element_ty), mask=mask)


@jit
def tile_of(index, m_tiles, n_tiles, GROUP: tl.constexpr):
    """The row and column of tile number `index` when GROUP rows of tiles are walked column by column."""
    in_group = GROUP * n_tiles
    first = index // in_group * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@jit(varying=("M",))
def _gemm(a_desc, b_desc, c_ptr, a_scale_ptr, b_scale_ptr, M, N, K, a_stride_m, a_stride_k, b_stride_n, b_stride_k,
          BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, B_ROWS: tl.constexpr,
          STAGES: tl.constexpr):
    m_tiles, n_tiles, k_blocks = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, 128)
    part_blocks = tl.cdiv(k_blocks, SPLITS)
    part = tl.program_id(1)
    m_tile, n_tile = tile_of(tl.program_id(0), m_tiles, n_tiles, GROUP)
    total = scaled_sum(a_desc, b_desc, a_scale_ptr, b_scale_ptr, m_tile * BM, n_tile * BN, 0, M, N,
                       part * part_blocks, tl.minimum((part + 1) * part_blocks, k_blocks),
                       a_stride_m, a_stride_k, b_stride_n, b_stride_k, BM, BN, B_ROWS, STAGES)
    store_tile(c_ptr + part.to(tl.int64) * M * N, total, m_tile * BM, n_tile * BN, M, N, BM, BN)


@jit
def _sum_parts(parts_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of SPLITS parts, in their order: the same bits in every run."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + part * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


class Config(NamedTuple):
    """How a product is cut: tile sides, rows of tiles in a group, parts along K, warps and pipeline stages."""

    bm: int
    bn: int
    group: int = 8
    splits: int = 1
    warps: int = 4
    stages: int = 3


def config_for(m: int, n: int, k: int, processors: int) -> Config:
    """The cut for a shape, from a sweep on an H200."""
    if m > 128:
        return Config(64, 128, group=16)
    programs = cdiv(m, 64) * cdiv(n, 64)
    splits = 4 if k >= 32 * TILE and programs < processors else 1
    return Config(64, 64, splits=splits, stages=5 if programs * splits < 2 * processors else 3)


def prefers_gluon(m: int, n: int, out_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the Gluon kernel runs: on Hopper, for more than a few rows, if the result's rows are whole 16 bytes."""
    return m > 128 and n * out_dtype.itemsize % 16 == 0 and capability(device)[0] == 9


def prefers_few(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, processors: int
) -> bool:
    """Whether the Gluon kernel for few rows runs: on Hopper, for a BF16 result, a scale a block of B and column-major
    scales of A (others would be copied first), where it was faster on an H200: tiles for most multiprocessors, at most
    two for each, and a K that is worth its beginning."""
    (m, k), n = a.shape, len(b)
    able = capability(a.device)[0] == 9 and out_dtype == torch.bfloat16 and n % 8 == 0
    able = able and len(b_scale) != n and a_scale.stride(0) == 1
    return able and m <= 128 and k >= 2048 and 0.75 * processors <= cdiv(m, 64) * cdiv(n, 64) <= 2 * processors


def launch(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, c: Config) -> Tensor:
    """The kernel with a given cut."""
    (m, k), n = a.shape, len(b)
    out = a.new_empty((m, n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    parts = out if c.splits == 1 else a.new_empty((c.splits, m, n), dtype=torch.float32)
    _gemm[(cdiv(m, c.bm) * cdiv(n, c.bn), c.splits)](
        TensorDescriptor.from_tensor(a, [c.bm, TILE]), TensorDescriptor.from_tensor(b, [c.bn, TILE]), parts,
        a_scale, b_scale, m, n, k, *a_scale.stride(), *b_scale.stride(),
        c.bm, c.bn, c.group, c.splits, len(b_scale) == n, c.stages, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    if c.splits > 1:
        _sum_parts[(cdiv(m * n, 1024),)](parts, out, m * n, c.splits, 1024, num_warps=4)
    return out


@registered("fp8_gemm")
def _fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    check_rows("a", a)
    check_rows("b", b)
    if prefers_gluon(len(a), len(b), out_dtype, a.device):
        from minids.kernels import gemm_fp8_gluon

        return gemm_fp8_gluon.gemm(a, a_scale, b, b_scale, out_dtype)
    processors = multiprocessors(a.device)
    if prefers_few(a, a_scale, b, b_scale, out_dtype, processors):
        from minids.kernels import gemm_fp8_few

        return gemm_fp8_few.gemm(a, a_scale, b, b_scale)
    config = config_for(len(a), len(b), a.shape[1], processors)
    return launch(a, a_scale, b, b_scale, out_dtype, config)


@_fp8_gemm.register_fake
def _(a, a_scale, b, b_scale, out_dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _check(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> None:
    for name, q, s in (("a", a, a_scale), ("b", b, b_scale)):
        check(name, q, ndim=2, dtype=torch.float8_e4m3fn)
        check(f"{name}_scale", s, ndim=2, dtype=torch.float32)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, expected {' or '.join(map(str, OUT_DTYPES))}")
    (m, k), n = a.shape, len(b)
    if k == 0 or b.shape[1] != k:
        raise ValueError(f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (M, K) and (N, K), K > 0")
    check_shape("a_scale", a_scale, (m, cdiv(k, TILE)))
    check_shape("b_scale", b_scale, (cdiv(n, TILE), cdiv(k, TILE)), (n, cdiv(k, TILE)))
