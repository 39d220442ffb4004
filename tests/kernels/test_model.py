"""The model on kernels: its layers, whole steps, and nothing that makes the host wait."""

import pytest
import torch
import torch.nn.functional as F
from numbers_ import error

from minids import ModelConfig, Transformer
from minids.kernels import experts as kernel_experts
from minids.kernels import plan_slots, routed_experts
from minids.model.layers import MLP
from minids.model.moe import Experts, copied_once, plan_dispatch
from minids.model.router import Routing, count_load

BF16 = torch.bfloat16
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def tiny(device, layers=2, **changes) -> Transformer:
    torch.manual_seed(0)
    cfg = ModelConfig.preset(
        "toy", vocab_size=96, hidden_size=64, num_hidden_layers=layers, first_k_dense_replace=1, moe_intermediate_size=40,
        intermediate_size=72, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, **changes,
    )  # fmt: skip
    return Transformer(cfg).to(device).train()


def step(model, backend, monkeypatch, dtype=None, documents=False) -> dict[str, torch.Tensor]:
    """Loss and gradients of one batch, by kernels or by torch; ``documents``: packed rows, whose positions begin anew."""
    monkeypatch.setenv("MINIDS_KERNELS", backend)
    device = model.lm_head.weight.device
    tokens = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(1)).to(device)
    ids = torch.arange(12, device=device).ge(torch.tensor([[5], [8]], device=device)).long() if documents else None
    model.zero_grad()
    with torch.autocast(device.type, dtype or BF16, enabled=dtype is not None):
        out = model(tokens[:, :-1], labels=tokens[:, 1:], document_ids=ids)
    aux = sum((routing.scores * routing.scores.detach()).mean() for routing in out.routing)
    (out.loss + out.mtp_loss + aux).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": out.loss.detach(), "loads": out.loads()}


def experts_case(device, dtype=BF16, n=23, e=6, k=2, d=24, f=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).to(BF16)
    gate_up, down = torch.randn(e, 2 * f, d, generator=generator) / 4, torch.randn(e, d, f, generator=generator) / 3
    weights = torch.rand(n, k, generator=generator)
    indices = (torch.rand(n, e, generator=generator) * torch.tensor([1.0, 1, 1, 1, 1, 0])).topk(k).indices  # 5: nobody's
    rounded = [gate_up.to(BF16).to(dtype), down.to(BF16).to(dtype)]
    return [t.to(device).requires_grad_() for t in (x, weights, *rounded)], indices.to(device)


def exact_experts(x, weights, gate_up, down, indices):
    """Token by token, choice by choice, in FP64."""
    rows = []
    for n, chosen in enumerate(indices.tolist()):
        total = 0
        for k, e in enumerate(chosen):
            gate, up = (gate_up[e] @ x[n]).chunk(2)
            total = total + weights[n, k] * (down[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("masters", [False, True])
def test_routed_experts(kernel, masters):
    """Values and gradients against FP64; BF16 rounds four times on the way: z, h, y and the sum."""
    made, indices = experts_case(kernel, torch.float32 if masters else BF16)
    copies = tuple(t.detach().to(BF16) for t in made[2:]) if masters else None
    choice, token, slot, ends = plan_slots(indices, 6, backend="triton")
    out = routed_experts(*made, token, slot, ends, choice, copies=copies)
    exact = [t.detach().double().requires_grad_() for t in made]
    expected = exact_experts(*exact, indices)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(kernel).to(BF16)
    out.backward(d_out)
    expected.backward(d_out.double())
    assert out.dtype == BF16 and error(out, expected) < 8e-3
    for a, b in zip(made, exact, strict=True):
        assert a.grad.dtype == a.dtype and error(a.grad, b.grad) < 1e-2
    assert not made[2].grad[5].any() and not made[3].grad[5].any()  # the expert that nobody chose


def test_a_part_of_the_gradients(kernel, monkeypatch):
    """A pipeline asks for dx first and for dW later: each is computed once, and the same as all together."""
    made, indices = experts_case(kernel)
    choice, token, slot, ends = plan_slots(indices, 6, backend="triton")
    upstream = [t * 1 for t in made]  # as in a model: x comes from another layer
    out = routed_experts(upstream[0], upstream[1], *made[2:], token, slot, ends, choice)
    d_out = torch.ones_like(out)
    calls, wgrad = [], kernel_experts.grouped_wgrad
    monkeypatch.setattr(kernel_experts, "grouped_wgrad", lambda *args, **rest: calls.append(1) or wgrad(*args, **rest))
    dx, d_weights = torch.autograd.grad(out, made[:2], d_out, retain_graph=True)
    assert not calls
    d_up, d_down = torch.autograd.grad(out, made[2:], d_out, retain_graph=True)
    assert len(calls) == 2
    out.backward(d_out)
    for part, tensor in zip((dx, d_weights, d_up, d_down), made, strict=True):
        assert torch.equal(part, tensor.grad)


def test_experts_of_the_model(kernel, monkeypatch):
    """`Experts` goes through the kernels, under autocast too, where one copy of the weights serves a whole step."""
    monkeypatch.setenv("MINIDS_KERNELS", "triton")
    cfg = ModelConfig.preset("toy", hidden_size=64, moe_intermediate_size=40, n_routed_experts=8, num_experts_per_tok=2)
    layer = Experts(cfg).to(kernel)
    for p in layer.parameters():
        torch.nn.init.normal_(p, 0, 0.2, generator=torch.Generator(kernel).manual_seed(0))
    x = torch.randn(19, 64, generator=torch.Generator().manual_seed(1)).to(kernel)
    indices = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:2] for i in range(19)]).to(kernel)
    weights = torch.rand(19, 2, generator=torch.Generator().manual_seed(2)).to(kernel)
    routing = Routing(weights, indices, weights, count_load(indices, 8))
    expected = exact_experts(x.double(), weights.double(), layer.gate_up_proj.double(), layer.down_proj.double(), indices)
    with torch.autocast(torch.device(kernel).type, BF16):
        plain = layer(x, routing)
        with copied_once([layer]):
            first, copies = layer(x, routing), layer.copies
            again = layer(x, routing)
            assert layer.copies is copies and copies[0].dtype == BF16
    assert layer.copies is None
    assert torch.equal(plain, first) and torch.equal(plain, again) and error(plain, expected) < 1.5e-2
    plain.float().sum().backward()
    assert layer.down_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("multiple", [1, 16])
def test_plan_is_the_models(kernel, monkeypatch, multiple):
    indices = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(40)]).to(kernel)
    routing = Routing(None, indices, None, count_load(indices, 8))
    monkeypatch.setenv("MINIDS_KERNELS", "torch")
    expected = plan_dispatch(routing, multiple)
    monkeypatch.setenv("MINIDS_KERNELS", "triton")
    plan = plan_dispatch(routing, multiple, bound=True)
    end = int(expected.ends_E[-1])
    assert torch.equal(plan.ends_E, expected.ends_E) and torch.equal(plan.slot_NK, expected.slot_NK)
    assert torch.equal(plan.choice_M[:end], expected.choice_M) and torch.equal(plan.token_M[:end], expected.token_M)
    assert (plan.choice_M[end:] == 120).all() and (plan.token_M[end:] == 39).all()


@pytest.mark.parametrize("documents", [False, True])
def test_a_step_in_float32(kernel, monkeypatch, documents):
    """Every gradient of the model, whichever way it is computed; FP32 sums in another order."""
    model = tiny(kernel)
    made, expected = (step(model, backend, monkeypatch, documents=documents) for backend in ("triton", "torch"))
    assert torch.equal(made.pop("loads"), expected.pop("loads"))
    assert made.keys() == expected.keys() and len(made) > 20
    for name, value in expected.items():
        assert error(made[name], value) < 2e-5, name


def test_a_step_under_autocast(kernel, monkeypatch):
    """BF16 rounds at other places; a near tie may send a token elsewhere, so most gradients agree, and the loss."""
    model = tiny(kernel)
    made, expected = (step(model, backend, monkeypatch, BF16) for backend in ("triton", "torch"))
    exact = step(model, "torch", monkeypatch)
    assert abs(made["loss"] - exact["loss"]) < 2e-2
    worst = [max(error(found[name], exact[name]) for name in exact if name not in ("loss", "loads"))
             for found in (made, expected)]  # fmt: skip
    assert worst[0] < max(2 * worst[1], 0.05)


def test_mlp(kernel, monkeypatch):
    """Gate and up from two products; the rows of a batch."""
    monkeypatch.setenv("MINIDS_KERNELS", "triton")
    torch.manual_seed(0)
    layer = MLP(24, 40).to(kernel)
    x = torch.randn(2, 3, 24, device=kernel, requires_grad=True)
    out = layer(x)
    exact = x.detach().double().requires_grad_()
    gate, up, down = (w.weight.detach().double() for w in (layer.gate_proj, layer.up_proj, layer.down_proj))
    expected = (F.silu(exact @ gate.t()) * (exact @ up.t())) @ down.t()
    out.square().sum().backward()
    expected.square().sum().backward()
    tolerance = 1e-5 if kernel == "cpu" else 1e-3  # CUDA's FP32 products may be in TF32
    assert out.shape == (2, 3, 24) and error(out, expected) < tolerance and error(x.grad, exact.grad) < tolerance


@pytest.mark.parametrize("dtype", [pytest.param(None, marks=GPU, id="bf16"), pytest.param(BF16, marks=GPU, id="autocast")])
def test_the_host_never_waits(dtype, monkeypatch):
    """Forward, losses and backward of a model on the GPU, twice: the first run compiles kernels and fills caches."""
    model = tiny("cuda")
    model = model if dtype else model.to(BF16)
    tokens = torch.randint(0, 96, (4, 1025), device="cuda")  # enough for the embedding's way for many tokens
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", BF16, enabled=dtype is not None):
                out = model(tokens[:, :-1], labels=tokens[:, 1:])
            (out.loss + out.mtp_loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert out.loss.isfinite()


def test_registered(kernel):
    x, weights, gate_up, down = (t.detach() for t in experts_case(kernel)[0])
    choice, token, slot, ends = plan_slots(experts_case(kernel)[1], 6, backend="triton")
    args = (x, weights, gate_up, down, gate_up.clone(), down.clone(), token, slot, ends, choice)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.minids.routed_experts.default, (x.requires_grad_(), *args[1:]), test_utils=checks)
    x = x.detach()
    _, both, gates = torch.ops.minids.routed_experts(x, *args[1:])
    for wanted in ([True] * 4, [True, False, False, False]):
        args = (x, x, gates, both, gate_up, down, token, slot, ends, torch.float32, wanted)
        torch.library.opcheck(torch.ops.minids.routed_experts_backward.default, args, test_utils=checks[:2])
