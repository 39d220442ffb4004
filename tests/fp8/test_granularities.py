"""Tiles, rows and whole tensors, both kinds of scale, all formats: against a loop over groups in exact steps."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.fp8 import dequantize, fake_quantize, quantize_block, quantize_row, quantize_tensor, quantize_tile
from minids.fp8.formats import E4M3, E5M2, E5M6, round_to
from minids.fp8.quantize import scale_shape

FORMATS = {"e4m3": E4M3, "e5m2": E5M2, "e5m6": E5M6}
KINDS = list(itertools.product(FORMATS, ("fp32", "ue8m0")))
tiny = 2.0**-126


def spread(shape, seed, binades=8.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(binades * torch.randn(shape, generator=generator))


def scale_by_hand(amax: float, fmt, scale: str) -> float:
    """FP32 quotient, or the smallest power of two that fits, found by counting up; 1 for zeros."""
    if amax == 0:
        return 1.0
    if scale == "fp32":
        return max(float(np.float32(amax) / np.float32(fmt.max)), tiny)
    power = tiny
    while power * fmt.max < amax:
        power *= 2
    return power


def quantize_by_hand(x: torch.Tensor, rows: int, columns: int, fmt, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, a group at a time; x (N, K)."""
    q, scales = torch.zeros_like(x), torch.zeros(-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    for i, j in np.ndindex(*scales.shape):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scales[i, j] = scale_by_hand(x[part].abs().max().item(), fmt, scale)
        q[part] = round_to(x[part] / scales[i, j], fmt)
    return q, scales


def same(q: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(q.float(), expected) and q.is_contiguous()


@given(
    n=st.integers(1, 70), k=st.integers(1, 300), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-38, 1e-3, 1.0, 1e30]), tile=st.sampled_from([1, 32, 128]),
)  # fmt: skip
@settings(max_examples=40)
def test_equals_the_definition(n, k, kind, seed, size, tile):
    name, scale = kind
    x = (spread((n, k), seed, binades=3) * size).clamp(-3e38, 3e38)
    for found, (rows, columns), block in (
        (quantize_tile(x, tile, fmt=name, scale=scale), (1, tile), (1, tile)),
        (quantize_block(x, fmt=name, scale=scale), (128, 128), 128),
        (quantize_row(x, fmt=name, scale=scale), (1, k), (1, k)),
        (quantize_tensor(x, fmt=name, scale=scale), (n, k), None),
    ):
        q, scale_inv = quantize_by_hand(x, rows, columns, FORMATS[name], scale)
        assert same(found[0], q) and found[0].dtype == (FORMATS[name].dtype or torch.float32)
        assert found[1].dtype == torch.float32
        assert torch.equal(found[1].reshape(scale_inv.shape), scale_inv)
        back = dequantize(*found, block, fmt=name)
        assert torch.equal(fake_quantize(x, block, fmt=name, scale=scale), back)


@given(
    n=st.integers(1, 20), k=st.integers(1, 400), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
@settings(max_examples=40)
def test_error_bound(n, k, kind, seed, dtype):
    """Half a unit in the last place: relative above the smallest normal number, absolute below; and FP32's rounding of
    x / s, 2^-24 of x, which can carry a number over a tie, and as much of s itself."""
    name, scale = kind
    fmt = FORMATS[name]
    x = spread((n, k), seed).to(dtype)
    q, scale_inv = quantize_tile(x, fmt=name, scale=scale)
    assert scale_inv.shape == scale_shape(x.shape, (1, 128)) == (n, math.ceil(k / 128))
    s = scale_inv.double().repeat_interleave(128, 1)[:, :k]
    error = (x.double() - q.double() * s).abs()
    allowed = torch.maximum(x.double().abs() * fmt.unit_roundoff, s * fmt.smallest / 2)
    assert (error <= allowed + 2 * 2**-24 * x.double().abs()).all()


@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
@settings(max_examples=20)
def test_largest_lands_in_the_top_binade(seed, kind):
    """FP32 scales put a group's largest number on the format's; a power of two within a factor of two below it."""
    name, scale = kind
    fmt = FORMATS[name]
    q, _ = quantize_tile(spread((8, 256), seed), fmt=name, scale=scale)
    largest = q.float().abs().unflatten(-1, (2, 128)).amax(-1)
    assert (largest == fmt.max).all() if scale == "fp32" else ((largest >= fmt.max / 2) & (largest <= fmt.max)).all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_power_of_two_is_rounded_up_only_when_it_must_be(fmt):
    for exponent in (-20, 0, 13):
        fits = torch.tensor([[fmt.max * 2.0**exponent]])
        over = torch.nextafter(fits, torch.tensor(math.inf))
        assert quantize_tile(fits, fmt=fmt, scale="ue8m0")[1].item() == 2.0**exponent
        q, scale_inv = quantize_tile(over, fmt=fmt, scale="ue8m0")
        assert scale_inv.item() == 2.0 ** (exponent + 1) and q.float().item() == fmt.max / 2


@given(n=st.integers(1, 5), k=st.integers(1, 300), seed=st.integers(0, 2**31), name=st.sampled_from(list(FORMATS)))
@settings(max_examples=30)
def test_power_of_two_scales_lose_nothing_twice(n, k, seed, name):
    """What was dequantised is quantised again without loss, though q and s may both have moved by a factor of two."""
    once = fake_quantize(spread((n, k), seed), (1, 128), fmt=name, scale="ue8m0")
    assert torch.equal(fake_quantize(once, (1, 128), fmt=name, scale="ue8m0"), once)


def test_fp32_scales_keep_q():
    x = spread((40, 300), 7)
    q, _ = quantize_tile(x)
    again, _ = quantize_tile(fake_quantize(x, (1, 128)))
    assert torch.equal(again.float(), q.float())


def test_tiles_of_the_transpose_are_128_by_1():
    x = spread((200, 30), 1)
    q, scale_inv = quantize_tile(x.transpose(-1, -2))
    assert q.shape == (30, 200) and scale_inv.shape == (30, 2) and q.is_contiguous()
    for j, i in itertools.product(range(30), range(2)):
        assert scale_inv[j, i] == x[i * 128 : (i + 1) * 128, j].abs().max() / 448


def test_strides_do_not_matter():
    x = spread((6, 400), 2)
    views = (x[::2, 50:250], x.t(), x.t()[3:], x[:1].expand(5, 400))
    for view, function in itertools.product(views, (quantize_tile, quantize_block, quantize_row, quantize_tensor)):
        q, scale_inv = function(view)
        expected_q, expected_scale = function(view.contiguous())
        assert same(q, expected_q.float()) and torch.equal(scale_inv, expected_scale)


def test_leading_dimensions_are_matrices_of_their_own():
    x = spread((3, 2, 5, 200), 3)
    for function in (quantize_tile, quantize_row, quantize_block):
        q, scale_inv = function(x)
        one_q, one_scale = function(x[2, 1])
        assert torch.equal(q[2, 1].float(), one_q.float()) and torch.equal(scale_inv[2, 1], one_scale)
    q, scale_inv = quantize_tensor(x)
    assert q.shape == x.shape and scale_inv.shape == () and scale_inv == x.abs().max() / 448
    assert torch.equal(dequantize(q, scale_inv, None), q.float() * scale_inv)
    assert quantize_tensor(x[0, 0, 0])[0].shape == (200,)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_zeros(scale):
    for function in (quantize_tile, quantize_block, quantize_row, quantize_tensor):
        q, scale_inv = function(torch.zeros(4, 256), scale=scale)
        assert (scale_inv == 1).all() and not q.float().any()
    x = torch.zeros(1, 256)
    x[0, 200] = 3.0
    assert quantize_tile(x, scale=scale)[1][0, 0] == 1


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 3.4e38])
def test_extremes_stay_finite(value):
    for scale in ("fp32", "ue8m0"):
        x = torch.tensor([[value, -value]])
        q, scale_inv = quantize_tile(x, scale=scale)
        assert torch.isfinite(scale_inv).all() and scale_inv.item() >= tiny and (q.float().abs() <= 448).all()
        error = (x.double() - q.double() * scale_inv.double()).abs()
        assert (error <= torch.maximum(x.double().abs() / 16, scale_inv.double() / 1024)).all()


@pytest.mark.parametrize("function", [quantize_tile, quantize_block, quantize_row, quantize_tensor, fake_quantize])
def test_refuses(function):
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(3, 200)
        x[2, 150] = bad
        with pytest.raises(ValueError, match="1 of 600 values are NaN or infinite"):
            function(x)
    with pytest.raises(ValueError, match="fmt: got 'e2m1', expected one of e4m3, e5m2, e5m6"):
        function(torch.ones(2, 2), fmt="e2m1")
    with pytest.raises(ValueError, match="scale: got 'e8m0', expected one of fp32, ue8m0"):
        function(torch.ones(2, 2), scale="e8m0")
    with pytest.raises(TypeError, match="float8_e4m3fn"):  # quantised already
        function(quantize_tile(torch.ones(2, 2))[0])
    with pytest.raises(ValueError, match="no empty dimension"):
        function(torch.ones(0, 4))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="tile: got 0"):
        quantize_tile(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match=r"x: got shape \(3,\)"):
        quantize_tile(torch.ones(3))
    x = torch.ones(200, 300)
    q, scale_inv = quantize_tile(x)
    assert scale_inv.shape == (200, 3)
    for wrong in (scale_inv.t(), scale_inv[:, :2], scale_inv[0], quantize_block(x)[1]):
        with pytest.raises(ValueError, match=r"expected \(200, 3\).* in blocks of 1 x 128"):
            dequantize(q, wrong, (1, 128))
    with pytest.raises(ValueError, match=r"expected \(\) for one scale"):
        dequantize(q, scale_inv, None)
    for twice in (dequantize(q, scale_inv, (1, 128)), q.float()):  # a float32 q would be scaled twice
        with pytest.raises(TypeError, match="q: got dtype torch.float32"):
            dequantize(twice, scale_inv, (1, 128))
    with pytest.raises(TypeError, match="q: got dtype torch.float8_e4m3fn, expected torch.float32"):
        dequantize(q, scale_inv, (1, 128), fmt="e5m6")
