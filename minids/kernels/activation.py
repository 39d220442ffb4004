"""SwiGLU of an expert's joined product, times the token's gate value, quantised on the way out (V3 sections 2.1.2, 3.3.3).

    h[m, f] = silu(both[m, f]) * both[m, F + f] * weight[m]          silu(x) = x / (1 + exp(-x))

The problem: as four operations h is read and written four times before the next product reads it. Here it is computed in
FP32, rounded once, and, for a product in FP8, quantised 1 x 128 before it ever leaves the multiprocessor.

Floors for M rows: M F (4 + 2) bytes in BF16; M F (4 + 1 + 4 / 128) quantised.

Layout: both (M, 2F) row-major, gate columns then up columns. Shapes: M rows (token slots), F expert width.
"""

import torch
from torch import Tensor

from minids.kernels.backend import TILE, cdiv, check, check_shape, choose, jit, tl
from minids.kernels.quantize import SCALES, e4m3_scale, magnitude_bits, to_e4m3
from minids.kernels.quantize import empty as empty_quantized
from minids.kernels.quantize import reference as quantize_reference

BF16 = torch.bfloat16


def swiglu(both: Tensor, weight: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """SwiGLU in one pass. No gradient: training has its own (`minids.model.layers.swiglu`).

    Args:
        both: (M, 2F) bfloat16, unit stride inside rows.
        weight: (M,) float32 gate values, or None for ones.
        backend: see `minids.kernels.backend`.

    Returns:
        h (M, F) bfloat16.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    _check(both, weight)
    if choose(backend, *((both,) if weight is None else (both, weight))) == "torch":
        return reference(both, weight).to(BF16)
    return torch.ops.minids.swiglu(both, weight)


def swiglu_quantize(
    both: Tensor, weight: Tensor | None = None, *, scale: str = "fp32", column_major: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`swiglu`, its FP32 result quantised 1 x 128 without being rounded to BF16 in between.

    Returns:
        q (M, F) float8_e4m3fn and scale_inv (M, ceil(F / 128)) float32, as `quantize_tile` lays them out.
    """
    _check(both, weight)
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(SCALES)}")
    if choose(backend, *((both,) if weight is None else (both, weight))) == "torch":
        h = reference(both, weight)
        q, scale_inv = quantize_reference(h, scale)
        return q, empty_quantized(h, column_major)[1].copy_(scale_inv)
    return torch.ops.minids.swiglu_quantize(both, weight, scale == "ue8m0", column_major)


def reference(both: Tensor, weight: Tensor | None = None) -> Tensor:
    """The specification, in FP32: h (M, F)."""
    gate, up = both.float().chunk(2, -1)
    h = gate / (1 + torch.exp(-gate)) * up
    return h if weight is None else h * weight[:, None]


# ---- Triton ----


@jit(varying=("M",))
def _swiglu(x_ptr, weight_ptr, h_ptr, s_ptr, M, F, x_stride, s_stride_m, s_stride_k,
            ROWS: tl.constexpr, WEIGHTED: tl.constexpr, QUANTIZED: tl.constexpr, UE8M0: tl.constexpr):
    """One program: ROWS rows of 128 channels."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(0) * 128 + tl.arange(0, 128)
    mask = (row[:, None] < M) & (column[None, :] < F)
    at = x_ptr + row[:, None] * x_stride + column[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        h *= tl.load(weight_ptr + row, mask=row < M, other=0.0)[:, None]
    out = h_ptr + row[:, None] * F + column[None, :]
    if QUANTIZED:
        scale = e4m3_scale(tl.max(magnitude_bits(h), axis=1), UE8M0)
        tl.store(s_ptr + row * s_stride_m + tl.program_id(0) * s_stride_k, scale, mask=row < M)
        tl.store(out, to_e4m3(h, scale[:, None]), mask=mask)
    else:
        tl.store(out, h.to(tl.bfloat16), mask=mask)


def _launch(both: Tensor, weight: Tensor | None, h: Tensor, scale_inv: Tensor | None, ue8m0: bool) -> None:
    m, f = h.shape
    s_strides = (0, 0) if scale_inv is None else scale_inv.stride()
    if m:
        _swiglu[(cdiv(f, TILE), cdiv(m, 16))](
            both, both if weight is None else weight, h, h if scale_inv is None else scale_inv, m, f, both.stride(0),
            *s_strides, 16, weight is not None, scale_inv is not None, ue8m0, num_warps=4,
        )  # fmt: skip


def _empty(both: Tensor, dtype: torch.dtype) -> Tensor:
    return both.new_empty((both.shape[0], both.shape[1] // 2), dtype=dtype)


@torch.library.custom_op("minids::swiglu", mutates_args=())
def _swiglu_op(both: Tensor, weight: Tensor | None) -> Tensor:
    h = _empty(both, BF16)
    _launch(both, weight, h, None, False)
    return h


@torch.library.custom_op("minids::swiglu_quantize", mutates_args=())
def _swiglu_quantize(both: Tensor, weight: Tensor | None, ue8m0: bool, column_major: bool) -> tuple[Tensor, Tensor]:
    q, scale_inv = empty_quantized(_empty(both, BF16), column_major)
    _launch(both, weight, q, scale_inv, ue8m0)
    return q, scale_inv


@_swiglu_op.register_fake
def _(both, weight):
    return _empty(both, BF16)


@_swiglu_quantize.register_fake
def _(both, weight, ue8m0, column_major):
    return empty_quantized(_empty(both, BF16), column_major)


def _check(both: Tensor, weight: Tensor | None) -> None:
    check("both", both, ndim=2, dtype=BF16)
    if both.shape[1] == 0 or both.shape[1] % 2:
        raise ValueError(f"both: got shape {tuple(both.shape)}, expected (M, 2F), F > 0")
    if both.stride(1) != 1:
        raise ValueError(f"both: got strides {both.stride()}, expected unit stride inside rows")
    if weight is not None:
        check("weight", weight, ndim=1, dtype=torch.float32)
        check_shape("weight", weight, (len(both),))
        if weight.stride(0) != 1 and len(weight) > 1:
            raise ValueError(f"weight: got strides {weight.stride()}, expected a contiguous vector")
