"""The small operations of `minids.bench.gpu`: RMSNorm, router, cross entropy, SwiGLU. Rates in bytes that must move.

Shapes: M rows, D columns, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import kernels
from minids.bench.gpu_cases import BF16, CHECKED, WIDTH, Builders, Case, Limits, error, normal
from minids.kernels import routing

M, D, V = 8192, 7168, 129280


def small_operations(limits: Limits) -> Builders:
    def case(name: str, shape: str, n_bytes: float, minids: Callable, peer: Callable, found: float) -> Case:
        floor = n_bytes / limits["copy"]
        return Case(name, shape, "TB/s", n_bytes, floor, {"minids": minids, "torch": peer}, found)

    return [lambda make=make: case(*make()) for make in (norm, norm_backward, route, loss, gated)]


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()


def norm() -> tuple:
    x, weight = normal(M, D), torch.rand(D, device="cuda", dtype=BF16)
    found = error(kernels.rms_norm(x, weight), exact_norm(x.double(), weight))
    return ("RMSNorm", f"{M} x {D}", 4.0 * M * D, lambda: kernels.rms_norm(x, weight),
            lambda: F.rms_norm(x, (D,), weight, 1e-6), found)  # fmt: skip


def norm_backward() -> tuple:
    x, dy, weight = normal(M, D), normal(M, D), torch.rand(D, device="cuda", dtype=BF16)
    _, r = torch.ops.minids.rms_norm(x, weight, 1e-6)
    wide = x.double().requires_grad_()
    exact_norm(wide, weight).backward(dy.double())
    _, r_torch = torch.ops.aten._fused_rms_norm(x, [D], weight, 1e-6)

    def ours() -> tuple[Tensor, Tensor]:
        return torch.ops.minids.rms_norm_backward(dy, x, weight, r)

    def peer() -> tuple[Tensor, Tensor]:  # what autograd calls: its own backward runs on the stream of its forward
        return torch.ops.aten._fused_rms_norm_backward(dy, x, [D], r_torch, weight, [True, True])

    return "RMSNorm backward", f"{M} x {D}", 6.0 * M * D, ours, peer, error(ours()[0], wide.grad)


def route() -> tuple:
    logits, bias = torch.randn(M, 256, device="cuda"), torch.rand(256, device="cuda") * 0.01
    sizes = {"n_group": 8, "topk_group": 4, "k": 8, "scale": 2.5}
    weights, indices, _ = kernels.router(logits, bias, **sizes)
    exact_weights, exact_indices, _ = routing.reference(logits.double(), bias.double(), *sizes.values())
    order, exact_order = indices.argsort(-1), exact_indices.argsort(-1)
    found = error(weights.gather(-1, order), exact_weights.gather(-1, exact_order))
    return ("router", f"{M} x 256, 8 of 4 groups of 8", 8.0 * M * 256, lambda: kernels.router(logits, bias, **sizes),
            lambda: routing.reference(logits, bias, *sizes.values()), found)  # fmt: skip


def loss() -> tuple:
    logits, labels = normal(2048, V), torch.randint(0, V, (2048,), device="cuda")
    exact = F.cross_entropy(logits[:CHECKED].double(), labels[:CHECKED], reduction="none")
    scratch = logits.clone()
    found = error(kernels.cross_entropy_(scratch, labels)[:CHECKED], exact)
    leaf = logits.clone().requires_grad_()

    def peer() -> Tensor:
        return torch.autograd.grad(F.cross_entropy(leaf.float(), labels, reduction="sum"), leaf)[0]

    # Ours overwrites its input, so it is given a fresh copy each time, which is timed and counted with it.
    return ("copy, cross entropy and gradient", f"2048 x {V}", 8.0 * 2048 * V,
            lambda: kernels.cross_entropy_(scratch.copy_(logits), labels), peer, found)  # fmt: skip


def gated() -> tuple:
    both, weight = normal(M, 2 * WIDTH), torch.rand(M, device="cuda")
    gate, up = both.double().chunk(2, -1)
    q, s = kernels.swiglu_quantize(both, weight)
    dequantized = (q.float().unflatten(1, (-1, 128)) * s[..., None]).flatten(1)
    found = error(dequantized, F.silu(gate) * up * weight[:, None].double())

    def peer() -> tuple[Tensor, Tensor]:
        gate, up = both.chunk(2, -1)
        return kernels.quantize_tile(F.silu(gate) * up * weight[:, None].to(BF16))

    return ("SwiGLU, quantised", f"{M} x {WIDTH}", M * WIDTH * (5 + 4 / 128),
            lambda: kernels.swiglu_quantize(both, weight), peer, found)  # fmt: skip
