"""MX blocks against the specification's steps in exact arithmetic, and beside V3's power-of-two tiles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.fp8 import encode, quantize_tile, round_to
from minids.fp8.formats import E8M0, decode
from minids.fp8.mx import MX_ELEMENTS, dequantize_mx, mx_bits, quantize_mx

EMAX = {"e4m3": 8, "e5m2": 15, "e2m3": 2, "e3m2": 4, "e2m1": 2}  # the specification's table
LARGEST = {"e4m3": 448, "e5m2": 57344, "e2m3": 7.5, "e3m2": 28, "e2m1": 6}


def spread(shape, seed, binades=4.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(binades * torch.randn(shape, generator=generator))


@given(t=st.integers(1, 6), k=st.integers(1, 100), name=st.sampled_from(list(EMAX)), seed=st.integers(0, 2**31))
@settings(max_examples=50)
def test_equals_the_specification(t, k, name, seed):
    x = spread((t, k), seed)
    q, scale_inv = quantize_mx(x, name)
    assert q.dtype == scale_inv.dtype == torch.float32 and scale_inv.shape == (t, math.ceil(k / 32))
    for i in range(t):
        for j in range(scale_inv.shape[1]):
            block = x[i, 32 * j : 32 * (j + 1)]
            shared = math.frexp(block.abs().max().item())[1] - 1 - EMAX[name]
            assert scale_inv[i, j].item() == 2.0**shared
            assert torch.equal(q[i, 32 * j : 32 * (j + 1)], round_to(block / 2.0**shared, name))
    assert torch.equal(dequantize_mx(q, scale_inv), q * scale_inv.repeat_interleave(32, 1)[:, :k])


@pytest.mark.parametrize("name", list(EMAX))
def test_bits_and_round_trip(name):
    x = spread((4, 96), 1)
    q, scale_inv = quantize_mx(x, name)
    element = MX_ELEMENTS[name]
    assert torch.equal(decode(encode(q, element), element), q)
    assert torch.equal(decode(encode(scale_inv, E8M0), E8M0), scale_inv)
    assert element.max == LARGEST[name] and mx_bits(name) == element.bits + 0.25


def test_the_floor_saturates_where_rounding_up_does_not():
    x = torch.tensor([[500.0, 1.0]])
    q, scale_inv = quantize_mx(x, "e4m3")
    assert scale_inv.item() == 1 and q[0, 0] == 448  # 10% lost
    q, scale_inv = quantize_tile(x, scale="ue8m0")
    assert scale_inv.item() == 2 and q.float()[0, 0] == 256  # the neighbours of 250 are 240 and 256


def test_zeros_and_tiny_blocks():
    x = torch.zeros(1, 64)
    x[0, 40] = 1e-45
    q, scale_inv = quantize_mx(x, "e2m1")
    assert scale_inv[0, 0] == 1 and scale_inv[0, 1] >= torch.finfo(torch.float32).tiny and not q[0, :32].any()


def test_refuses():
    with pytest.raises(ValueError, match="fmt: got 'e5m6', expected an MX element format: e4m3"):
        quantize_mx(torch.ones(2, 2), "e5m6")
    with pytest.raises(ValueError, match="1 of 4 values are NaN"):
        quantize_mx(torch.tensor([[1.0, math.nan], [0, 0]]))
    with pytest.raises(ValueError, match="block: got 0"):
        quantize_mx(torch.ones(2, 2), block=0)
    q, scale_inv = quantize_mx(torch.ones(2, 64))
    with pytest.raises(ValueError, match=r"scale_inv: got shape \(2, 1\), expected \(2, 2\)"):
        dequantize_mx(q, scale_inv[:, :1])
