"""SwiGLU, plain and quantised, against FP64 and against quantising its FP32 result."""

import pytest
import torch
from numbers_ import error, tame

from minids import fp8
from minids.kernels import swiglu, swiglu_quantize
from minids.kernels.activation import reference


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


def test_far_from_zero(where):
    backend, device = where
    both = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 2.0, 2.0]], dtype=torch.bfloat16, device=device)
    assert swiglu(both, backend=backend).tolist() == [[0.0, 400.0, 0.0]]


def test_bad_input():
    both, weight = inputs(4, 8, "cpu")
    for call, exception, message in [
        (lambda: swiglu(both.float()), TypeError, "both: got dtype torch.float32, expected torch.bfloat16"),
        (lambda: swiglu(both[:, :7]), ValueError, r"both: got shape \(4, 7\), expected \(M, 2F\)"),
        (lambda: swiglu(both, weight[:3]), ValueError, r"weight: got shape \(3,\), expected \(4,\)"),
        (lambda: swiglu(both, weight.double()), TypeError, "weight: got dtype torch.float64"),
        (lambda: swiglu_quantize(both, scale="no"), ValueError, "scale: got 'no'"),
    ]:
        with pytest.raises(exception, match=message):
            call()


def test_registered(kernel):
    both, weight = inputs(20, 130, kernel)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.minids.swiglu.default, (both, weight), test_utils=checks)
    torch.library.opcheck(torch.ops.minids.swiglu_quantize.default, (both, None, True, True), test_utils=checks)
