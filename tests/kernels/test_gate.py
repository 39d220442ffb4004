"""The gate's product from BF16 parts: as near to FP64 as a product in float32, values and gradients."""

import pytest
import torch
from numbers_ import error, tame

from minids.kernels import gate_logits

BF16 = torch.bfloat16


def case(device, n, d, e, dtype):
    x, weight = tame(n, d, device, dtype=BF16), (tame(e, d, device, 1) / 8).to(dtype)
    d_logits = torch.randn(n, e, generator=torch.Generator().manual_seed(2)).to(device)
    return x, weight, d_logits * d_logits.exp()  # over many magnitudes


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(130, 192, 16), (5, 100, 64), (600, 128, 256)], ids=str)
def test_as_exact_as_float32(where, shape, dtype):
    """Float32's own product, and a tensor core that truncates within 64 numbers, are 1e-7 to 5e-7 from FP64; BF16's would
    be 2e-3, and two parts of three 1e-5. dx is rounded to BF16, 2^-9 at most, and its parts are exact to 2^-16."""
    backend, device = where
    x, weight, d = case(device, *shape, dtype)
    made, exact = [[t.clone().to(kind or t.dtype).requires_grad_() for t in (x, weight)] for kind in (None, torch.float64)]
    logits = gate_logits(*made, backend=backend)
    expected = exact[0] @ exact[1].t()
    assert logits.dtype == torch.float32 and error(logits, expected) < 1e-6
    logits.backward(d)
    expected.backward(d.double())
    for ours, wanted in zip(made, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert error(ours.grad, wanted.grad) < (1e-6 if ours.dtype == torch.float32 else 3e-3)
    rounded = exact[0].grad.to(BF16)  # one number in some hundred lies so near to the middle that it goes the other way
    assert float((made[0].grad != rounded).float().mean()) < 2e-2


def test_the_same_bits_every_time(kernel):
    """Shares of dW are added in one order."""
    x, weight, d = case(kernel, 1500, 64, 32, torch.float32)
    found = []
    for _ in range(2):
        leaf = weight.clone().requires_grad_()
        gate_logits(x, leaf, backend="triton").backward(d)
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_wrong_inputs(kernel):
    x, weight, _ = case(kernel, 4, 32, 16, torch.float32)
    with pytest.raises(TypeError, match=r"x: got dtype torch\.float32, expected torch\.bfloat16"):
        gate_logits(x.float(), weight, backend="triton")
    with pytest.raises(ValueError, match=r"weight: got shape \(16, 31\), expected \(16, 32\)"):
        gate_logits(x, weight[:, :31], backend="triton")
    with pytest.raises(ValueError, match="weight: got 12 experts, expected a power of two from 16 on"):
        gate_logits(x, weight[:12], backend="triton")
    with pytest.raises(ValueError, match="strides"):
        gate_logits(x, weight.t().contiguous().t(), backend="triton")
