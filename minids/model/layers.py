"""Two small layers that every part uses: RMSNorm and the SwiGLU feed-forward.

    RMSNorm(x) = x / sqrt(mean(x^2) + eps) * weight              MLP(x) = W_down (silu(W_gate x) * W_up x)

Both write their backward out. As in V3 [3.2.3], neither keeps its output for it: RMSNorm keeps its input and one number a
row, SwiGLU its two inputs, and what else backward needs is computed again, in few passes over memory. On CUDA each pass
is one kernel (minids/kernels/rmsnorm.py, activation.py).

Shapes: rows of D (RMSNorm) or of F (SwiGLU).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids import kernels
from minids.kernels import uses_kernels
from minids.model.linear import Linear

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps).  With g = dy w:  dx = r (g - x r mean(g x r)),  dw = sum dy x r."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        r = (norm.square_().div_(x.shape[-1]).add_(eps)).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        normed, w = x * r, weight.to(r.dtype)
        t = dy * normed
        d_weight = t.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (t @ w).unsqueeze(-1).div_(x.shape[-1])
        g = torch.mul(dy, w, out=t)  # t's memory is free again
        return g.addcmul_(normed, mean, value=-1).mul_(r).to(x.dtype), d_weight, None


def normalise(x: Tensor, eps: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32 and few operations; ``eps`` is a tensor of no
    dimensions."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


class RMSNorm(nn.Module):
    """Over the last dimension, computed in float32 at least, returned in x's dtype; by the kernel under autocast in its
    dtype, to which the products that read it would round it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.eps_tensor = torch.tensor(eps, dtype=torch.float32, device="cpu")

    def forward(self, x: Tensor, delta: Tensor | None = None, residual: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x. ``residual``: x + delta (x without one) and its norm, whose gradients meet in one pass."""
        if residual:
            return self._residual(x, delta)
        if uses_kernels(x) and x.dtype in KERNEL_DTYPES:
            rows = x.reshape(-1, x.shape[-1])
            return kernels.rms_norm(rows, self.weight, self.eps, out_dtype=autocast_dtype(x)).view(x.shape)
        if torch.is_grad_enabled() and x.is_cpu:
            return _RMSNorm.apply(x, self.weight, self.eps)
        if x.is_cpu and x.dtype == self.weight.dtype == torch.float32:
            return normalise(x, self.eps_tensor).mul_(self.weight)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # one dtype: CUDA's fused kernel asks

    def _residual(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        same = delta is None or torch.promote_types(x.dtype, delta.dtype) == x.dtype
        if not (uses_kernels(x) and x.dtype in KERNEL_DTYPES and same):
            total = x if delta is None else x + delta
            return total, self.forward(total)
        rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, delta)]
        found = kernels.rms_norm_residual(*rows, self.weight, self.eps, out_dtype=autocast_dtype(x))
        return tuple(t.view(x.shape) for t in found)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype on x's device, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _SwiGLU(torch.autograd.Function):
    """h = silu(gate) up w, where w is one factor a row or None. ``up`` None: ``gate`` holds both, itself first."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, row_weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, row_weight)
        return swiglu_forward(gate, up, row_weight)

    @staticmethod
    def backward(ctx, dh: Tensor):
        return swiglu_backward(dh, *ctx.saved_tensors)


def swiglu_forward(gate: Tensor, up: Tensor | None, row_weight: Tensor | None) -> Tensor:
    """``swiglu`` without a backward."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    h = F.silu(gate).mul_(up)
    return h if row_weight is None else h.mul_(row_weight)


def swiglu_backward(dh: Tensor, both: Tensor, up: Tensor | None, row_weight: Tensor | None):
    """Gradients of ``swiglu``'s three arguments, None where there was none."""
    joined = up is None
    gate, up = both.chunk(2, dim=-1) if joined else (both, up)
    d_both = torch.empty_like(both) if joined else None
    d_gate, d_up = d_both.chunk(2, dim=-1) if joined else (torch.empty_like(gate), torch.empty_like(up))
    silu, d_weight = F.silu(gate), None
    if row_weight is not None:
        d_weight = (silu * up).mul_(dh).sum(-1, keepdim=True)
        dh = dh * row_weight
    torch.mul(silu, dh, out=d_up)
    d_silu = torch.mul(dh, up, out=silu)  # silu's memory is free again
    torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_gate)
    return (d_both, None, d_weight) if joined else (d_gate, d_up, d_weight)


def swiglu(gate: Tensor, up: Tensor | None = None, row_weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up, each row times ``row_weight`` (rows, 1) where given; all in one dtype, shapes (rows, F). Without
    ``up``, ``gate`` is (rows, 2F): gate, then up, as the experts' first product gives them."""
    if uses_kernels(gate) and gate.dtype in KERNEL_DTYPES:
        rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (gate, up)]
        weight = None if row_weight is None else row_weight.flatten().float()
        h = kernels.swiglu(rows[0], weight, up=rows[1])
        return h.view(*gate.shape[:-1], h.shape[-1])
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate, up, row_weight)
    return swiglu_forward(gate, up, row_weight)


class MLP(nn.Module):
    """SwiGLU feed-forward of the dense layers and the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
