"""Formats against torch's types, code for code, and against exact arithmetic where torch has no type."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minids.fp8.formats import E2M1, E2M3, E3M2, E4M3, E5M2, E5M6, E8M0, FORMATS, as_format, decode, encode, round_to

SIGNED = [E4M3, E5M2, E5M6, E2M3, E3M2, E2M1]
IN_TORCH = [E4M3, E5M2]
BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FP16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)


def exact_value(code: int, fmt) -> Fraction:
    """A non-negative code's number, from the definition, in exact arithmetic."""
    exponent, mantissa = code >> fmt.mantissa_bits, code & ((1 << fmt.mantissa_bits) - 1)
    if exponent == 0:
        return Fraction(mantissa, 2**fmt.mantissa_bits) * Fraction(2) ** (1 - fmt.bias)
    return (1 + Fraction(mantissa, 2**fmt.mantissa_bits)) * Fraction(2) ** (exponent - fmt.bias)


def grid(fmt) -> np.ndarray:
    """All finite non-negative numbers in order of their codes; exact in float64."""
    return np.array([float(exact_value(code, fmt)) for code in range(fmt.max_code + 1)])


def nearest_codes(x: np.ndarray, fmt) -> np.ndarray:
    """The code of the nearest number, ties to the even code, saturating; x finite or infinite, in float64, no NaN."""
    numbers, magnitude = grid(fmt), np.minimum(np.abs(x), fmt.max)
    above = np.searchsorted(numbers, magnitude).clip(1, fmt.max_code)
    to_lower, to_upper = magnitude - numbers[above - 1], numbers[above] - magnitude  # exact: few bits apart
    take_upper = (to_upper < to_lower) | ((to_upper == to_lower) & (above % 2 == 0))
    return np.where(take_upper, above, above - 1) + (np.signbit(x).astype(int) << (fmt.bits - 1))


def around_midpoints(fmt) -> torch.Tensor:
    """Every number, every midpoint of neighbours, and the FP32 numbers just below and above these; both signs."""
    numbers = grid(fmt)
    points = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])
    beyond = np.float32([fmt.max * 1.01, fmt.max * 1.04, fmt.max * 1.0625, fmt.max * 2, 3e38, np.inf])
    points = torch.tensor(np.concatenate([points, beyond]))
    return torch.cat([points, -points])


def test_every_code_is_torchs():
    for fmt in (E4M3, E5M2, E8M0):
        codes = torch.arange(256, dtype=torch.uint8)
        theirs = codes.view(fmt.dtype).float()
        ours = decode(codes, fmt)
        assert torch.equal(ours.isnan(), theirs.isnan())
        numbers = ~ours.isnan()
        assert torch.equal(ours[numbers].view(torch.int32), theirs[numbers].view(torch.int32))  # signs of zeros too


def test_every_code_of_the_others_is_the_formula():
    for fmt in (E5M6, E2M3, E3M2, E2M1):
        codes = torch.arange(fmt.max_code + 1)
        assert decode(codes, fmt).double().tolist() == grid(fmt).tolist()
        negative = decode(codes + (1 << (fmt.bits - 1)), fmt)
        assert torch.equal(negative, -decode(codes, fmt)) and negative.signbit().all()
    top = decode(torch.arange(E5M6.max_code + 1, 1 << 11), E5M6)
    assert top[0] == math.inf and top[1:].isnan().all() and len(top) == 64


def test_e5m6_is_fp16_without_four_bits():
    """IEEE's rules for E5M6, as we chose: its codes are FP16's with four zeros behind."""
    codes = torch.arange(4096)
    half = (codes << 4).to(torch.int16).view(torch.float16).float()
    ours = decode(codes, E5M6)
    assert torch.equal(ours.isnan(), half.isnan())
    assert torch.equal(ours[~ours.isnan()], half[~half.isnan()])


@pytest.mark.parametrize("fmt, largest, smallest, normal, bits", [
    (E4M3, 448, 2**-9, 2**-6, 8), (E5M2, 57344, 2**-16, 2**-14, 8), (E5M6, 65024, 2**-20, 2**-14, 12),
    (E2M3, 7.5, 0.125, 1, 6), (E3M2, 28, 0.0625, 0.25, 6), (E2M1, 6, 0.5, 1, 4),
])  # fmt: skip
def test_published_numbers(fmt, largest, smallest, normal, bits):
    assert (fmt.max, fmt.smallest, 2.0**fmt.min_exponent, fmt.bits) == (largest, smallest, normal, bits)


@pytest.mark.parametrize("fmt", IN_TORCH, ids=lambda f: f.name)
def test_rounding_is_torchs_on_all_16_bit_numbers(fmt):
    """Clamped explicitly: torch's cast of larger numbers has been NaN, saturating and infinite."""
    for x in (BF16, FP16, around_midpoints(fmt)):
        cast = x.float().clamp(-fmt.max, fmt.max).to(fmt.dtype)
        numbers = ~x.isnan()
        assert torch.equal(encode(x, fmt)[numbers], cast.view(torch.uint8)[numbers])
        assert torch.equal(round_to(x, fmt)[numbers].view(torch.int32), cast.float()[numbers].view(torch.int32))
        assert round_to(x, fmt)[~numbers].isnan().all() and decode(encode(x, fmt), fmt)[~numbers].isnan().all()


@pytest.mark.parametrize("fmt", SIGNED, ids=lambda f: f.name)
def test_rounding_is_exact_arithmetics(fmt):
    for x in (BF16, FP16, around_midpoints(fmt)):
        x = x[~x.isnan()]
        expected = torch.tensor(nearest_codes(x.double().numpy(), fmt))
        codes = encode(x, fmt)
        assert torch.equal(codes.long(), expected)
        assert torch.equal(round_to(x, fmt).view(torch.int32), decode(codes, fmt).view(torch.int32))


@pytest.mark.parametrize("fmt", SIGNED, ids=lambda f: f.name)
def test_numbers_of_the_format_stay(fmt):
    codes = torch.arange(fmt.max_code + 1)
    assert torch.equal(encode(decode(codes, fmt), fmt).long(), codes)
    assert torch.equal(round_to(decode(codes, fmt), fmt), decode(codes, fmt))


@given(x=st.floats(allow_nan=False, width=32), fmt=st.sampled_from(SIGNED))
def test_any_float32(x, fmt):
    code = encode(torch.tensor(x), fmt).item()
    assert code == nearest_codes(np.float64([x]), fmt)[0]


def test_float64_is_rounded_once():
    """Just above the midpoint of 1 and 1.125, but so little that float32 would put it on the midpoint, then down to 1."""
    x = torch.tensor([1.0625 + 2.0**-40], dtype=torch.float64)
    assert round_to(x, E4M3).item() == 1.125 and round_to(x.float(), E4M3).item() == 1.0
    assert encode(x, E4M3).item() == encode(torch.tensor([1.125]), E4M3).item()


def test_scales_are_powers_of_two():
    codes = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(encode(decode(codes, E8M0), E8M0), codes)
    for bad in (0.0, -1.0, 3.0, math.inf, math.nan, 2.0**-128):
        with pytest.raises(ValueError, match="expected powers of two from 2\\^-127 to 2\\^127"):
            encode(torch.tensor([1.0, bad]), E8M0)


def test_refuses():
    with pytest.raises(ValueError, match="got 'e4m4', expected one of e4m3"):
        as_format("e4m4")
    with pytest.raises(TypeError, match="x: got dtype torch.int64"):
        encode(torch.ones(2, dtype=torch.int64), E4M3)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        round_to(torch.ones(2).to(torch.float8_e4m3fn), E4M3)
    with pytest.raises(TypeError, match="codes: got dtype torch.float32"):
        decode(torch.ones(2), E4M3)
    with pytest.raises(ValueError, match="codes: got 0 to 16, expected 0 to 15"):
        decode(torch.arange(17), E2M1)
    with pytest.raises(ValueError, match="codes: got -1 to -1"):
        decode(torch.tensor([-1]), E4M3)
    with pytest.raises(ValueError, match="got e8m0"):
        round_to(torch.ones(2), E8M0)
    for function in (encode, round_to):
        with pytest.raises(ValueError, match="1 of 2 values are NaN, which e2m1 cannot say"):
            function(torch.tensor([1.0, math.nan]), "e2m1")


def test_any_strides_and_shapes():
    x = torch.randn(6, 10).t()[::2]
    assert torch.equal(encode(x, E4M3), encode(x.contiguous(), E4M3))
    assert torch.equal(round_to(x, E5M6), round_to(x.contiguous(), E5M6))
    assert encode(torch.tensor(1.0), E4M3).shape == () and encode(torch.empty(0), E4M3).shape == (0,)
    assert {name: fmt.name for name, fmt in FORMATS.items()} == {name: name for name in FORMATS} and len(FORMATS) == 7
