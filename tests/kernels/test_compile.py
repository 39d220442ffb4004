"""torch.compile sees every operation: one graph, with gradients, and the same numbers as without it."""

import pytest
import torch
from numbers_ import tame

from minids import ModelConfig, Transformer, kernels

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


NAMES = ["norm and SwiGLU", "router", "experts", "loss", "FP8 product"]


def check(name, device, compiler):
    torch.compiler.reset()
    function, inputs, rest = case(name, device)
    found = []
    for run in (function, torch.compile(function, backend=compiler, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = run(*leaves, *rest)
        if leaves:
            out.backward()
        found.append([out.detach(), *(t.grad for t in leaves)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph(kernel, name):
    check(name, kernel, "aot_eager")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: inductor's own code beside the kernels")
@pytest.mark.parametrize("name", NAMES)
def test_one_graph_with_the_rest_compiled(name):
    check(name, "cuda", "inductor")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on a CPU the model runs torch operations")
def test_whole_model_is_one_graph():
    """Compiled, the gradients are no further from a float32 run's than those of the plain model under autocast."""
    torch.compiler.reset()
    torch.manual_seed(0)
    cfg = ModelConfig.preset("toy", num_hidden_layers=3)
    with torch.device("cuda"):
        model = Transformer(cfg)
    rows = torch.randint(0, cfg.vocab_size, (4, 129), device="cuda")

    def step(run, low):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            out = run(rows[:, :-1], labels=rows[:, 1:])
        (out.loss + 0.3 * out.mtp_loss).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = step(model, low=False)
    plain, compiled = (step(run, low=True) for run in (model, torch.compile(model, fullgraph=True)))
    assert (compiled - exact).norm() < 1.2 * (plain - exact).norm() < 0.2 * exact.norm()
