"""Routed experts in BF16, forward and backward: dispatch, two grouped products, SwiGLU, combine (V3 section 2.1.2).

    x_slot = x[token]      z = x_slot W_up^T      h = silu(z_gate) z_up g      y = h W_down^T      out[n] = sum of its y
    dy = d out[token]      dh = dy W_down         dz, dg, h from dh and z      dW_down = dy^T h
                           dx_slot = dz W_up      dx[n] = sum of its dx_slot   dW_up = dz^T x_slot

The problem: slots are K times as many as tokens, so whatever touches them besides the products costs. Here that is one
copy and one sum each way, and one pass for SwiGLU, which on Hopper the first product does on its way out (`grouped_gluon`).
z alone is kept of all slots, for the backward pass if there is one. x_slot and h are made again, which costs a pass each
and saves 2 D + 2 F bytes a slot and layer.

Weights may be FP32 masters beside BF16 copies: the products read the copies, the gradients leave in FP32 without having
been BF16 in between.

Floors for M slots: 6 M F D operations forward, twice that backward; 2 M (3 D + 4 F) bytes beside the products' own.

Shapes: N tokens, K chosen, M = N K slots, E experts, D hidden, F expert width.
"""

import torch
from torch import Tensor

from minids.kernels.activation import _swiglu_op, swiglu_backward
from minids.kernels.backend import asked, check, check_shape, registered
from minids.kernels.grouped import TILE, find_tiles, grouped_gemm, grouped_wgrad, prefers_gluon
from minids.kernels.slots import combine, spread

BF16 = torch.bfloat16


def routed_experts(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, token: Tensor, slot: Tensor, ends: Tensor, choice: Tensor, *,
    copies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """sum_k g_k Expert_k(x), for a CUDA device or the interpreter. Differentiable in the first four.

    Args:
        x: (N, D) bfloat16. weights: (N, K) float32, the gate values.
        gate_up: (E, 2F, D), down: (E, D, F), both bfloat16; or both float32 with ``copies`` in bfloat16. D and F are
            multiples of 8.
        token, slot, ends, choice: of `plan_slots` with multiple 1.

    Returns:
        (N, D) bfloat16.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    low = (gate_up, down) if copies is None else copies
    check("x", x, ndim=2, dtype=BF16)
    check("weights", weights, ndim=2, dtype=torch.float32)
    check_shape("weights", weights, (len(x), slot.shape[1]))
    check_shape("down", down, (len(gate_up), x.shape[1], gate_up.shape[1] // 2))
    for name, w, own in zip(("gate_up", "down"), low, (gate_up, down), strict=True):
        check(name, w, ndim=3, dtype=BF16)
        check_shape(name, w, tuple(own.shape))
    low = [w.detach() for w in low]  # where there are no copies: differentiated as gate_up and down
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    return _forward(x, weights, gate_up, down, *low, token, slot, ends, choice, keep)[0]


def fuses(gate_up: Tensor) -> bool:
    """Whether the first product ends with SwiGLU: on Hopper, if the experts' width F is a multiple of 128, so that no tile
    of gate columns holds some of up's."""
    e, width, d = gate_up.shape
    return (prefers_gluon(width // 2, BF16, gate_up.device) and width % 256 == 0 and d % 8 == 0
            and gate_up.is_contiguous() and gate_up.data_ptr() % 16 == 0)  # fmt: skip


@registered("routed_experts")
def _forward(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, low_gate_up: Tensor, low_down: Tensor, token: Tensor,
    slot: Tensor, ends: Tensor, choice: Tensor, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum, and what is kept of all slots: z, if keep, and the gate values."""
    gates = weights.flatten().index_select(0, choice)
    tiles = find_tiles(ends, len(token), TILE)
    x_slot = spread(x.contiguous(), slot)
    if len(x) and fuses(low_gate_up):
        from minids.kernels.grouped_gluon import swiglu_up  # needs Triton, which is optional

        h, both = swiglu_up(x_slot, low_gate_up, ends, tiles, gates, keep)
    else:
        both = grouped_gemm(x_slot, low_gate_up, ends, tiles=tiles)
        h = _swiglu_op(both, gates, None)
        both = both if keep else both.new_empty(0, both.shape[1])
    return combine(grouped_gemm(h, low_down, ends, tiles=tiles), slot), both, gates


@registered("routed_experts_backward")
def _backward(
    d_out: Tensor, x: Tensor, gates: Tensor, both: Tensor, gate_up: Tensor, down: Tensor, token: Tensor, slot: Tensor,
    ends: Tensor, out_dtype: torch.dtype, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, gate_up and down, those that are ``wanted``; the others are empty."""
    dx, d_weights, d_gate_up, d_down = (x.new_empty(0) for _ in range(4))
    dy = spread(d_out, slot)
    tiles = find_tiles(ends, len(token), TILE)
    dh = grouped_gemm(dy, down.transpose(1, 2), ends, tiles=tiles)
    d_both, d_gates, _, h = swiglu_backward(dh, both, gates, again=wanted[3])
    if wanted[1]:
        d_weights = d_gates.index_select(0, slot.flatten()).view(slot.shape)
    if wanted[3]:
        d_down = grouped_wgrad(dy, h, ends, out_dtype=out_dtype)
    del dy, dh, h
    if wanted[2]:
        d_gate_up = grouped_wgrad(d_both, spread(x.contiguous(), slot), ends, out_dtype=out_dtype)
    if wanted[0]:
        dx = combine(grouped_gemm(d_both, gate_up.transpose(1, 2), ends, tiles=tiles), slot)
    return dx, d_weights, d_gate_up, d_down


@_forward.register_fake
def _(x, weights, gate_up, down, low_gate_up, low_down, token, slot, ends, choice, keep=True):
    return x.new_empty(x.shape), x.new_empty((len(token) if keep else 0, gate_up.shape[1])), weights.new_empty(len(token))


@_backward.register_fake
def _(d_out, x, gates, both, gate_up, down, token, slot, ends, out_dtype, wanted):
    kinds = ((x, x.shape, x.dtype), (gates, slot.shape, gates.dtype), (x, gate_up.shape, out_dtype),
             (x, down.shape, out_dtype))
    return tuple(t.new_empty(shape if want else 0, dtype=dtype if want else x.dtype)
                 for want, (t, shape, dtype) in zip(wanted, kinds, strict=True))  # fmt: skip


def _save(ctx, inputs, output):
    x, _, gate_up, _, low_gate_up, low_down, token, slot, ends, *_ = inputs
    ctx.save_for_backward(x, output[2], output[1], low_gate_up, low_down, token, slot, ends)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of z's size for a gradient that there cannot be
    ctx.dtype = gate_up.dtype


def _gradients(ctx, d_out: Tensor, *_):
    wanted = asked(ctx, 4)
    found = _backward(d_out.contiguous(), *ctx.saved_tensors, ctx.dtype, wanted)
    return *(gradient if want else None for gradient, want in zip(found, wanted, strict=True)), *(None,) * 7


_forward.register_autograd(_gradients, setup_context=_save)
