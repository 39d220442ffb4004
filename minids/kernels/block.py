"""Quantisation of weights to FP8 in blocks of 128 x 128, and back (V3 section 3.3.2, figure 7a).

    s[i, j] = max |W block i, j| / 448        Q = round_to_E4M3(W / s)        W ~ Q * s

The published checkpoint stores Q as `weight` and s as `weight_scale_inv`. A weight changes once a step, an activation with
every token: one scale a block is enough, and the transpose, which the input gradient wants, needs no second quantisation.
Blocks of zeros, and blocks that are not finite, are treated as `minids.kernels.e4m3` says.

Floors for N x K in BF16: N K (2 + 1) bytes to quantise; N K (1 + 2) back to BF16. About 10 operations a number, far below.

Layout: row-major all. Shapes: E experts (optional), N output rows, K input columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels.backend import E4M3_MAX, TILE, cdiv, check, check_shape, choose, jit, registered, tl
from minids.kernels.e4m3 import SCALES, e4m3_scale, magnitude_bits, scale_of, to_e4m3
from minids.kernels.quantize import FLOATS

FP8 = torch.float8_e4m3fn


def quantize_block(w: Tensor, *, scale: str = "fp32", backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantises each 128 x 128 block with a scale of its own.

    Args:
        w: (N, K) or (E, N, K), BF16, FP16 or FP32, contiguous.
        scale: "fp32", or "ue8m0" for powers of two.
        backend: see `minids.kernels.backend`.

    Returns:
        q float8_e4m3fn of w's shape and scale_inv (..., ceil(N / 128), ceil(K / 128)) float32: w ~ q * scale_inv.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("w", w, ndim=(2, 3), dtype=FLOATS)
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(SCALES)}")
    _check_full("w", w)
    if choose(backend, w) == "torch":
        return reference(w, scale)
    return _quantize_block(w, scale == "ue8m0")


def dequantize_block(
    q: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16, *, backend: str | None = None
) -> Tensor:
    """Each block times its scale, in FP32, rounded once to dtype (torch.bfloat16 or torch.float32).

    Args:
        q: (N, K) or (E, N, K) float8_e4m3fn, contiguous. scale_inv: (..., ceil(N / 128), ceil(K / 128)) float32.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("q", q, ndim=(2, 3), dtype=FP8)
    check("scale_inv", scale_inv, ndim=q.ndim, dtype=torch.float32)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected {' or '.join(map(str, FLOATS))}")
    _check_full("q", q)
    check_shape("scale_inv", scale_inv, _scale_shape(q))
    if choose(backend, q, scale_inv) == "torch":
        return dequantize_reference(q, scale_inv, dtype)
    return _dequantize_block(q, scale_inv.contiguous(), dtype)


# ---- reference ----


def reference(w: Tensor, scale: str = "fp32") -> tuple[Tensor, Tensor]:
    """The specification of `quantize_block`."""
    *_, n, k = w.shape
    blocks = F.pad(w.float(), (0, -k % TILE, 0, -n % TILE)).unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    scale_inv = scale_of(blocks.abs().amax(dim=(-3, -1)), scale)
    scaled = (blocks / scale_inv[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(FP8).flatten(-2).flatten(-3, -2)[..., :n, :k].contiguous(), scale_inv


def dequantize_reference(q: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """The specification of `dequantize_block`."""
    *_, n, k = q.shape
    spread = scale_inv.repeat_interleave(TILE, -2)[..., :n, :].repeat_interleave(TILE, -1)[..., :k]
    return (q.float() * spread).to(dtype)


# ---- Triton ----


@jit
def _block(N, K):
    """Offsets, mask and scale index of this program's block."""
    row = (tl.program_id(1) * 128 + tl.arange(0, 128)).to(tl.int64)
    column = tl.program_id(0) * 128 + tl.arange(0, 128)
    expert = tl.program_id(2).to(tl.int64)
    mask = (row[:, None] < N) & (column[None, :] < K)
    scale = (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    return expert * N * K + row[:, None] * K + column[None, :], mask, scale


@jit
def _quantize(w_ptr, q_ptr, s_ptr, N, K, UE8M0: tl.constexpr):
    at, mask, scale_at = _block(N, K)
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = e4m3_scale(tl.max(tl.max(magnitude_bits(w), axis=1), axis=0, keep_dims=True), UE8M0)
    tl.store(s_ptr + scale_at + tl.arange(0, 1), scale)
    tl.store(q_ptr + at, to_e4m3(w, scale[:, None]), mask=mask)


@jit
def _dequantize(q_ptr, s_ptr, w_ptr, N, K):
    at, mask, scale_at = _block(N, K)
    w = tl.load(q_ptr + at, mask=mask, other=0.0).to(tl.float32) * tl.load(s_ptr + scale_at)
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=mask)


def _grid(w: Tensor) -> tuple[int, int, int]:
    return cdiv(w.shape[-1], TILE), cdiv(w.shape[-2], TILE), w.shape[0] if w.ndim == 3 else 1


@registered("quantize_block")
def _quantize_block(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    q, scale_inv = w.new_empty(w.shape, dtype=FP8), w.new_empty(_scale_shape(w), dtype=torch.float32)
    _quantize[_grid(w)](w, q, scale_inv, *w.shape[-2:], ue8m0, num_warps=8)
    return q, scale_inv


@registered("dequantize_block")
def _dequantize_block(q: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    w = q.new_empty(q.shape, dtype=dtype)
    _dequantize[_grid(q)](q, scale_inv, w, *q.shape[-2:], num_warps=8)
    return w


@_quantize_block.register_fake
def _(w, ue8m0):
    return w.new_empty(w.shape, dtype=FP8), w.new_empty(_scale_shape(w), dtype=torch.float32)


@_dequantize_block.register_fake
def _(q, scale_inv, dtype):
    return q.new_empty(q.shape, dtype=dtype)


def _scale_shape(w: Tensor) -> tuple[int, ...]:
    *leading, n, k = w.shape
    return (*leading, cdiv(n, TILE), cdiv(k, TILE))


def _check_full(name: str, w: Tensor) -> None:
    if 0 in w.shape:
        raise ValueError(f"{name}: got shape {tuple(w.shape)}, expected no empty dimension")
    if not w.is_contiguous():
        raise ValueError(f"{name}: got strides {w.stride()} for shape {tuple(w.shape)}, expected a contiguous tensor")
