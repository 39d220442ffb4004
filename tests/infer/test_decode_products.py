"""The products that decoding on the CPU takes its own way to, against the plain ones, and when they apply."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig
from minids.model import linear, moe_decode
from minids.model.linear import FEW, Linear, few_linear, one_token
from minids.model.moe import MoE

SMALL = dict(rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), dims=st.integers(1, 3))
def test_one_token_is_a_matrix_times_a_vector(rows, columns, dims):
    """Row counts that 8 bands divide and others; every number of leading dimensions; views that are not contiguous."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(*[1] * (dims - 1), 2 * columns, generator=generator)[..., ::2]
    expected = (weight.double() @ x.double().flatten()).view(*[1] * (dims - 1), rows)
    torch.testing.assert_close(one_token(x, weight).double(), expected, **SMALL)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40),
       shape=st.sampled_from([(2,), (1, 3), (4, 1), (2, 2), (5,), (0,)]))  # fmt: skip
def test_a_few_tokens_are_a_product_with_few_columns(rows, columns, shape):
    """Token counts on both sides of the limit; views that are not contiguous. Every weight counts as large."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(*shape, 2 * columns, generator=generator)[..., 1::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LARGE", 0)
        got = few_linear(x, weight)
    assert got.shape == (*shape, rows) and got.is_contiguous()
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    assert ((got.double() - exact).abs() <= columns * 2**-24 * size).all()  # of a sum of so many FP32 products, any order


def test_a_linear_layer_trains_and_takes_the_short_way_only_in_inference(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "minids.model.linear.one_token", lambda x, w: calls.append(x.shape) or torch.nn.functional.linear(x, w)
    )
    layer = Linear(6, 16)
    assert layer.bias is None
    layer(torch.randn(1, 1, 6)).sum().backward()
    assert layer.weight.grad is not None and calls == []
    with torch.no_grad():
        layer(torch.randn(FEW, 1, 6))
        layer.double()(torch.randn(1, 1, 6, dtype=torch.float64))
        assert calls == []
        layer.float()(torch.randn(1, 1, 6))
    assert calls == [(1, 1, 6)]


def experts_of(seed: int, **overrides) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(ModelConfig.preset("toy", vocab_size=50, hidden_size=16, moe_intermediate_size=8, **overrides))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    return moe


def by_the_formula(moe: MoE, x: torch.Tensor, routing) -> torch.Tensor:
    """sum_k g_k W_down (silu(W_gate x) * W_up x), one token and expert at a time, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(routing.weights[token], routing.indices[token], strict=True):
            gate, up = (moe.experts.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight.double() * (moe.experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16])
@torch.no_grad()
def test_few_tokens_follow_the_formula(tokens):
    moe = experts_of(tokens)
    x = torch.randn(tokens, 16)
    routing = moe.gate(x)
    assert moe_decode.applies(x, routing, moe.experts.gate_up_proj.shape[0])
    torch.testing.assert_close(moe.experts(x, routing).double(), by_the_formula(moe, x, routing), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_many_tokens_and_few_agree(monkeypatch):
    moe = experts_of(0)
    x = torch.randn(12, 16)
    routing = moe.gate(x)
    few = moe.experts(x, routing)
    monkeypatch.setattr(moe_decode, "applies", lambda *args: False)
    torch.testing.assert_close(few, moe.experts(x, routing), rtol=1e-4, atol=1e-5)


def test_training_and_large_batches_take_the_grouped_way():
    moe = experts_of(0)
    x = torch.randn(3, 16)
    assert not moe_decode.applies(x, moe.gate(x), 8)  # gradients are on
    with torch.no_grad():
        routing = moe.gate(x)
        assert moe_decode.applies(x, routing, routing.indices.numel() // moe_decode.FEW + 1)
        assert not moe_decode.applies(x, routing, routing.indices.numel() // moe_decode.FEW - 1)


def test_sorting_the_choices_by_hand():
    """Token 0 goes to experts 5 and 2, token 1 to 2 and 7; experts 5 and 7 have one token each, which is doubled."""
    experts, sizes, token_of_slot, slot_of_choice = moe_decode.sort_choices([[5, 2], [2, 7]])
    assert experts == [5, 2, 7] and sizes == [2, 2, 2]
    assert token_of_slot == [0, 0, 0, 1, 1, 1]
    assert slot_of_choice == [[0, 2], [3, 4]]
