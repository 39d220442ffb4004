"""Experts: grouped dispatch against a loop over tokens, in value and gradient, however the slots are filled."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import minids.model.moe as moe
from minids import ModelConfig
from minids.model.moe import Experts, MoE, grouped_linear, plan_dispatch
from minids.model.router import Routing, count_load


def make(seed, n=7, experts=6, k=2, d=8, f=4):
    torch.manual_seed(seed)
    cfg = ModelConfig.preset("toy", hidden_size=d, moe_intermediate_size=f, n_routed_experts=experts, n_group=1,
                             topk_group=1, num_experts_per_tok=k)
    layer = Experts(cfg).double()
    for p in layer.parameters():
        p.data.normal_()
    indices = torch.stack([torch.randperm(experts)[:k] for _ in range(n)])
    weights = torch.rand(n, k, dtype=torch.float64, requires_grad=True)
    x = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    return layer, x, Routing(weights, indices, weights, count_load(indices, experts))


def loop(layer, x, routing):
    """Token by token, choice by choice."""
    rows = []
    for token, chosen, weights in zip(x, routing.indices.tolist(), routing.weights, strict=True):
        total = 0
        for e, w in zip(chosen, weights, strict=True):
            gate, up = (layer.gate_up_proj[e] @ token).chunk(2)
            total = total + w * (layer.down_proj[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), k=st.integers(1, 4), multiple=st.sampled_from([1, 2, 8]))
def test_equals_the_loop_with_gradients(seed, n, k, multiple):
    layer, x, routing = make(seed, n=n, k=k)
    old, moe.gemm_multiple = moe.gemm_multiple, lambda _: multiple
    try:
        ours = layer(x, routing)
    finally:
        moe.gemm_multiple = old
    plain = loop(layer, x, routing)
    torch.testing.assert_close(ours, plain)
    g, inputs = torch.randn_like(plain), (x, routing.weights, *layer.parameters())
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(plain, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_are_no_error(training):
    layer, x, routing = make(0)
    none = Routing(routing.weights[:0], routing.indices[:0], routing.scores[:0], torch.zeros_like(routing.load))
    with torch.set_grad_enabled(training):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert layer.to(dtype)(x[:0].to(dtype), none).shape == (0, 8)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), k=st.integers(1, 4), multiple=st.sampled_from([1, 2, 3, 16]))
def test_dispatch_puts_every_choice_in_one_slot_of_its_expert(seed, n, k, multiple):
    torch.manual_seed(seed)
    indices = torch.stack([torch.randperm(6)[:k] for _ in range(n)])
    routing = Routing(None, indices, None, count_load(indices, 6))
    plan = plan_dispatch(routing, multiple)
    ends = [0, *plan.ends_E.tolist()]
    assert all((b - a) % multiple == 0 for a, b in zip(ends[:-1], ends[1:], strict=True))
    assert ends[-1] == len(plan.token_M) and (multiple > 1 or ends[-1] == n * k)
    seen = set()
    for token in range(n):
        for choice in range(k):
            slot, e = plan.slot_NK[token, choice].item(), indices[token, choice].item()
            assert ends[e] <= slot < ends[e + 1] and plan.token_M[slot] == token
            assert plan.choice_M[slot] == token * k + choice
            seen.add(slot)
    assert len(seen) == n * k
    filling = set(range(ends[-1])) - seen
    assert all(plan.choice_M[slot] == n * k for slot in filling)


@pytest.mark.parametrize("dtype, f, d", [(torch.float32, 8, 16), (torch.bfloat16, 8, 16), (torch.float32, 6, 10),
                                         (torch.float64, 3, 5)])
def test_grouped_linear_aligned_or_not_with_empty_blocks(dtype, f, d):
    torch.manual_seed(0)
    x, w, ends = torch.randn(9, d).to(dtype), torch.randn(4, f, d).to(dtype), torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    expected = torch.cat([x[:3] @ w[0].t(), x[3:8] @ w[2].t(), x[8:] @ w[3].t()])
    torch.testing.assert_close(grouped_linear(x, w, ends), expected)


def test_shared_expert_sees_every_token_and_no_token_is_dropped():
    torch.manual_seed(0)
    layer = MoE(ModelConfig.preset("toy"))
    for name, p in layer.named_parameters():
        p.data.normal_(0, 0.1) if "shared" in name or "gate.weight" in name else p.data.zero_()
    x = torch.randn(2, 5, 128)
    out, routing = layer(x)
    torch.testing.assert_close(out, layer.shared_experts(x))  # the routed experts are zero
    assert routing.load.sum() == 2 * 5 * 4 and routing.indices.shape == (10, 4)


def test_bf16_is_near_the_float32_result():
    torch.manual_seed(0)
    layer = MoE(ModelConfig.preset("toy", hidden_size=64))
    for p in layer.parameters():
        p.data.normal_(0, 0.2)
    x = torch.randn(1, 1500, 64)  # long enough for filled blocks
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = layer(x)
    full, _ = layer(x)
    assert low.dtype == torch.bfloat16
    assert ((low - full).norm() / full.norm()) < 0.02
