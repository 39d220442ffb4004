"""RMSNorm, forward and backward, one pass over memory each (V3 section 3.2.3 computes it again in backward).

    r = 1 / sqrt(mean(x^2) + eps)    y = x r w    g = dy w    dx = r (g - x r mean(g x r))    dw = sum over rows of dy x r

All in FP32, rounded once. In a transformer x is a sum, x + delta, that goes on beside the norm, and gradients come back on
both ways: `rms_norm_residual` adds in the same passes. Forward keeps x and r; y is not kept. In backward a program takes
every P-th row and keeps its part of dw in registers; the P parts are summed afterwards, in one order, so that every run
gives the same bits.

Floors for M rows of D in BF16: 4 M D bytes forward, 6 M D backward; with the sum 8 and 8. 4 to 12 operations a number, far
below.

Shapes: M rows, D columns.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, check_shape, choose, jit, multiprocessors, registered, tl, traced

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
    _check(x, weight, eps, out_dtype)
    if choose(backend, x, weight) == "torch":
        return reference(x, weight, eps, out_dtype)
    return _rms_norm(x, weight, eps, out_dtype)[0]


def _check(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None) -> None:
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


def rms_norm_residual(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float = 1e-6, *, out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual connection's sum and the norm of it, each way in one pass: x + delta in x's dtype, and `rms_norm` of it.

    Without ``delta``: x and its norm; forward is `rms_norm`'s, backward adds up the gradients of both.
    delta: (M, D) of any of the types, unit stride inside rows. The other arguments, and errors, as `rms_norm`'s.
    """
    _check(x, weight, eps, out_dtype)
    if delta is not None:
        check("delta", delta, ndim=2, dtype=DTYPES)
        check_shape("delta", delta, tuple(x.shape))
        if delta.stride(1) != 1:
            raise ValueError(f"delta: got strides {delta.stride()}, expected unit stride inside rows")
    given = (x, weight) if delta is None else (x, delta, weight)
    if choose(backend, *given) == "torch" or traced():
        total = x if delta is None else (x + delta).to(x.dtype)
        return total, rms_norm(total, weight, eps, out_dtype=out_dtype, backend=backend)
    return _Residual.apply(x, delta, weight, eps, out_dtype)


def reference(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """The specification; its gradients are autograd's."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(out_dtype or x.dtype)


# ---- Triton ----


@jit(varying=("M",))
def _forward(x_ptr, delta_ptr, w_ptr, total_ptr, y_ptr, r_ptr, M, D, x_stride, delta_stride, eps, ADD: tl.constexpr,
             BLOCK: tl.constexpr):
    """One program: a row. ADD: of x + delta, which is stored, rounded, and read again: so y has the bits that it will have
    when it is made again of what was stored."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    x_ptr += row * x_stride
    if ADD:
        total = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(delta_ptr + row * delta_stride + column, mask=mask, other=0.0).to(tl.float32)
        x_ptr = total_ptr + row * D
        tl.store(x_ptr + column, total.to(total_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()
    x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / D + eps)
    w = tl.load(w_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + column, (x * r * w).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(r_ptr + row, r)


@jit(varying=("M",))
def _backward(dy_ptr, d_total_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, low_ptr, dw_ptr, M, D, dy_stride, d_total_stride, x_stride,
              ADD: tl.constexpr, LOW: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr):
    """One program: every P-th row. ADD: another gradient of x joins. LOW: dx in another dtype as well. AHEAD: stages of the
    loads."""
    column = tl.arange(0, BLOCK)
    mask = column < D
    w = tl.load(w_ptr + column, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    mine = tl.program_id(0).to(tl.int64)
    for turn in tl.range(0, tl.cdiv(M - tl.program_id(0), tl.num_programs(0)), num_stages=AHEAD):
        row = mine + turn * tl.num_programs(0)
        r = tl.load(r_ptr + row)
        normed = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32) * r
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
        g = dy * w
        dx = r * (g - normed * (tl.sum(g * normed, axis=0) / D))
        if ADD:
            dx += tl.load(d_total_ptr + row * d_total_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if LOW:
            tl.store(low_ptr + row * D + column, dx.to(low_ptr.dtype.element_ty), mask=mask)
        dw += dy * normed
    tl.store(dw_ptr + tl.program_id(0) * D + column, dw, mask=mask)


@jit(varying=("P",))
def _add_up(parts_ptr, dw_ptr, P, D):
    """One program: 32 columns of dw."""
    column = tl.program_id(0) * 32 + tl.arange(0, 32)
    total = tl.zeros((64, 32), tl.float32)
    for start in range(0, P, 64):
        part = start + tl.arange(0, 64)
        at = parts_ptr + part[:, None].to(tl.int64) * D + column[None, :]
        total += tl.load(at, mask=(part < P)[:, None] & (column < D)[None, :], other=0.0)
    tl.store(dw_ptr + column, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), mask=column < D)


def _block(d: int) -> tuple[int, int]:
    """Columns of a program, a power of two, and its warps."""
    block = 1 << (d - 1).bit_length()
    return block, min(16, max(1, block // 512))


WARPS = 16  # of _backward that a multiprocessor has registers for


def _launch_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor, y: Tensor, r: Tensor, eps: float
) -> None:
    (m, d), (block, warps) = x.shape, _block(x.shape[1])
    second = x if delta is None else delta
    if m:
        _forward[(m,)](x, second, weight, total, y, r, m, d, x.stride(0), second.stride(0), eps, delta is not None, block,
                       num_warps=warps)  # fmt: skip


def _launch_backward(
    dy: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, r: Tensor, low: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, the same in ``low``, dw."""
    (m, d), dx = x.shape, x.new_empty(x.shape)
    other = dx if low in (None, dx.dtype) else x.new_empty(x.shape, dtype=low)
    if m == 0:
        return dx, other, torch.zeros_like(weight)
    (block, warps), second = _block(d), dy if d_total is None else d_total
    ahead = 3 if x.itemsize == 2 else 1  # from a sweep on an H200: in 16 bits rows are loaded ahead
    programs = min(m, max(1, min(4, WARPS // warps)) * multiprocessors(x.device))  # all run at once
    parts = x.new_empty((programs, d), dtype=torch.float32)
    _backward[(programs,)](dy, second, x, weight, r, dx, other, parts, m, d, dy.stride(0), second.stride(0), x.stride(0),
                           d_total is not None, other is not dx, ahead, block, num_warps=warps)  # fmt: skip
    dw = torch.empty_like(weight)
    _add_up[(cdiv(d, 32),)](parts, dw, programs, d, num_warps=4)
    return dx, other, dw


@registered("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    y, r = _empty(x, out_dtype)
    _launch_forward(x, None, weight, x, y, r, eps)
    return y, r


@registered("rms_norm_backward")
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    dx, _, dw = _launch_backward(dy, None, x, weight, r)
    return dx, dw


class _Residual(torch.autograd.Function):
    """x + delta (or x itself) and its norm: the gradients of both meet in the one pass that backward is."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype | None):
        (y, r), total = _empty(x, out_dtype), x if delta is None else x.new_empty(x.shape)
        _launch_forward(x, delta, weight, total, y, r, eps)
        ctx.save_for_backward(total, weight, r)
        ctx.low = None if delta is None else delta.dtype
        ctx.set_materialize_grads(False)
        return (x.view_as(x) if delta is None else total), y

    @staticmethod
    def backward(ctx, d_total: Tensor | None, dy: Tensor | None):
        x, weight, r = ctx.saved_tensors
        if dy is None:
            return d_total, None if ctx.low is None or d_total is None else d_total.to(ctx.low), None, None, None
        d_total = None if d_total is None else d_total.contiguous()
        dx, low, dw = _launch_backward(dy.contiguous(), d_total, x, weight, r, ctx.low)
        return dx, None if ctx.low is None else low, dw, None, None


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
