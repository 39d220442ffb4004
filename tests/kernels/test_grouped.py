"""Grouped products: ragged and empty groups, forward and both gradients, BF16 and FP8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_ import error, tame

from minids import fp8
from minids.kernels import (
    grouped,
    grouped_fp8,
    grouped_fp8_gemm,
    grouped_fp8_wgrad,
    grouped_gemm,
    grouped_wgrad,
    quantize_block,
    quantize_tile,
)  # fmt: skip

BF16 = torch.bfloat16
ENDS = [[0, 70, 70, 200], [200], [0, 0, 200], [64, 128, 200, 200], [1, 2, 3, 200, 200]]
FP8_ENDS = [[0, 128, 128, 384], [384], [128, 256, 384, 384]]


def int32(ends, device):
    return torch.tensor(ends, dtype=torch.int32, device=device)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 2**31))
def test_reference_is_a_product_an_expert(loads, seed):
    ends = torch.tensor(loads).cumsum(0).int()
    x, w = tame(sum(loads), 24, "cpu", seed, BF16), tame(len(loads) * 16, 24, "cpu", seed + 1, BF16).view(-1, 16, 24)
    expert = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    expected = torch.einsum("mk,mnk->mn", x.double(), w[expert].double())
    assert grouped_gemm(x, w, ends, backend="torch").shape == expected.shape
    assert not len(x) or error(grouped_gemm(x, w, ends, backend="torch"), expected) < 4e-3


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_tiles(kernel, ends):
    """Every expert's rows 128 by 128, then nothing; the last entry says how many tiles there are."""
    tiles, starts = grouped.find_tiles(int32(ends, kernel), 200, 128).tolist(), [0, *ends[:-1]]
    expected = [[e, row, b] for e, (a, b) in enumerate(zip(starts, ends, strict=True)) for row in range(a, b, 128)]
    assert tiles[: len(expected)] == expected and tiles[-1] == [len(ends) + len(expected), 0, 0]
    assert all(tile == [len(ends), 0, 0] for tile in tiles[len(expected) : -1])


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("n_major", [False, True], ids=["k_major", "n_major"])
def test_forward(kernel, ends, n_major):
    x, w = tame(200, 72, kernel, dtype=BF16), tame(len(ends) * 136, 72, kernel, 1, BF16).view(-1, 136, 72)
    expected = grouped.reference(x, w, int32(ends, kernel))
    w = w.transpose(1, 2).contiguous().transpose(1, 2) if n_major else w
    assert error(grouped_gemm(x, w, int32(ends, kernel), backend="triton"), expected) < 1e-3


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
def test_weight_gradient(kernel, ends, out_dtype):
    dy, x = tame(200, 136, kernel, dtype=BF16), tame(200, 72, kernel, 1, BF16)
    out = grouped_wgrad(dy, x, int32(ends, kernel), out_dtype=out_dtype, backend="triton")
    assert error(out, grouped.wgrad_reference(dy, x, int32(ends, kernel), out_dtype)) < 1e-3
    empty = [e for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if a == b]
    assert not out[empty].any()


def test_infinity_stays_with_its_expert(kernel):
    """A tile that reaches into the next expert's rows must not multiply them, not even by zero."""
    dy, x = tame(200, 64, kernel, dtype=BF16), tame(200, 64, kernel, 1, BF16)
    dy[70] = torch.inf
    dw = grouped_wgrad(dy, x, int32([70, 200], kernel), backend="triton")
    assert dw[0].isfinite().all() and not dw[1].isfinite().any()


def test_infinity_of_another_experts_matrix(kernel):
    """72 channels are no whole blocks: those behind them are the next expert's, if W has unit stride along N."""
    x, w = tame(200, 72, kernel, dtype=BF16), tame(2 * 72, 136, kernel, 1, BF16).view(2, 72, 136)
    w[1] = torch.inf
    out = grouped_gemm(x, w.transpose(1, 2), int32([70, 200], kernel), backend="triton")
    assert out[:70].isfinite().all() and not out[70:].isfinite().any()


def test_gradients_are_those_of_the_reference(where):
    backend, device = where
    ends = int32([0, 70, 70, 200], device)
    x, dy = tame(200, 72, device, dtype=BF16), tame(200, 136, device, 2)
    w = tame(4 * 136, 72, device, 1, BF16).view(4, 136, 72)
    made, expected = [(x.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    grouped_gemm(*made, ends, backend=backend).backward(dy.to(BF16))
    stops = ends.tolist()
    for e, (a, b) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
        (expected[0][a:b].float() @ expected[1][e].float().t()).backward(dy[a:b].to(BF16).float())
    for a, b in zip(made, expected, strict=True):
        assert error(a.grad, b.grad) < 4e-3


@pytest.mark.parametrize("ends", FP8_ENDS, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, BF16], ids=str)
def test_fp8_forward(where, ends, out_dtype):
    backend, device = where
    x, w = tame(384, 144, device), tame(len(ends) * 200, 144, device, 1).view(-1, 200, 144)
    a, b = quantize_tile(x, column_major=True, backend="torch"), quantize_block(w, backend="torch")
    out = grouped_fp8_gemm(*a, *b, int32(ends, device), out_dtype=out_dtype, backend=backend)
    left, right = fp8.dequantize(*a, (1, 128), torch.float64), fp8.dequantize(*b, 128, torch.float64)
    stops = [0, *ends]
    expected = torch.cat([left[s:t] @ right[e].t() for e, (s, t) in enumerate(zip(stops[:-1], stops[1:], strict=True))])
    assert error(out, expected) < {"cpu": 1e-6, "cuda": 1e-3}[device] + (4e-3 if out_dtype == BF16 else 0)


@pytest.mark.parametrize("ends", FP8_ENDS, ids=str)
@pytest.mark.parametrize("n", [200, 256])
def test_fp8_weight_gradient(where, ends, n):
    """Against the product of each expert's factors, quantised along its rows and dequantised."""
    backend, device = where
    dy, x = tame(384, n, device), tame(384, 144, device, 1)
    out = grouped_fp8_wgrad(dy, x, int32(ends, device), backend=backend)
    stops = [0, *ends]
    for e, (a, b) in enumerate(zip(stops[:-1], stops[1:], strict=True)):
        if a == b:
            assert not out[e].any()
            continue
        rows = [fp8.dequantize(*fp8.quantize_tile(t[a:b].t().contiguous()), (1, 128), torch.float64) for t in (dy, x)]
        assert error(out[e], rows[0] @ rows[1].t()) < {"cpu": 1e-6, "cuda": 1e-3}[device]


def test_bad_input():
    x, w, ends = torch.zeros(4, 8, dtype=BF16), torch.zeros(2, 16, 8, dtype=BF16), int32([2, 4], "cpu")
    for args, exception, message in [
        ((x.float(), w, ends), TypeError, "x: got dtype torch.float32, expected torch.bfloat16"),
        ((x, w, ends.long()), TypeError, "ends: got dtype torch.int64, expected torch.int32"),
        ((x, w, ends[:1]), ValueError, r"ends: got shape \(1,\), expected \(2,\)"),
        ((x[:, :4], w, ends), ValueError, r"x, w: got shapes \(4, 4\) and \(2, 16, 8\)"),
    ]:
        with pytest.raises(exception, match=message):
            grouped_gemm(*args)
    with pytest.raises(ValueError, match="ends: got 100, expected multiples of 128"):
        grouped_fp8_wgrad(torch.zeros(128, 8), torch.zeros(128, 8), int32([100, 128], "cpu"))
    with pytest.raises(ValueError, match=r"dy, x: got shapes \(100, 8\) and \(100, 8\)"):
        grouped_fp8_wgrad(torch.zeros(100, 8), torch.zeros(100, 8), int32([100], "cpu"))
    a, b = quantize_tile(torch.zeros(128, 8)), quantize_block(torch.zeros(2, 16, 8))
    with pytest.raises(ValueError, match=r"b: got strides .* expected a contiguous tensor"):
        grouped_fp8_gemm(*a, b[0][:, :, :8].transpose(1, 2).contiguous().transpose(1, 2), b[1], int32([0, 128], "cpu"))


def test_registered(kernel):
    ends = int32([0, 70, 200], kernel)
    x, dy = tame(200, 72, kernel, dtype=BF16), tame(200, 136, kernel)
    w = tame(3 * 136, 72, kernel, 1, BF16).view(3, 136, 72)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.minids.grouped_gemm.default, (x.requires_grad_(), w, ends), test_utils=checks)
    ops, x = torch.ops.minids, x.detach()
    torch.library.opcheck(ops.grouped_wgrad.default, (dy.to(BF16), x, ends, torch.float32), test_utils=checks[:2])
    a, b = quantize_tile(tame(128, 144, kernel)), quantize_block(tame(16, 144, kernel)[None])
    torch.library.opcheck(ops.grouped_fp8_gemm.default, (*a, *b, int32([128], kernel), BF16), test_utils=checks[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_large():
    torch.manual_seed(0)
    loads = torch.randint(0, 12, (32,)) * 128
    ends = loads.cumsum(0).int().cuda()
    m = int(ends[-1])
    x, dy = tame(m, 1024, "cuda", dtype=BF16), tame(m, 640, "cuda", 2)
    w = tame(32 * 640, 1024, "cuda", 1, BF16).view(32, 640, 1024)
    a, b = quantize_tile(x, column_major=True), quantize_block(w)
    out = grouped_fp8_gemm(*a, *b, ends, out_dtype=torch.float32)
    assert error(out, grouped_fp8.reference(*a, *b, ends, torch.float32)) < 1e-3
    made, expected = (grouped_fp8_wgrad(dy, x.float(), ends, backend=name) for name in ("triton", "torch"))
    assert error(made, expected) < 1e-3
    assert error(grouped_gemm(x, w, ends), grouped.reference(x, w, ends)) < 4e-3
