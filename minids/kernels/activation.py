"""SwiGLU, times the token's gate value in an expert, forward and backward, quantised on the way out if the next product
is in FP8 (V3 sections 2.1.2, 3.2.3, 3.3.3).

    h[m, f] = silu(gate[m, f]) * up[m, f] * weight[m]          silu(x) = x sigma(x),   sigma(x) = 1 / (1 + exp(-x))

    d gate = dh weight up sigma(gate) (1 + gate (1 - sigma(gate)))     d up = dh weight silu(gate)
    d weight = sum over f of dh silu(gate) up

The problem: as four operations h is read and written four times before the next product reads it. Here it is computed in
FP32, rounded once, and, for a product in FP8, quantised 1 x 128 before it ever leaves the multiprocessor. Backward needs
the two inputs alone, and writes h once more for the next product's weight gradient if asked: then nobody has to keep it.

Floors for M rows: M F (4 + 2) bytes in BF16; M F (4 + 1 + 4 / 128) quantised; backward M F (6 + 4), h again M F 2. About 10
operations a number, 20 backward: far below.

Layout: both (M, 2F) row-major, gate columns then up columns; or gate and up, (M, F) each.
Shapes: M rows (token slots), F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels.backend import TILE, cdiv, check, check_shape, choose, jit, registered, tl
from minids.kernels.e4m3 import SCALES, e4m3_scale, magnitude_bits, to_e4m3
from minids.kernels.quantize import empty as empty_quantized
from minids.kernels.quantize import reference as quantize_reference

BF16 = torch.bfloat16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu(both: Tensor, weight: Tensor | None = None, *, up: Tensor | None = None, backend: str | None = None) -> Tensor:
    """SwiGLU in one pass, forward and backward. Differentiable in all three.

    Args:
        both: (M, 2F) BF16, FP16 or FP32, unit stride inside rows; with ``up`` given the gate alone, (M, F).
        weight: (M,) float32 gate values, or None for ones.
        up: (M, F), of both's dtype.
        backend: see `minids.kernels.backend`.

    Returns:
        h (M, F) in both's dtype.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    _check(both, weight, up, DTYPES)
    given = [t for t in (both, weight, up) if t is not None]
    if choose(backend, *given) == "torch":
        return reference(both, weight, up).to(both.dtype)
    return _swiglu_op(both, weight, up)


def swiglu_quantize(
    both: Tensor, weight: Tensor | None = None, *, scale: str = "fp32", column_major: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`swiglu` of BF16, its FP32 result quantised 1 x 128 without being rounded to BF16 in between. No gradient.

    Returns:
        q (M, F) float8_e4m3fn and scale_inv (M, ceil(F / 128)) float32, as `quantize_tile` lays them out.
    """
    _check(both, weight, None, (BF16,))
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(SCALES)}")
    if choose(backend, *((both,) if weight is None else (both, weight))) == "torch":
        h = reference(both, weight)
        q, scale_inv = quantize_reference(h, scale)
        return q, empty_quantized(h, column_major)[1].copy_(scale_inv)
    return _swiglu_quantize(both, weight, scale == "ue8m0", column_major)


def swiglu_backward(
    dh: Tensor, both: Tensor, weight: Tensor | None = None, up: Tensor | None = None, *, again: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel of the backward pass, for those who write theirs out: gradients of both, weight (float32) and up, and h
    if ``again``. What was not asked for is an empty tensor."""
    return _swiglu_backward(dh.contiguous(), both, weight, up, again)


def reference(both: Tensor, weight: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """The specification, in FP32: h (M, F). Its gradients are autograd's."""
    gate, up = both.float().chunk(2, -1) if up is None else (both.float(), up.float())
    h = F.silu(gate) * up
    return h if weight is None else h * weight[:, None]


# ---- Triton ----


@jit(varying=("M",))
def _swiglu(gate_ptr, up_ptr, weight_ptr, h_ptr, s_ptr, M, F, gate_stride, up_stride, s_stride_m, s_stride_k,
            ROWS: tl.constexpr, WEIGHTED: tl.constexpr, QUANTIZED: tl.constexpr, UE8M0: tl.constexpr):
    """One program: ROWS rows of 128 channels."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # the second dimension of a grid ends at 65,535
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (row[:, None] < M) & (column[None, :] < F)
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row[:, None] * up_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        h *= tl.load(weight_ptr + row, mask=row < M, other=0.0)[:, None]
    out = h_ptr + row[:, None] * F + column[None, :]
    if QUANTIZED:
        scale = e4m3_scale(tl.max(magnitude_bits(h), axis=1), UE8M0)
        tl.store(s_ptr + row * s_stride_m + tl.program_id(1) * s_stride_k, scale, mask=row < M)
        tl.store(out, to_e4m3(h, scale[:, None]), mask=mask)
    else:
        tl.store(out, h.to(h_ptr.dtype.element_ty), mask=mask)


@jit
def _backward(dh_ptr, gate_ptr, up_ptr, weight_ptr, d_gate_ptr, d_up_ptr, d_weight_ptr, h_ptr, F,
              gate_stride, up_stride, d_stride, WEIGHTED: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row, BLOCK columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    weight, d_weight = 1.0, tl.zeros((BLOCK,), tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_ptr + row)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < F
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + row * F + column, mask=mask, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigma
        d_weight += dh * silu * up
        dh *= weight
        d_gate = dh * up * (sigma * (1.0 + gate * (1.0 - sigma)))
        tl.store(d_gate_ptr + row * d_stride + column, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
        tl.store(d_up_ptr + row * d_stride + column, (dh * silu).to(d_up_ptr.dtype.element_ty), mask=mask)
        if AGAIN:
            tl.store(h_ptr + row * F + column, (silu * up * weight).to(h_ptr.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(d_weight_ptr + row, tl.sum(d_weight, axis=0))


def _halves(both: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return both.chunk(2, -1) if up is None else (both, up)


def _launch(
    both: Tensor, weight: Tensor | None, up: Tensor | None, h: Tensor, scale_inv: Tensor | None, ue8m0: bool
) -> None:
    (m, f), (gate, up) = h.shape, _halves(both, up)
    s_strides = (0, 0) if scale_inv is None else scale_inv.stride()
    if m:
        _swiglu[(cdiv(m, 16), cdiv(f, TILE))](
            gate, up, both if weight is None else weight, h, h if scale_inv is None else scale_inv, m, f, gate.stride(0),
            up.stride(0), *s_strides, 16, weight is not None, scale_inv is not None, ue8m0, num_warps=4,
        )  # fmt: skip


def _empty(both: Tensor, dtype: torch.dtype, joined: bool = True) -> Tensor:
    return both.new_empty((both.shape[0], both.shape[1] // (2 if joined else 1)), dtype=dtype)


@registered("swiglu")
def _swiglu_op(both: Tensor, weight: Tensor | None, up: Tensor | None) -> Tensor:
    h = _empty(both, both.dtype, up is None)
    _launch(both, weight, up, h, None, False)
    return h


@registered("swiglu_quantize")
def _swiglu_quantize(both: Tensor, weight: Tensor | None, ue8m0: bool, column_major: bool) -> tuple[Tensor, Tensor]:
    q, scale_inv = empty_quantized(_empty(both, BF16), column_major)
    _launch(both, weight, None, q, scale_inv, ue8m0)
    return q, scale_inv


@registered("swiglu_backward")
def _swiglu_backward(
    dh: Tensor, both: Tensor, weight: Tensor | None, up: Tensor | None, again: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_both, d_weight, d_up, h = found = _gradients_empty(dh, both, weight, up, again)
    (m, f), (gate, second), (d_gate, d_second) = dh.shape, _halves(both, up), _halves(d_both, None if up is None else d_up)
    if m:
        block = min(1024, 1 << (f - 1).bit_length())
        _backward[(m,)](
            dh, gate, second, dh if weight is None else weight, d_gate, d_second, d_weight, h, f, gate.stride(0),
            second.stride(0), d_gate.stride(0), weight is not None, again, block, num_warps=max(1, min(4, block // 256)),
        )  # fmt: skip
    return found


def _gradients_empty(dh: Tensor, both: Tensor, weight: Tensor | None, up: Tensor | None, again: bool) -> tuple[Tensor, ...]:
    d_weight = dh.new_empty(0 if weight is None else len(dh), dtype=torch.float32)
    d_up = dh.new_empty(0 if up is None else up.shape)
    return both.new_empty(both.shape), d_weight, d_up, dh.new_empty(dh.shape if again else 0)


@_swiglu_op.register_fake
def _(both, weight, up):
    return _empty(both, both.dtype, up is None)


@_swiglu_quantize.register_fake
def _(both, weight, ue8m0, column_major):
    return empty_quantized(_empty(both, BF16), column_major)


_swiglu_backward.register_fake(_gradients_empty)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dh: Tensor):
    both, weight, up = ctx.saved_tensors
    d_both, d_weight, d_up, _ = _swiglu_backward(dh.contiguous(), both, weight, up, False)
    return d_both, None if weight is None else d_weight, None if up is None else d_up


_swiglu_op.register_autograd(_gradients, setup_context=_save)


def _check(both: Tensor, weight: Tensor | None, up: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    check("both", both, ndim=2, dtype=dtypes)
    if both.shape[1] == 0 or (up is None and both.shape[1] % 2):
        raise ValueError(f"both: got shape {tuple(both.shape)}, expected (M, 2F), F > 0")
    if both.stride(1) != 1:
        raise ValueError(f"both: got strides {both.stride()}, expected unit stride inside rows")
    if up is not None:
        check("up", up, ndim=2, dtype=both.dtype)
        check_shape("up", up, tuple(both.shape))
        if up.stride(1) != 1:
            raise ValueError(f"up: got strides {up.stride()}, expected unit stride inside rows")
    if weight is not None:
        check("weight", weight, ndim=1, dtype=torch.float32)
        check_shape("weight", weight, (len(both),))
        if weight.stride(0) != 1 and len(weight) > 1:
            raise ValueError(f"weight: got strides {weight.stride()}, expected a contiguous vector")
