"""torch.compile sees every operation: one graph, with gradients, and the same numbers as without it."""

import pytest
import torch
from numbers_ import tame

from minids import kernels

BF16 = torch.bfloat16


def numbers(device, *shape, dtype=torch.float32, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 2).to(dtype).to(device)


def norm_and_swiglu(x, weight, both, gates):
    return kernels.rms_norm(x, weight, 1e-6, backend="triton").sum() + kernels.swiglu(both, gates, backend="triton").sum()


def route(logits, bias):
    weights, _, scores = kernels.router(logits, bias, n_group=4, topk_group=2, k=3, scale=2.5, backend="triton")
    return weights.square().sum() + scores.sum()


def experts(x, weights, gate_up, down, indices):
    choice, token, slot, ends = kernels.plan_slots(indices, 4, backend="triton")
    return kernels.routed_experts(x, weights, gate_up, down, token, slot, ends, choice).float().square().sum()


def loss(hidden, weight, labels):
    return kernels.linear_cross_entropy(hidden, weight, labels, chunk=4, backend="triton")


def fp8_forward(x, w):
    q, s = kernels.quantize_tile(x, column_major=True, backend="triton")
    return kernels.fp8_gemm(q, s, *kernels.quantize_block(w, backend="triton"), backend="triton").float().sum()


def case(name, device):
    """The function, and its arguments: those to differentiate first."""
    if name == "norm and SwiGLU":
        x, weight, both = numbers(device, 6, 40), numbers(device, 40, seed=1), numbers(device, 5, 24, dtype=BF16, seed=2)
        return norm_and_swiglu, [x, weight, both, numbers(device, 5, seed=3)], []
    if name == "router":
        return route, [numbers(device, 9, 16)], [torch.zeros(16, device=device)]
    if name == "experts":
        shapes = ((7, 16), (7, 2), (4, 16, 16), (4, 16, 8))
        x, weights, up, down = (numbers(device, *shape, dtype=BF16, seed=i) for i, shape in enumerate(shapes))
        indices = numbers(device, 7, 4, seed=9).topk(2).indices
        return experts, [x, weights.float(), up, down], [indices]
    if name == "loss":
        return loss, [numbers(device, 10, 24), numbers(device, 50, 24, seed=1)], [torch.arange(10, device=device)]
    return fp8_forward, [], [tame(9, 256, device, dtype=BF16), tame(128, 256, device, 1, BF16)]


@pytest.mark.parametrize("name", ["norm and SwiGLU", "router", "experts", "loss", "FP8 product"])
def test_one_graph(kernel, name):
    torch.compiler.reset()
    function, inputs, rest = case(name, kernel)
    found = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = run(*leaves, *rest)
        if leaves:
            out.backward()
        found.append([out.detach(), *(t.grad for t in leaves)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)
