"""Quantisation: the bits of `minids.fp8`, wherever it runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_ import hard, same_bits

from minids import fp8
from minids.kernels import (
    block,
    dequantize_block,
    e4m3,
    quantize,
    quantize_block,
    quantize_tile,
    quantize_tile_both,
    quantize_tile_t,
)

SHAPES = [(1, 1), (5, 300), (33, 128), (130, 257), (16, 1024)]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pass_has_the_bits_of_minids_fp8(where, shape, dtype, scale):
    backend, device = where
    x = hard(*shape, dtype, device)
    expected = [*fp8.quantize_tile(x.cpu(), scale=scale), *fp8.quantize_tile(x.cpu().t(), scale=scale)]
    one = [*quantize_tile(x, scale=scale, backend=backend), *quantize_tile_t(x, scale=scale, backend=backend)]
    both = quantize_tile_both(x, scale=scale, column_major=True, backend=backend)
    for made in (one, both):
        assert [same_bits(a, b) for a, b in zip(made, expected, strict=True)] == [True] * 4


@settings(max_examples=25)
@given(m=st.integers(1, 140), k=st.integers(1, 300), seed=st.integers(0, 2**31), column_major=st.booleans())
def test_reference_on_any_shape(m, k, seed, column_major):
    x = hard(m, k, torch.bfloat16, "cpu", seed)
    made = quantize_tile_both(x, column_major=column_major, backend="torch")
    expected = [*fp8.quantize_tile(x), *fp8.quantize_tile(x.t())]
    assert [same_bits(a, b) for a, b in zip(made, expected, strict=True)] == [True] * 4


@pytest.mark.parametrize("seed", range(6))
def test_kernel_on_random_shapes(kernel, seed):
    m, k = (torch.randint(1, n, (), generator=torch.Generator().manual_seed(seed)).item() for n in (300, 500))
    x = hard(m, k, torch.float32, kernel, seed)
    made, expected = (quantize_tile_both(x, backend=name) for name in ("triton", "torch"))
    assert [same_bits(a, b) for a, b in zip(made, expected, strict=True)] == [True] * 4


@pytest.mark.parametrize("shape", [(119, 144), (300, 512), (64, 128), (257, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_on_aligned_rows(kernel, shape, dtype):
    """Rows a multiple of 16 numbers apart: the one kernel for both passes."""
    x = hard(*shape, dtype, kernel)
    made, expected = (quantize_tile_both(x, backend=name) for name in ("triton", "torch"))
    assert [same_bits(a, b) for a, b in zip(made, expected, strict=True)] == [True] * 4


@pytest.mark.parametrize("amax", [1.7, 3.1e-36, 1.3e-35, 7.7e-34, 2.9e30, 3.3e38])
def test_numbers_on_the_edge_between_two_codes(where, amax):
    """The quotient must be that of a true division to its last bit: here that bit decides. Tiny tiles included."""
    backend, device = where
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (codes[1:] + codes[:-1]) / 2
    amaxes = torch.tensor(amax) * (1 + torch.rand(40, generator=torch.Generator().manual_seed(0)) * 0.03)
    amaxes = amaxes.clamp(max=torch.finfo(torch.float32).max)[:, None]
    edges = (middles * (amaxes / torch.tensor(448.0)).double()).float()
    infinity = torch.tensor(torch.inf)
    rows = torch.cat([edges, torch.nextafter(edges, infinity), torch.nextafter(edges, -infinity)])
    x = torch.cat([amaxes.repeat(3, 1), rows, torch.zeros(120, 1)], 1)
    q, scale_inv = quantize_tile(x.to(device), backend=backend)
    expected = fp8.quantize_tile(x)
    assert same_bits(scale_inv, expected[1]) and same_bits(q, expected[0])


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("exponent", [-133, -126, -119, -118, -110, -1, 0, 60, 115, 118, 119, 126, 127])
def test_a_reciprocal_in_two_parts_gives_the_bits_of_a_division(exponent, scale):
    """The arithmetic of `quantize_gluon` for every mantissa of BF16 in x and amax, and x's exponents from amax's down to
    those that round to zero. The device's own reciprocal may be off by two units in the last place."""
    mantissas = torch.arange(128, 256).double() / 128
    amax = (mantissas * 2.0**exponent).to(torch.bfloat16)
    x = (mantissas * 2.0 ** torch.arange(exponent - 21, exponent + 1)[:, None]).flatten().to(torch.bfloat16)
    s, x = e4m3.scale_of(amax.float(), scale)[:, None], x.float()[None, :]
    x = torch.where(x <= amax.float()[:, None], x, 0.0)
    codes = (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    for units in (-2, -1, 0, 1, 2):
        high = ((1 / s).view(torch.int32) + units).view(torch.float32) * e4m3.RECIPROCAL_SHRUNK
        low = (1 - s.double() * high.double()).float() * high
        assert (low > 0).all(), "of low's sign depends that of -0"
        q = (x.double() * high.double() + (x * low).double()).float()  # fits 53 bits: a fused multiply-add's rounding
        assert torch.equal(q.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), codes), (exponent, units)


def test_layouts(where):
    backend, device = where
    x = hard(37, 300, torch.bfloat16, device)
    q, scale_inv = quantize_tile(x, column_major=True, backend=backend)
    assert q.stride() == (300, 1) and scale_inv.shape == (37, 3) and scale_inv.stride() == (1, 40)
    q_t, scale_t = quantize_tile_t(x, backend=backend)
    assert q_t.shape == (300, 37) and q_t.stride() == (48, 1) and scale_t.stride() == (1, 1)
    assert quantize_tile_t(x, column_major=True, backend=backend)[1].stride() == (1, 300)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_tile_that_is_not_finite_becomes_nan_and_no_other(where, bad):
    backend, device = where
    x = hard(8, 256, torch.float32, device)
    clean = quantize_tile(x, backend=backend)
    x[5, 130] = bad
    q, scale_inv = quantize_tile(x, backend=backend)
    assert scale_inv.isnan().nonzero().tolist() == [[5, 1]] and q[5, 128:].float().isnan().all()
    q[5, 128:], scale_inv[5, 1] = clean[0][5, 128:], clean[1][5, 1]
    assert same_bits(q, clean[0]) and same_bits(scale_inv, clean[1])


@pytest.mark.parametrize("shape", [(200, 300), (3, 130, 128), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_blocks_have_the_bits_of_minids_fp8(where, shape, scale):
    backend, device = where
    w = hard(shape[-2] * (shape[0] if len(shape) == 3 else 1), shape[-1], torch.bfloat16, device).view(shape)
    q, scale_inv = quantize_block(w, scale=scale, backend=backend)
    expected = fp8.quantize_block(w.cpu(), scale=scale)
    assert same_bits(q, expected[0]) and same_bits(scale_inv, expected[1])
    for dtype in (torch.bfloat16, torch.float32):
        assert same_bits(dequantize_block(q, scale_inv, dtype, backend=backend), fp8.dequantize(*expected, dtype=dtype))


def test_no_rows(where):
    backend, device = where
    q, scale_inv, q_t, scale_t = quantize_tile_both(torch.empty(0, 200, device=device), backend=backend)
    assert [tuple(t.shape) for t in (q, scale_inv, q_t, scale_t)] == [(0, 200), (0, 2), (200, 0), (200, 0)]


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: quantize_tile(torch.zeros(2, 2, dtype=torch.int32)), TypeError, "x: got dtype torch.int32"),
        (lambda: quantize_tile(torch.zeros(2)), ValueError, r"x: got shape \(2,\), expected 2 dimensions"),
        (lambda: quantize_tile(torch.zeros(4, 4).t()), ValueError, r"x: got strides \(1, 4\), expected unit"),
        (lambda: quantize_tile(torch.zeros(2, 0)), ValueError, r"x: got shape \(2, 0\), expected at least one channel"),
        (lambda: quantize_tile(torch.zeros(2, 2), scale="fp16"), ValueError, "scale: got 'fp16', expected one of"),
        (lambda: quantize_block(torch.zeros(4, 4).t()), ValueError, r"w: got strides \(1, 4\) for shape"),
        (lambda: quantize_block(torch.zeros(0, 4)), ValueError, r"w: got shape \(0, 4\), expected no empty dimension"),
        (
            lambda: dequantize_block(torch.zeros(200, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)),
            ValueError, r"scale_inv: got shape \(1, 1\), expected \(2, 1\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def test_registered(kernel):
    x = hard(20, 130, torch.bfloat16, kernel)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.minids.quantize_tile.default, (x, False, True), test_utils=checks)
    torch.library.opcheck(torch.ops.minids.quantize_tile_both.default, (x, True, False), test_utils=checks)
    torch.library.opcheck(torch.ops.minids.quantize_tile_t.default, (x, True, False), test_utils=checks)
    torch.library.opcheck(torch.ops.minids.quantize_block.default, (x, False), test_utils=checks)
    args = (*block.reference(x), torch.float32)
    torch.library.opcheck(torch.ops.minids.dequantize_block.default, args, test_utils=checks[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_hundred_million_numbers():
    """The quotient without a division: the bits of the division, on many random numbers."""
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(8192, 7168, device="cuda") * torch.randn(8192, 1, device="cuda").mul(8).exp()
        for dtype in (torch.float32, torch.bfloat16):
            y = x.to(dtype)
            made = quantize_tile_both(y, backend="triton", column_major=True)
            for (q, scale_inv), view in ((made[:2], y), (made[2:], y.t())):
                expected = quantize.reference(view)
                assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))
                assert torch.equal(scale_inv, expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_tiles_that_are_not_finite_both_ways(bad):
    """Of x and of its transpose the one tile with the bad number, from a part of a larger matrix."""
    x = hard(200, 512, torch.bfloat16, "cuda")[:, 128:384]
    clean = quantize_tile_both(x)
    x[77, 130] = bad
    q, scale_inv, q_t, scale_t = quantize_tile_both(x)
    assert scale_inv.isnan().nonzero().tolist() == [[77, 1]] and scale_t.isnan().nonzero().tolist() == [[130, 0]]
    assert q[77, 128:].float().isnan().all() and q_t[130, :128].float().isnan().all()
    q[77, 128:], scale_inv[77, 1] = clean[0][77, 128:], clean[1][77, 1]
    q_t[130, :128], scale_t[130, 0] = clean[2][130, :128], clean[3][130, 0]
    assert all(same_bits(a, b) for a, b in zip((q, scale_inv, q_t, scale_t), clean, strict=True))
