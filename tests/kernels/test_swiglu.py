"""SwiGLU, plain and quantised, against FP64 and against quantising its FP32 result."""

import pytest
import torch
from numbers_ import error, tame

from minids import fp8
from minids.kernels import swiglu, swiglu_quantize
from minids.kernels.activation import reference, swiglu_backward


def inputs(rows, width, device):
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(3)).to(device)
    return tame(rows, 2 * width, device, dtype=torch.bfloat16), weight


@pytest.mark.parametrize("shape", [(1, 1), (37, 300), (64, 128)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_values(where, shape, weighted):
    backend, device = where
    both, weight = inputs(*shape, device)
    gate, up = both.double().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up * (weight[:, None].double() if weighted else 1)
    out = swiglu(both, weight if weighted else None, backend=backend)
    assert out.dtype == torch.bfloat16 and error(out, expected) < 3e-3
    q, scale_inv = swiglu_quantize(both, weight if weighted else None, backend=backend)
    assert error(fp8.dequantize(q, scale_inv, (1, 128)), expected) < 4e-2
    wanted, wanted_scale = fp8.quantize_tile(reference(both.cpu(), weight.cpu() if weighted else None))
    torch.testing.assert_close(scale_inv.cpu(), wanted_scale, rtol=1e-6, atol=0)
    assert (q.float().cpu() != wanted.float()).float().mean() < 1e-3  # a last bit of exp moves few numbers over an edge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_fp64(where, dtype, joined, weighted):
    """Rows wider than a program's block, with gate and up in one matrix or two."""
    backend, device = where
    both, weight = inputs(7, 1100, device)
    parts = [both] if joined else [*both.chunk(2, -1)]
    made = [t.to(dtype).requires_grad_() for t in parts] + [weight.clone().requires_grad_()] * weighted
    exact = [t.detach().double().requires_grad_() for t in made]
    gate, up = exact[0].chunk(2, -1) if joined else exact[:2]
    expected = torch.nn.functional.silu(gate) * up * (exact[-1][:, None] if weighted else 1)
    out = swiglu(made[0], made[-1] if weighted else None, up=None if joined else made[1], backend=backend)
    dh = tame(7, 1100, device, 5, dtype)
    out.backward(dh)
    expected.backward(dh.double())
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert out.dtype == dtype and error(out, expected) < tolerance
    assert max(error(a.grad, b.grad) for a, b in zip(made, exact, strict=True)) < tolerance


def test_backward_gives_h_again(kernel):
    both, weight = inputs(5, 300, kernel)
    dh = tame(5, 300, kernel, 5, torch.bfloat16)
    assert torch.equal(swiglu_backward(dh, both, weight, again=True)[3], swiglu(both, weight, backend="triton"))
    assert [t.numel() for t in swiglu_backward(dh, both)] == [3000, 0, 0, 0]


def test_far_from_zero(where):
    backend, device = where
    both = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 2.0, 2.0]], dtype=torch.bfloat16, device=device)
    assert swiglu(both, backend=backend).tolist() == [[0.0, 400.0, 0.0]]


def test_bad_input():
    both, weight = inputs(4, 8, "cpu")
    for call, exception, message in [
        (lambda: swiglu(both.double()), TypeError, "both: got dtype torch.float64, expected torch.bfloat16"),
        (lambda: swiglu_quantize(both.float()), TypeError, "both: got dtype torch.float32, expected torch.bfloat16"),
        (lambda: swiglu(both, up=both.float()), TypeError, "up: got dtype torch.float32, expected torch.bfloat16"),
        (lambda: swiglu(both, up=both[:2]), ValueError, r"up: got shape \(2, 16\), expected \(4, 16\)"),
        (lambda: swiglu(both[:, :7]), ValueError, r"both: got shape \(4, 7\), expected \(M, 2F\)"),
        (lambda: swiglu(both, weight[:3]), ValueError, r"weight: got shape \(3,\), expected \(4,\)"),
        (lambda: swiglu(both, weight.double()), TypeError, "weight: got dtype torch.float64"),
        (lambda: swiglu_quantize(both, scale="no"), ValueError, "scale: got 'no'"),
    ]:
        with pytest.raises(exception, match=message):
            call()


def test_registered(kernel):
    both, weight = inputs(20, 130, kernel)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (both.requires_grad_(), weight.requires_grad_(), None)
    torch.library.opcheck(torch.ops.minids.swiglu.default, args, test_utils=checks)
    both, weight, checks = both.detach(), weight.detach(), checks[:2]
    for again in (False, True):
        args = (tame(20, 130, kernel, 5, torch.bfloat16), both, weight, None, again)
        torch.library.opcheck(torch.ops.minids.swiglu_backward.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.minids.swiglu_quantize.default, (both, None, True, True), test_utils=checks)
