"""Grouped matrix product in FP8: the experts' three products with block scales (V3 sections 3.3.1 and 3.3.2).

The problem is that of `grouped` in the arithmetic of `fp8_gemm`: each expert's rows, quantised 1 x 128, times the expert's
matrix, quantised 128 x 128, promoted to FP32 every 128 channels. The weight gradient sums over an expert's rows in blocks
of 128, each with a scale, so a block must not hold two experts' rows: the caller fills every expert up to a multiple of
128 rows (`plan_dispatch(routing, multiple=128)`) and the ends are multiples of 128.

    Y[rows of e]  = A[rows of e] B[e]^T         forward; and input gradient, with B[e] = W[e]^T
    dW[e] = sum over the 128-row blocks of e    dY_block^T X_block,  both quantised 128 x 1

Floors: 2 M N K operations at the FP8 rate; A, the result and the matrices of experts that have rows, once each. The weight
gradient first reads dY and X in BF16 and writes them transposed in FP8, 3 M (N + K) bytes; then the larger of 2 M N K
operations and M (N + K) + 4 E N K bytes, since its result is FP32.

Layout: A (M, K), B (E, N, K) row-major. FP8 tensor cores want both factors with the summed index adjacent in memory: hence
the transposed copies. Shapes: M rows (token slots), E experts, N output channels, K input channels.
"""

import torch
from torch import Tensor

from minids.kernels.backend import (
    OUT_DTYPES,
    TILE,
    TensorDescriptor,
    cdiv,
    check,
    check_ends,
    check_rows,
    check_shape,
    choose,
    jit,
    registered,
    tl,
)  # fmt: skip
from minids.kernels.gemm_fp8 import prefers_gluon, scaled_sum, store_tile, tile_of
from minids.kernels.gemm_fp8 import reference as gemm_reference
from minids.kernels.grouped import blocks_of, find_tiles
from minids.kernels.quantize import quantize_tile_t

FP8 = torch.float8_e4m3fn


def grouped_fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, *, out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """Rows ends[e - 1] to ends[e] of a times b[e] transposed, block-scaled.

    Args:
        a: (M, K) float8_e4m3fn. a_scale: (M, ceil(K / 128)) float32.
        b: (E, N, K) float8_e4m3fn, contiguous. b_scale: (E, ceil(N / 128), ceil(K / 128)) float32.
        ends: (E,) int32, non-decreasing multiples of 128, the last one at most M. Not checked on the device.
        out_dtype: torch.bfloat16 or torch.float32.
        backend: see `minids.kernels.backend`.

    Returns:
        (M, N) in out_dtype. Rows at and beyond ends[-1], if any, are not defined.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    _check(a, a_scale, b, b_scale, ends, out_dtype)
    if choose(backend, a, a_scale, b, b_scale, ends) == "torch":
        return reference(a, a_scale, b, b_scale, ends, out_dtype)
    return _grouped_fp8_gemm(a, a_scale, b, b_scale, ends, out_dtype)


def grouped_fp8_wgrad(dy: Tensor, x: Tensor, ends: Tensor, *, scale: str = "fp32", backend: str | None = None) -> Tensor:
    """dW[e] = dy[rows of e]^T x[rows of e], both quantised 128 x 1 (128 rows of one channel share a scale).

    Args:
        dy: (M, N). x: (M, K). Both BF16, FP16 or FP32.
        ends: (E,) int32, non-decreasing multiples of 128, the last one at most M. Not checked on the device.
        scale: "fp32", or "ue8m0" for powers of two.

    Returns:
        (E, N, K) float32; zeros for an expert without rows.
    """
    check_ends(ends, len(ends))
    if dy.ndim != 2 or x.ndim != 2 or len(dy) != len(x) or len(x) % TILE:
        raise ValueError(
            f"dy, x: got shapes {tuple(dy.shape)} and {tuple(x.shape)}, expected (M, N) and (M, K), M a multiple of 128"
        )
    name = choose(backend, dy, x, ends)
    (dy_t, dy_scale), (x_t, x_scale) = (quantize_tile_t(t, scale=scale, column_major=True, backend=name) for t in (dy, x))
    if name == "torch":
        return wgrad_reference(dy_t, dy_scale, x_t, x_scale, ends)
    return _grouped_fp8_wgrad(dy_t, dy_scale, x_t, x_scale, ends)


# ---- reference ----


def reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The specification: `fp8_gemm`'s, expert by expert."""
    parts = zip(blocks_of(a, ends), blocks_of(a_scale, ends), b, b_scale, strict=True)
    out = torch.cat([gemm_reference(*part, out_dtype) for part in parts])
    return torch.cat([out, out.new_zeros(len(a) - len(out), out.shape[1])])


def wgrad_reference(dy_t: Tensor, dy_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor) -> Tensor:
    """The specification of the weight gradient, from the transposed factors."""
    _check_multiples(ends)
    blocks = ends // TILE
    columns = zip(blocks_of(dy_t.t(), ends), blocks_of(dy_scale.t(), blocks), blocks_of(x_t.t(), ends),
                  blocks_of(x_scale.t(), blocks), strict=True)  # fmt: skip
    return torch.stack([gemm_reference(*(part.t() for part in parts)) for parts in columns])


# ---- Triton ----


@jit(varying=("M", "E", "m_tiles", "b_stride_e", "b_stride_n"))
def _grouped(a_desc, b_desc, c_ptr, a_scale_ptr, b_scale_ptr, tiles_ptr, M, N, K, E, m_tiles,
             a_stride_m, a_stride_k, b_stride_e, b_stride_n, b_stride_k,
             BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr):
    m_tile, n_tile = tile_of(tl.program_id(0), m_tiles, tl.cdiv(N, BN), GROUP)
    expert = tl.load(tiles_ptr + m_tile * 3)
    row = tl.load(tiles_ptr + m_tile * 3 + 1)
    end = tl.load(tiles_ptr + m_tile * 3 + 2)
    total = scaled_sum(a_desc, b_desc, a_scale_ptr, b_scale_ptr + expert * b_stride_e, row, n_tile * BN, expert * N,
                       M, N, 0, tl.where(expert < E, tl.cdiv(K, 128), 0), a_stride_m, a_stride_k,
                       b_stride_n, b_stride_k, BM, BN, False, STAGES)
    store_tile(c_ptr, total, row, n_tile * BN, end, N, BM, BN)


@jit(varying=("E",))
def _wgrad(a_desc, b_desc, c_ptr, a_scale_ptr, b_scale_ptr, ends_ptr, N, K, E,
           a_stride_n, a_stride_m, b_stride_k, b_stride_m,
           BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr):
    n_tiles, k_tiles = tl.cdiv(N, BN), tl.cdiv(K, BK)
    expert = tl.program_id(0) // (n_tiles * k_tiles)
    n_tile, k_tile = tile_of(tl.program_id(0) % (n_tiles * k_tiles), n_tiles, k_tiles, GROUP)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0) // 128
    total = scaled_sum(a_desc, b_desc, a_scale_ptr, b_scale_ptr, n_tile * BN, k_tile * BK, 0, N, K,
                       start, tl.load(ends_ptr + expert) // 128,
                       a_stride_n, a_stride_m, b_stride_k, b_stride_m, BN, BK, True, STAGES)
    store_tile(c_ptr + expert.to(tl.int64) * N * K, total, n_tile * BN, k_tile * BK, N, K, BN, BK)


FORWARD = {"BM": 64, "BN": 128, "GROUP": 4, "STAGES": 3, "num_warps": 4, "num_stages": 3}
WGRAD = {"BN": 64, "BK": 128, "GROUP": 16, "STAGES": 3, "num_warps": 4, "num_stages": 3}


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, out_dtype: torch.dtype, config: dict[str, int]
) -> Tensor:
    """The forward kernel with a given cut."""
    (m, k), (e, n, _), c = a.shape, b.shape, config
    out = a.new_empty((m, n), dtype=out_dtype)
    if m == 0:
        return out
    tiles = find_tiles(ends, m, c["BM"])
    _grouped[(len(tiles) * cdiv(n, c["BN"]),)](
        TensorDescriptor.from_tensor(a, [c["BM"], TILE]), TensorDescriptor.from_tensor(b.flatten(0, 1), [c["BN"], TILE]),
        out, a_scale, b_scale, tiles, m, n, k, e, len(tiles),
        *a_scale.stride(), *b_scale.stride(), **c,
    )  # fmt: skip
    return out


def launch_wgrad(
    dy_t: Tensor, dy_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, config: dict[str, int]
) -> Tensor:
    """The weight gradient's kernel with a given cut."""
    n, k, e, c = len(dy_t), len(x_t), len(ends), config
    out = x_t.new_empty((e, n, k), dtype=torch.float32)
    if x_t.shape[1] == 0:
        return out.zero_()
    _wgrad[(e * cdiv(n, c["BN"]) * cdiv(k, c["BK"]),)](
        TensorDescriptor.from_tensor(dy_t, [c["BN"], TILE]), TensorDescriptor.from_tensor(x_t, [c["BK"], TILE]),
        out, dy_scale, x_scale, ends, n, k, e, *dy_scale.stride(), *x_scale.stride(), **c,
    )  # fmt: skip
    return out


@registered("grouped_fp8_gemm")
def _grouped_fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, out_dtype: torch.dtype
) -> Tensor:
    check_rows("a", a)
    check_rows("b", b)
    if prefers_gluon(len(a), b.shape[1], out_dtype, a.device):
        from minids.kernels import gemm_fp8_gluon

        return gemm_fp8_gluon.grouped(a, a_scale, b, b_scale, find_tiles(ends, len(a), TILE), out_dtype)
    return launch(a, a_scale, b, b_scale, ends, out_dtype, FORWARD)


@registered("grouped_fp8_wgrad")
def _grouped_fp8_wgrad(dy_t: Tensor, dy_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor) -> Tensor:
    if len(dy_t) % TILE == 0 and x_t.shape[1] and prefers_gluon(len(dy_t) + 1, len(x_t), torch.float32, x_t.device):
        from minids.kernels import gemm_fp8_gluon

        return gemm_fp8_gluon.grouped_wgrad(dy_t, dy_scale, x_t, x_scale, ends)
    return launch_wgrad(dy_t, dy_scale, x_t, x_scale, ends, WGRAD)


@_grouped_fp8_gemm.register_fake
def _(a, a_scale, b, b_scale, ends, out_dtype):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@_grouped_fp8_wgrad.register_fake
def _(dy_t, dy_scale, x_t, x_scale, ends):
    return x_t.new_empty((ends.shape[0], dy_t.shape[0], x_t.shape[0]), dtype=torch.float32)


def _check(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, out_dtype: torch.dtype) -> None:
    for name, q, s, ndim in (("a", a, a_scale, 2), ("b", b, b_scale, 3)):
        check(name, q, ndim=ndim, dtype=FP8)
        check(f"{name}_scale", s, ndim=ndim, dtype=torch.float32)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, expected {' or '.join(map(str, OUT_DTYPES))}")
    (m, k), (e, n, _) = a.shape, b.shape
    if 0 in b.shape or b.shape[2] != k:
        raise ValueError(f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (M, K) and (E, N, K), K > 0")
    if not b.is_contiguous():
        raise ValueError(f"b: got strides {b.stride()} for shape {tuple(b.shape)}, expected a contiguous tensor")
    check_shape("a_scale", a_scale, (m, cdiv(k, TILE)))
    check_shape("b_scale", b_scale, (e, cdiv(n, TILE), cdiv(k, TILE)))
    check_ends(ends, e)


def _check_multiples(ends: Tensor) -> None:
    bad = [end for end in ends.tolist() if end % TILE]
    if bad:
        raise ValueError(f"ends: got {bad[0]}, expected multiples of {TILE}: rows that share a scale are one expert's")
