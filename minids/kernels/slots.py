"""Combine: each token's sum over the slots that its chosen experts filled (V3 sections 2.1.2 and 3.2.2).

    out[n] = sum over k of y[slot[n, k]]

Gate values were applied before the experts' second product (`swiglu`), so this is a plain sum, in FP32, rounded once. It
is also the backward of dispatch. Floors: every slot is read once, 2 (M + N) D bytes in BF16; M D additions, far below.

Layout: y (M, D) row-major, slot (N, K) row-major. Shapes: M slots, N tokens, K chosen experts, D hidden.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, choose, jit, registered, tl


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


@registered("combine")
def _combine_op(y: Tensor, slot: Tensor) -> Tensor:
    (n, k), d = slot.shape, y.shape[1]
    out = y.new_empty((n, d))
    if out.numel():
        _combine[(n, cdiv(d, 1024))](y, slot, out, d, y.stride(0), k, 1024, num_warps=4)
    return out


@_combine_op.register_fake
def _(y, slot):
    return y.new_empty((slot.shape[0], y.shape[1]))
