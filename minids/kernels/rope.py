"""From MLA's up-projections to the q, k and v that attention reads, one pass over memory each way (V3 section 2.1.1).

    q_h = [q^N_h ; RoPE(q^R_h)]        k_h = [k^N_h ; RoPE(k^R)]        v_h

The problem: k^R is one key for all heads, but attention wants every head's key in one piece; and v lies behind k^N in what
W_UK,UV makes. Written with torch, rotation (in float32, as complex numbers) and concatenation are a dozen passes. Here a
program takes a token: it turns pair j by exp(i t theta_j), a complex number of the table,

    y_2j = x_2j cos_j - x_2j+1 sin_j        y_2j+1 = x_2j sin_j + x_2j+1 cos_j

and puts everything into place. Backward is the same with the conjugate; the gradients of all heads' k^R are added.

Floors for M tokens of H heads: 2 M H (2 (2 N + R + V) + R) + 2 M R bytes each way in BF16; 10 operations a rotated pair.

Shapes: B rows, T tokens, M = B T, H heads, N/R/V head dims without/with RoPE/of values, j pairs.
"""

import torch
from torch import Tensor

from minids.kernels.backend import check, check_shape, choose, jit, registered, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = 8  # heads at a time


def rope_heads(
    q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, whole keys, values. Differentiable in q, kv and k_rope.

    Args:
        q: (B, T, H, N + R), the last R of each head not rotated yet. BF16, FP16 or FP32, contiguous.
        kv: (B, T, H, N + V), each head's k^N and then its v. Of q's dtype, contiguous.
        k_rope: (B, T, R), not rotated yet. Of q's dtype, unit stride in the last dimension.
        table: (B or 1, T, R/2) complex64, of `minids.model.rope.rope_table`. Contiguous.
        backend: see `minids.kernels.backend`.

    Returns:
        q (B, T, H, N + R), k (B, T, H, N + R), v (B, T, H, V), new and contiguous. Rotation is in FP32, rounded once.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    _check(q, kv, k_rope, table)
    if choose(backend, q, kv, k_rope, table) == "torch":
        return reference(q, kv, k_rope, table)
    return _rope_heads(q, kv, k_rope, table)


def reference(q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The specification; its gradients are autograd's."""

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table.unsqueeze(-2)).flatten(-2).to(x.dtype)

    nope = q.shape[-1] - k_rope.shape[-1]
    key = rotate(k_rope.unsqueeze(-2)).expand(*q.shape[:-1], -1)  # one, seen by every head
    q = torch.cat([q[..., :nope], rotate(q[..., nope:])], dim=-1)
    return q, torch.cat([kv[..., :nope], key], dim=-1), kv[..., nope:].contiguous()


# ---- Triton ----


@jit
def _turn(x, cosine, sine, ROWS: tl.constexpr, R: tl.constexpr):
    """The pairs of x (ROWS, R) turned; sine negated turns them back. FP32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, R // 2, 2)))
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (ROWS, R))


@jit
def _angles(table_ptr, row, R: tl.constexpr):
    at = table_ptr + row * R + 2 * tl.arange(0, R // 2)
    return tl.load(at)[None, :], tl.load(at + 1)[None, :]


@jit(varying=("M", "TABLE"))
def _forward(q_ptr, kv_ptr, kr_ptr, table_ptr, q_out, k_out, v_out, M, TABLE, H, kr_stride,
             N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr):
    """One program: one token. TABLE: rows of the table, after which it begins anew."""
    token = tl.program_id(0).to(tl.int64)
    cosine, sine = _angles(table_ptr, token % TABLE, R)
    n, r, v = tl.arange(0, BN)[None, :], tl.arange(0, R)[None, :], tl.arange(0, BV)[None, :]
    key = _turn(tl.load(kr_ptr + token * kr_stride + r), cosine, sine, 1, R).to(k_out.dtype.element_ty)
    for first in range(0, H, BH):
        head = first + tl.arange(0, BH)[:, None]
        here = head < H
        row = token * H + head
        is_n, is_v = here & (n < N), here & (v < V)
        tl.store(q_out + row * (N + R) + n, tl.load(q_ptr + row * (N + R) + n, mask=is_n), mask=is_n)
        turned = _turn(tl.load(q_ptr + row * (N + R) + N + r, mask=here, other=0.0), cosine, sine, BH, R)
        tl.store(q_out + row * (N + R) + N + r, turned.to(q_out.dtype.element_ty), mask=here)
        tl.store(k_out + row * (N + R) + n, tl.load(kv_ptr + row * (N + V) + n, mask=is_n), mask=is_n)
        tl.store(k_out + row * (N + R) + N + r, tl.broadcast_to(key, (BH, R)), mask=here)
        tl.store(v_out + row * V + v, tl.load(kv_ptr + row * (N + V) + N + v, mask=is_v), mask=is_v)


@jit(varying=("M", "TABLE"))
def _backward(dq_ptr, dk_ptr, dv_ptr, table_ptr, dq_out, dkv_out, dkr_out, M, TABLE, H,
              N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr):
    """One program: one token, as forward."""
    token = tl.program_id(0).to(tl.int64)
    cosine, sine = _angles(table_ptr, token % TABLE, R)
    n, r, v = tl.arange(0, BN)[None, :], tl.arange(0, R)[None, :], tl.arange(0, BV)[None, :]
    key = tl.zeros((1, R), tl.float32)
    for first in range(0, H, BH):
        head = first + tl.arange(0, BH)[:, None]
        here = head < H
        row = token * H + head
        is_n, is_v = here & (n < N), here & (v < V)
        tl.store(dq_out + row * (N + R) + n, tl.load(dq_ptr + row * (N + R) + n, mask=is_n), mask=is_n)
        turned = _turn(tl.load(dq_ptr + row * (N + R) + N + r, mask=here, other=0.0), cosine, -sine, BH, R)
        tl.store(dq_out + row * (N + R) + N + r, turned.to(dq_out.dtype.element_ty), mask=here)
        tl.store(dkv_out + row * (N + V) + n, tl.load(dk_ptr + row * (N + R) + n, mask=is_n), mask=is_n)
        tl.store(dkv_out + row * (N + V) + N + v, tl.load(dv_ptr + row * V + v, mask=is_v), mask=is_v)
        heads = tl.load(dk_ptr + row * (N + R) + N + r, mask=here, other=0.0).to(tl.float32)
        key += tl.sum(heads, 0)[None, :]
    tl.store(dkr_out + token * R + r, _turn(key, cosine, -sine, 1, R).to(dkr_out.dtype.element_ty))


def _sizes(h: int, n: int, r: int, v: int) -> tuple[int, ...]:
    """The kernels' constants: N, R, V, the powers of two that hold N and V, and heads at a time."""
    n_power, v_power = (1 << max(width - 1, 0).bit_length() for width in (n, v))
    return n, r, v, n_power, v_power, min(HEADS, 1 << (h - 1).bit_length())


@registered("rope_heads")
def _rope_heads(q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (b, t, h, width), r, outs = q.shape, k_rope.shape[-1], _empty(q, kv, k_rope)
    if q.numel():
        angles, m = torch.view_as_real(table), b * t
        rows = k_rope.view(m, r) if k_rope.is_contiguous() else k_rope.flatten(0, 1)
        sizes = _sizes(h, width - r, r, kv.shape[-1] - width + r)
        _forward[(m,)](q, kv, rows, angles, *outs, m, table.shape[0] * t, h, rows.stride(0), *sizes, num_warps=4)
    return outs


@registered("rope_heads_backward")
def _rope_heads_backward(dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (b, t, h, width), r, outs = dq.shape, 2 * table.shape[-1], _empty_gradients(dq, dv, table)
    if dq.numel():
        m, angles = b * t, torch.view_as_real(table)
        sizes = _sizes(h, width - r, r, dv.shape[-1])
        _backward[(m,)](dq, dk, dv, angles, *outs, m, table.shape[0] * t, h, *sizes, num_warps=4)
    return outs


def _empty(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty((*q.shape[:-1], values))


def _empty_gradients(dq: Tensor, dv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r = 2 * table.shape[-1]
    joint = dq.shape[-1] - r + dv.shape[-1]
    return dq.new_empty(dq.shape), dq.new_empty((*dq.shape[:-1], joint)), dq.new_empty((*dq.shape[:2], r))


@_rope_heads.register_fake
def _(q, kv, k_rope, table):
    return _empty(q, kv, k_rope)


@_rope_heads_backward.register_fake
def _(dq, dk, dv, table):
    return _empty_gradients(dq, dv, table)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[3])


def _gradients(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    (table,) = ctx.saved_tensors
    return *_rope_heads_backward(dq.contiguous(), dk.contiguous(), dv.contiguous(), table), None


_rope_heads.register_autograd(_gradients, setup_context=_save)


def _check(q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor) -> None:
    check("q", q, ndim=4, dtype=DTYPES)
    check("kv", kv, ndim=4, dtype=q.dtype)
    check("k_rope", k_rope, ndim=3, dtype=q.dtype)
    check("table", table, ndim=3, dtype=torch.complex64)
    (b, t, _, width), r = q.shape, k_rope.shape[-1]
    check_shape("k_rope", k_rope, (b, t, r))
    check_shape("table", table, (b, t, r // 2), (1, t, r // 2))
    if r < 2 or r & (r - 1) or width < r or kv.shape[:3] != q.shape[:3] or kv.shape[-1] <= width - r:
        raise ValueError(
            f"q, kv, k_rope: got {tuple(q.shape)}, {tuple(kv.shape)}, {tuple(k_rope.shape)}, expected (B, T, H, N + R), "
            "(B, T, H, N + V), (B, T, R) with V > 0 and R a power of two from 2 on"
        )
    for name, x in (("q", q), ("kv", kv), ("table", table)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()} for shape {tuple(x.shape)}, expected a contiguous tensor")
    if k_rope.stride(-1) != 1:
        raise ValueError(f"k_rope: got strides {k_rope.stride()}, expected 1 in the last dimension")
