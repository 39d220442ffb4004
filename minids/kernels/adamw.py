"""AdamW in one pass over weight, gradient and moments, whose moments may be BF16 (V3 section 3.3.3).

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    w = w (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

The problem: written with torch this is a dozen operations a weight, each a pass over memory. All in FP32; moments are
rounded to their own type when they are stored, and the update uses them before.

Floors for a weight's numbers: 12 bytes for weight and gradient, 8 for moments in BF16, 16 in FP32; 15
operations, far below.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, check_shape, choose, jit, registered, tl

MOMENTS = (torch.bfloat16, torch.float32)


def adamw_(
    weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, *, step: int, lr: float, betas: tuple[float, float], eps: float,
    decay: float, backend: str | None = None,
) -> None:
    """One update in place.

    Args:
        weight, gradient: float32 of one shape. m, v: the moments, BF16 or FP32. All contiguous.
        step: t, from 1 on. lr, betas, eps, decay: as torch.optim.AdamW's.
        backend: see `minids.kernels.backend`.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    for name, x in (("weight", weight), ("gradient", gradient), ("m", m), ("v", v)):
        check(name, x, ndim=weight.ndim, dtype=MOMENTS if name in ("m", "v") else torch.float32)
        check_shape(name, x, tuple(weight.shape))
        if not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()} for shape {tuple(x.shape)}, expected a contiguous tensor")
    if step < 1:
        raise ValueError(f"step: got {step}, expected a positive number")
    (b1, b2), name = betas, choose(backend, weight, gradient, m, v)
    run = reference if name == "torch" else _adamw_op
    run(weight, gradient, m, v, 1 - b1, b2, 1 - b2, 1 - lr * decay, lr / (1 - b1**step), 1 - b2**step, eps)


def reference(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, share_1: float, beta_2: float, share_2: float,
              kept: float, rate: float, correction: float, eps: float) -> None:  # fmt: skip
    """The specification."""
    wide_m = m.float().lerp_(gradient, share_1)
    wide_v = v.float().mul_(beta_2).addcmul_(gradient, gradient, value=share_2)
    m.copy_(wide_m)
    v.copy_(wide_v)
    weight.mul_(kept).addcdiv_(wide_m, wide_v.div(correction).sqrt_().add_(eps), value=-rate)


# ---- Triton ----


@jit(varying=("N",))
def _adamw(w_ptr, g_ptr, m_ptr, v_ptr, N, share_1, beta_2, share_2, kept, rate, correction, eps, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    g = tl.load(g_ptr + at, mask=mask, other=0.0)
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=mask, other=0.0)
    m += share_1 * (g - m)
    v = beta_2 * v + share_2 * g * g
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=mask)
    w = w * kept - rate * m / (tl.sqrt_rn(v / correction) + eps)
    tl.store(w_ptr + at, w, mask=mask)


@registered("adamw_", mutates=("weight", "m", "v"))
def _adamw_op(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, share_1: float, beta_2: float, share_2: float,
              kept: float, rate: float, correction: float, eps: float) -> None:  # fmt: skip
    n = weight.numel()
    if n:
        _adamw[(cdiv(n, 1024),)](weight, gradient, m, v, n, share_1, beta_2, share_2, kept, rate, correction, eps, 1024,
                                 num_warps=4)  # fmt: skip
    for x in (weight, m, v):
        torch.autograd.graph.increment_version(x)


@_adamw_op.register_fake
def _(weight, gradient, m, v, share_1, beta_2, share_2, kept, rate, correction, eps):
    return None
