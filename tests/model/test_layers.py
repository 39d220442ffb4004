"""Written-out backwards against autograd of the plain formula: norm, SwiGLU, block attention, fused head loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import minids.model.loss as loss_module
from minids.model.attention import attend
from minids.model.layers import RMSNorm, _RMSNorm, swiglu
from minids.model.loss import linear_cross_entropy, next_token_loss


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same_with_gradients(ours, plain, inputs):
    torch.testing.assert_close(ours, plain)
    g = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(plain, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


def test_rms_norm():
    x, w = doubles(3, 4, 6), doubles(6)
    plain = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    same_with_gradients(_RMSNorm.apply(x, w, 1e-6), plain, (x, w))
    norm = RMSNorm(6, 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(norm(x.float()), F.rms_norm(x.float(), (6,), norm.weight, 1e-6))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_swiglu():
    gate, up, weight = doubles(5, 8), doubles(5, 8), doubles(5, 1)

    def plain():
        return gate / (1 + (-gate).exp()) * up

    same_with_gradients(swiglu(gate, up, weight), plain() * weight, (gate, up, weight))
    same_with_gradients(swiglu(gate, up), plain(), (gate, up))
    both = torch.cat([gate, up], -1).detach().requires_grad_()
    halves = both.chunk(2, -1)
    same_with_gradients(swiglu(both, row_weight=weight), F.silu(halves[0]) * halves[1] * weight, (both, weight))


@settings(max_examples=30)
@given(t=st.integers(1, 150), seed=st.integers(0, 10**6), masked=st.booleans())
def test_attention_equals_the_formula(t, seed, masked):
    torch.manual_seed(seed)
    q, k, v = doubles(2, 3, t, 5), doubles(2, 3, t, 5), doubles(2, 3, t, 4)
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    allowed = causal & (torch.rand(2, 1, t, t) < 0.7) | torch.eye(t, dtype=torch.bool) if masked else causal
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~allowed, -torch.inf)
    same_with_gradients(attend(q, k, v, allowed if masked else None, 0.3), scores.softmax(-1) @ v, (q, k, v))


def test_long_rows_take_the_fused_path_with_the_same_result():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 1100, 6), torch.randn(1, 2, 1100, 6), torch.randn(1, 2, 1100, 4)
    scores = (q @ k.transpose(-1, -2) * 0.4).masked_fill(~torch.ones(1100, 1100, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(attend(q, k, v, None, 0.4), scores.softmax(-1) @ v, atol=1e-5, rtol=1e-5)


def test_queries_at_the_end_of_a_longer_past():
    q, k, v = doubles(1, 2, 3, 5), doubles(1, 2, 7, 5), doubles(1, 2, 7, 4)
    allowed = torch.ones(3, 7, dtype=torch.bool).tril(4)
    plain = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    same_with_gradients(attend(q, k, v, None, 0.3), plain, (q, k, v))


@settings(max_examples=30)
@given(n=st.integers(1, 70), vocab=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_head_loss_equals_cross_entropy(n, vocab, seed):
    torch.manual_seed(seed)
    hidden, weight = doubles(n, 6), doubles(vocab, 6)
    labels = torch.randint(-1, vocab, (n,))
    labels[labels < 0] = -100
    old, loss_module.CHUNK_ELEMENTS = loss_module.CHUNK_ELEMENTS, 16 * vocab  # several chunks
    try:
        ours = linear_cross_entropy(hidden, weight, labels)
    finally:
        loss_module.CHUNK_ELEMENTS = old
    plain = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum").float()
    torch.testing.assert_close(ours, plain)
    ours_grad, plain_grad = (torch.autograd.grad(x, (hidden, weight)) for x in (ours, plain))
    for a, b in zip(ours_grad, plain_grad, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)  # softmax in float32


def test_head_loss_survives_extreme_logits():
    hidden, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    assert linear_cross_entropy(hidden, weight, torch.tensor([0])).item() == 0.0
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))  # p underflows, the loss does not overflow
    assert loss.item() == 400.0
    loss.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[200.0], [-200.0]]))


def test_head_loss_ignores_labels_and_refuses_shapes():
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, -100, 2, -100]))
    loss.backward()
    assert hidden.grad[[1, 3]].abs().max() == 0 and hidden.grad[[0, 2]].abs().min(-1).values.max() > 0
    assert linear_cross_entropy(hidden, weight, torch.full((4,), -100)).item() == 0
    with pytest.raises(ValueError, match=r"labels of shape \(3,\): allowed is \(4,\)"):
        linear_cross_entropy(hidden, weight, torch.zeros(3, dtype=torch.int64))
    for label in (-1, 9):  # -1 is no "does not count": it must not be taken for token 0
        with pytest.raises(ValueError, match=f"labels from {label} to {label}: allowed are 0 to 8, and -100"):
            linear_cross_entropy(hidden, weight, torch.tensor([-100, label, -100, -100]))
    torch.testing.assert_close(
        next_token_loss(hidden @ weight.t(), torch.tensor([1, -100, 2, -100])), loss / 2, atol=1e-5, rtol=1e-5)
