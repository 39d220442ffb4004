"""Between tokens and slots: combine sums what the chosen experts made of a token, spread copies a token to its slots (V3
sections 2.1.2 and 3.2.2).

    combine    out[n] = sum over k of y[slot[n, k]]               spread    out[slot[n, k]] = x[n]

Each is the other's backward. Gate values were applied before the experts' second product (`swiglu`), so combine is a plain
sum, in FP32, rounded once. Spread goes from tokens to slots and not the other way round, so that a token is read once.

Floors of both: every token and every slot once, 2 (M + N) D bytes in BF16; M D additions, far below.

Layout: y, x row-major, slot (N, K) row-major. Shapes: M slots, N tokens, K chosen experts, D hidden.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, check_shape, choose, jit, registered, tl


def combine(y: Tensor, slot: Tensor, *, backend: str | None = None) -> Tensor:
    """Sums each token's slots.

    Args:
        y: (M, D) bfloat16, unit stride inside rows. slot: (N, K) int64, contiguous, values in [0, M); not checked on the
            device.
        backend: see `minids.kernels.backend`.

    Returns:
        (N, D) bfloat16.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("y", y, ndim=2, dtype=torch.bfloat16)
    check("slot", slot, ndim=2, dtype=torch.int64)
    if y.stride(1) != 1 or not slot.is_contiguous():
        raise ValueError(f"y, slot: got strides {y.stride()} and {slot.stride()}, expected unit stride inside rows")
    if choose(backend, y, slot) == "torch":
        return reference(y, slot)
    return _combine_op(y, slot)


def spread(x: Tensor, slot: Tensor, *, backend: str | None = None) -> Tensor:
    """Copies each token to its slots, of which there are no others.

    Args:
        x: (N, D) bfloat16, unit stride inside rows. slot: (N, K) int64, contiguous, each of 0 to N K - 1 once; not checked
            on the device.

    Returns:
        (N K, D) bfloat16. Not differentiable.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("x", x, ndim=2, dtype=torch.bfloat16)
    check("slot", slot, ndim=2, dtype=torch.int64)
    check_shape("slot", slot, (len(x), slot.shape[1]))
    if x.stride(1) != 1 or not slot.is_contiguous():
        raise ValueError(f"x, slot: got strides {x.stride()} and {slot.stride()}, expected unit stride inside rows")
    if choose(backend, x, slot) == "torch":
        return x.new_empty(slot.numel(), x.shape[1]).index_copy_(0, slot.flatten(), x.repeat_interleave(slot.shape[1], 0))
    return _spread_op(x, slot)


def reference(y: Tensor, slot: Tensor) -> Tensor:
    """The specification."""
    return y[slot].float().sum(1).to(y.dtype)


@jit
def _combine(y_ptr, slot_ptr, out_ptr, D, y_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)  # tokens in the first dimension: the others end at 65,535
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot_ptr + token * K + k)
        total += tl.load(y_ptr + row * y_stride + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + column, total.to(tl.bfloat16), mask=column < D)


@jit
def _spread(x_ptr, slot_ptr, out_ptr, D, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one token, to all of its slots."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * x_stride + column, mask=column < D, other=0.0)
    for k in tl.static_range(K):
        row = tl.load(slot_ptr + token * K + k)
        tl.store(out_ptr + row * D + column, x, mask=column < D)


@registered("combine")
def _combine_op(y: Tensor, slot: Tensor) -> Tensor:
    (n, k), d = slot.shape, y.shape[1]
    out = y.new_empty((n, d))
    if out.numel():
        _combine[(n, cdiv(d, 1024))](y, slot, out, d, y.stride(0), k, 1024, num_warps=4)
    return out


@registered("spread")
def _spread_op(x: Tensor, slot: Tensor) -> Tensor:
    (n, k), d = slot.shape, x.shape[1]
    out = x.new_empty((n * k, d))
    if out.numel():
        _spread[(n, cdiv(d, 1024))](x, slot, out, d, x.stride(0), k, 1024, num_warps=4)
    return out


@_combine_op.register_fake
def _(y, slot):
    return y.new_empty((slot.shape[0], y.shape[1]))


@_spread_op.register_fake
def _(x, slot):
    return x.new_empty((slot.numel(), x.shape[1]))
