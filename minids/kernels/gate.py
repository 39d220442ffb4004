"""The gate's product in float32, by tensor cores that multiply BF16 (V3 section 3.3.1 keeps the gate in high precision).

    logits = x W^T          dx = d W          dW = d^T x          x in BF16; W in float32 (or BF16); d = d logits in float32

The problem: N x E logits are few, but float32 products run outside the tensor cores, at a thirtieth of the speed, and want
x, and its gradient, in float32 as well: six passes over N x D beside the three products, 40% of a millisecond a layer.

A float32 number is the sum of three of BF16, 8 bits of mantissa each, and a product of two BF16 numbers is exact in
float32. So a float32 factor is taken apart,

    w = w1 + w2 + w3,     w1 = bf16(w),  w2 = bf16(w - w1),  w3 = bf16(w - w1 - w2),

and x w = x w1 + x w2 + x w3 with no rounding but that of the sum. Sums leave the tensor core, which truncates, every 64
numbers, and are added up in float32. For dx, which is rounded to BF16 at once, both factors' first two parts do,
d1 w1 + d1 w2 + d2 w1, up to 2^-16.

dW sums over all tokens: programs sum over a share of them each, and the shares are added in one order.

Floors for N tokens: x read once forward, once for dW, and dx written once: 6 N D bytes.
Shapes: N tokens, D hidden, E experts.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, check_shape, choose, jit, registered, tl

WEIGHTS = (torch.float32, torch.bfloat16)
# How the three products are cut: tiles, tokens of a program's sum for dW, warps, stages. From a sweep on an H200.
FORWARD = {"BM": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
INPUT = {"BM": 128, "BN": 128, "num_warps": 8, "num_stages": 2}
WEIGHT = {"SHARE": 1024, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3}


def gate_logits(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """x W^T in float32. Differentiable in both; dx is BF16, as x, dW as the weight.

    Args:
        x: (N, D) bfloat16, unit stride inside rows. weight: (E, D) float32 or bfloat16, contiguous; E a power of two from
            16 on, for the kernel.
        backend: see `minids.kernels.backend`.

    Returns:
        (N, E) float32.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("x", x, ndim=2, dtype=torch.bfloat16)
    check("weight", weight, ndim=2, dtype=WEIGHTS)
    check_shape("weight", weight, (len(weight), x.shape[1]))
    if x.shape[1] == 0 or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(
            f"x, weight: got shapes {tuple(x.shape)}, {tuple(weight.shape)} and strides {x.stride()}, {weight.stride()}, "
            "expected D > 0, unit stride inside rows of x and a contiguous weight"
        )
    if choose(backend, x, weight) == "torch":
        return reference(x, weight)
    if len(weight) < 16 or len(weight) & (len(weight) - 1):
        raise ValueError(f"weight: got {len(weight)} experts, expected a power of two from 16 on")
    return _gate_logits(x, weight)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The specification; its gradients are autograd's."""
    return x.float() @ weight.float().t()


# ---- Triton ----


@jit
def _parts(x):
    """Three BF16 numbers whose sum is x."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@jit(varying=("N",))
def _forward(x_ptr, w_ptr, out_ptr, N, D, x_stride, E: tl.constexpr, EXACT: tl.constexpr, BE: tl.constexpr,
             BM: tl.constexpr, BK: tl.constexpr):
    """EXACT: the weight is BF16, and is its own first part."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros((BM, BE), tl.float32)
    for k in range(0, D, BK):
        column = k + tl.arange(0, BK)
        inside = (column < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=(row < N)[:, None] & inside, other=0.0)
        w = tl.load(w_ptr + expert[:, None] * D + column[None, :], mask=inside, other=0.0)
        if EXACT:
            total = tl.fma(tl.dot(x, tl.trans(w)), 1.0, total)  # a plain sum would be the tensor core's, to the end
        else:
            w1, w2, w3 = _parts(w)
            part = tl.dot(x, tl.trans(w2), tl.dot(x, tl.trans(w3)))
            total += tl.dot(x, tl.trans(w1), part)
    tl.store(out_ptr + row[:, None] * E + expert[None, :], total, mask=(row < N)[:, None])


@jit(varying=("N",))
def _input_gradient(d_ptr, w_ptr, dx_ptr, N, D, E: tl.constexpr, EXACT: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr):
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for e in range(0, E, BE):
        expert = e + tl.arange(0, BE)
        d = tl.load(d_ptr + row[:, None] * E + expert[None, :], mask=(row < N)[:, None], other=0.0)
        w = tl.load(w_ptr + expert[:, None] * D + column[None, :], mask=(column < D)[None, :], other=0.0)
        d1, d2, _ = _parts(d)
        if EXACT:
            total = tl.dot(d1, w, tl.dot(d2, w, total))
        else:
            w1, w2, _ = _parts(w)
            total = tl.dot(d1, w1, tl.dot(d1, w2, tl.dot(d2, w1, total)))
    mask = (row < N)[:, None] & (column < D)[None, :]
    tl.store(dx_ptr + row[:, None] * D + column[None, :], total.to(tl.bfloat16), mask=mask)


@jit(varying=("N",))
def _weight_gradient(d_ptr, x_ptr, out_ptr, N, D, x_stride, E: tl.constexpr, BE: tl.constexpr,
                     SHARE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One program: SHARE tokens' part of a tile of dW."""
    expert = tl.program_id(2) * BE + tl.arange(0, BE)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BE, BN), tl.float32)
    for start in range(0, SHARE, BK):
        row = (tl.program_id(1) * SHARE + start + tl.arange(0, BK)).to(tl.int64)
        inside = (row < N)[:, None]
        d = tl.load(d_ptr + row[:, None] * E + expert[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside & (column < D)[None, :], other=0.0)
        d1, d2, d3 = _parts(d)
        part = tl.dot(tl.trans(d2), x, tl.dot(tl.trans(d3), x))
        total += tl.dot(tl.trans(d1), x, part)
    out_ptr += tl.program_id(1).to(tl.int64) * E * D
    tl.store(out_ptr + expert[:, None] * D + column[None, :], total, mask=(column < D)[None, :])


@registered("gate_logits")
def _gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    (n, d), e = x.shape, len(weight)
    out, be = x.new_empty((n, e), dtype=torch.float32), min(e, 128)
    if n:
        _forward[(cdiv(n, FORWARD["BM"]), e // be)](x, weight, out, n, d, x.stride(0), e, weight.dtype == torch.bfloat16,
                                                    BE=be, **FORWARD)  # fmt: skip
    return out


@registered("gate_logits_backward")
def _gate_logits_backward(d: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    (n, width), e = x.shape, len(weight)
    dx, be = x.new_empty((n, width)), min(e, 64)
    if n == 0:
        return dx, torch.zeros_like(weight)
    _input_gradient[(cdiv(n, INPUT["BM"]), cdiv(width, INPUT["BN"]))](
        d, weight, dx, n, width, e, weight.dtype == torch.bfloat16, BE=be, **INPUT
    )
    parts = d.new_empty((cdiv(n, WEIGHT["SHARE"]), e, width))
    _weight_gradient[(cdiv(width, WEIGHT["BN"]), len(parts), e // be)](
        d, x, parts, n, width, x.stride(0), e, BE=be, **WEIGHT
    )
    return dx, parts.sum(0).to(weight.dtype)


@_gate_logits.register_fake
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


@_gate_logits_backward.register_fake
def _(d, x, weight):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d: Tensor):
    return _gate_logits_backward(d.contiguous(), *ctx.saved_tensors)


_gate_logits.register_autograd(_gradients, setup_context=_save)
