"""RMSNorm, forward and backward, one pass over memory each (V3 section 3.2.3 computes it again in backward).

    r = 1 / sqrt(mean(x^2) + eps)    y = x r w    g = dy w    dx = r (g - x r mean(g x r))    dw = sum over rows of dy x r

All in FP32, rounded once. Forward keeps x and r; y is not kept. In backward a program takes every P-th row and keeps its
part of dw in registers; the P parts are summed afterwards, in one order, so that every run gives the same bits.

Floors for M rows of D in BF16: 4 M D bytes forward, 6 M D backward; 4 and 10 operations a number, far below.

Shapes: M rows, D columns.
"""

import torch
from torch import Tensor

from minids.kernels.backend import check, check_shape, choose, jit, multiprocessors, registered, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, out_dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """RMSNorm over the last dimension. Differentiable in x and weight.

    Args:
        x: (M, D) BF16, FP16 or FP32, unit stride inside rows. weight: (D,) of any of these types, contiguous.
        eps: positive.
        out_dtype: of the result, one of these types; None is x's.
        backend: see `minids.kernels.backend`.

    Returns:
        (M, D) in out_dtype.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("x", x, ndim=2, dtype=DTYPES)
    check("weight", weight, ndim=1, dtype=DTYPES)
    check_shape("weight", weight, (x.shape[1],))
    if x.shape[1] == 0 or x.stride(1) != 1 or weight.stride(0) != 1:
        raise ValueError(
            f"x, weight: got shapes {tuple(x.shape)}, {tuple(weight.shape)} and strides {x.stride()}, {weight.stride()}, "
            "expected at least one column and unit stride along it"
        )
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected a positive number")
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, expected {' or '.join(map(str, DTYPES))}")
    if choose(backend, x, weight) == "torch":
        return reference(x, weight, eps, out_dtype)
    return _rms_norm(x, weight, eps, out_dtype)[0]


def reference(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """The specification; its gradients are autograd's."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(out_dtype or x.dtype)


# ---- Triton ----


@jit(varying=("M",))
def _forward(x_ptr, w_ptr, y_ptr, r_ptr, M, D, x_stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / D + eps)
    w = tl.load(w_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + column, (x * r * w).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(r_ptr + row, r)


@jit(varying=("M",))
def _backward(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, dw_ptr, M, D, dy_stride, x_stride, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = column < D
    w = tl.load(w_ptr + column, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    mine = tl.program_id(0).to(tl.int64)
    for turn in range(0, tl.cdiv(M - tl.program_id(0), tl.num_programs(0))):
        row = mine + turn * tl.num_programs(0)
        r = tl.load(r_ptr + row)
        normed = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32) * r
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
        g = dy * w
        dx = r * (g - normed * (tl.sum(g * normed, axis=0) / D))
        tl.store(dx_ptr + row * D + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += dy * normed
    tl.store(dw_ptr + tl.program_id(0) * D + column, dw, mask=mask)


def _block(d: int) -> tuple[int, int]:
    """Columns of a program, a power of two, and its warps."""
    block = 1 << (d - 1).bit_length()
    return block, min(16, max(1, block // 512))


@registered("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    (m, d), (y, r) = x.shape, _empty(x, out_dtype)
    block, warps = _block(d)
    if m:
        _forward[(m,)](x, weight, y, r, m, d, x.stride(0), eps, block, num_warps=warps)
    return y, r


@registered("rms_norm_backward")
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    (m, d), dx = x.shape, x.new_empty(x.shape)
    if m == 0:
        return dx, torch.zeros_like(weight)
    block, warps = _block(d)
    programs = min(m, 4 * multiprocessors(x.device))
    parts = x.new_empty((programs, d), dtype=torch.float32)
    _backward[(programs,)](dy, x, weight, r, dx, parts, m, d, dy.stride(0), x.stride(0), block, num_warps=warps)
    return dx, parts.sum(0).to(weight.dtype)


def _empty(x: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype), x.new_empty(x.shape[0], dtype=torch.float32)


@_rms_norm.register_fake
def _(x, weight, eps, out_dtype=None):
    return _empty(x, out_dtype)


@_rms_norm_backward.register_fake
def _(dy, x, weight, r):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight = inputs[:2]
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor, _):
    dx, dw = _rms_norm_backward(dy.contiguous(), *ctx.saved_tensors)
    return dx, dw, None, None


_rms_norm.register_autograd(_gradients, setup_context=_save)
