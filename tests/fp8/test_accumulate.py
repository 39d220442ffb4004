"""The simulated accumulator against one written with exact fractions, its error bound, and V3's 2% at K = 4096."""

import json
import math
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.fp8 import fake_quantize, quantize_block, quantize_tile
from minids.fp8.accumulate import error_bound, matmul


def exponent(x: Fraction) -> int:
    """floor(log2 |x|), exactly."""
    guess = math.frexp(float(abs(x)))[1] - 1
    return guess if Fraction(2) ** guess <= abs(x) < Fraction(2) ** (guess + 1) else guess + 1


def cut(x: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(x / unit) * unit


def dot_by_fractions(a, b, bits, promote_every, group=32, shared_alignment=True) -> Fraction:
    """One result, one step at a time, as V3 3.5.2 tells it."""
    total = acc = Fraction(0)
    products = [Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)]
    # The exponents of the two factors are added before their mantissas are multiplied.
    powers = [exponent(Fraction(x)) + exponent(Fraction(y)) if x and y else None for x, y in zip(a, b, strict=True)]
    for start in range(0, len(products), group):
        found = [e for e in powers[start : start + group] if e is not None]
        if shared_alignment and acc:
            found.append(exponent(acc))
        if found:
            unit = Fraction(2) ** (max(found) - (bits - 1))
            aligned = sum(cut(p, unit) for p in products[start : start + group])
            acc = (cut(acc, unit) if shared_alignment else acc) + aligned
            if acc:
                acc = cut(acc, Fraction(2) ** (exponent(acc) - (bits - 1)))
        if promote_every and (start + group) % promote_every == 0:
            total, acc = total + acc, Fraction(0)
    return total + acc


def e4m3(*shape, seed=0, gen=torch.randn, binades=0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = gen(shape, generator=generator) * torch.exp2(binades * torch.randn(shape, generator=generator))
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


@given(
    k=st.integers(1, 300), bits=st.integers(2, 17), promote=st.sampled_from([None, 32, 128]), seed=st.integers(0, 2**31),
    binades=st.sampled_from([0.0, 3.0]), shared=st.booleans(), group=st.sampled_from([32, 16]),
)  # fmt: skip
@settings(max_examples=60)
def test_equals_fractions(k, bits, promote, seed, binades, shared, group):
    a, b = e4m3(2, k, seed=seed, binades=binades), e4m3(k, 2, seed=seed + 1, binades=binades)
    found = matmul(a, b, bits=bits, promote_every=promote, group=group, shared_alignment=shared)
    for i in range(2):
        for j in range(2):
            exact = float(dot_by_fractions(a[i].tolist(), b[:, j].tolist(), bits, promote, group, shared))
            if promote is None:
                assert found[i, j].item() == exact
            else:  # stretches are added in FP32, which rounds
                sums = (a[i].abs() @ b[:, j].abs()).item()
                assert found[i, j].item() == pytest.approx(exact, rel=0, abs=10 * 2.0**-24 * sums)


def test_by_hand():
    """448 + 0.0273...: the unit of a step whose largest product is 448 = 1.75 * 2^8 is 2^(8 - 13) = 1/32."""
    a = torch.tensor([[448.0, 0.25, 3 / 64, 1 / 64]])
    ones = torch.ones(4, 1)
    assert matmul(a, ones).item() == 448.25 + 1 / 32  # 3/64 is cut to 1/32, 1/64 to 0
    assert matmul(-a, ones).item() == -448.25 - 1 / 32  # towards zero
    assert matmul(a, ones, bits=None).item() == 448.25 + 4 / 64
    assert matmul(a, ones, bits=16).item() == 448.25 + 4 / 64  # two more bits hold 1/64


def test_the_sum_is_cut_exactly():
    """1 - 2^-26 lies below 1, so its leading 14 bits are those of 1 - 2^-14; rounded to FP32 first it would be 1."""
    a, b = torch.zeros(1, 64), torch.zeros(64, 1)
    a[0, 0] = b[0] = 1.0
    a[0, 40], b[40] = -(2.0**-13), 2.0**-13
    assert matmul(a, b, shared_alignment=False).item() == 1 - 2.0**-14
    assert matmul(a, b).item() == 1  # beside a sum of 1 the product has no bit left


def test_small_sums_stand_still_beside_a_large_one():
    """8064 in 14 bits has a last place of 1/2: halves are added, quarters are lost for ever. Promoted, none is."""
    a = torch.zeros(1, 1024)
    a[0, 0], a[0, 128::32] = 448.0, 0.5
    b = torch.ones(1024, 1)
    b[0] = 18.0  # 448 * 18 = 8064, 13 bits: 4096 <= 8064 < 8192, its last place is 2^-1
    assert matmul(a, b, promote_every=None).item() == 8064 + 28 * 0.5
    a[0, 128::32] = 0.25
    assert matmul(a, b, promote_every=None).item() == 8064
    assert matmul(a, b, promote_every=128).item() == 8064 + 28 * 0.25


@given(
    k=st.integers(1, 700), seed=st.integers(0, 2**31), binades=st.sampled_from([0.0, 3.0]), bits=st.integers(6, 16),
    promote=st.sampled_from([None, 128]), shared=st.booleans(), gen=st.sampled_from([torch.randn, torch.rand]),
)  # fmt: skip
@settings(max_examples=60)
def test_error_bound(k, seed, binades, bits, promote, shared, gen):
    a, b = (e4m3(*shape, seed=seed + i, binades=binades, gen=gen) for i, shape in enumerate(((8, k), (k, 8))))
    found = matmul(a, b, bits=bits, promote_every=promote, shared_alignment=shared)
    error = (found.double() - a.double() @ b.double()).abs()
    sums = a.double().abs() @ b.double().abs()
    fp32 = (k // 128 + 1) * 2.0**-23
    assert (error <= (error_bound(k, bits, promote, shared_alignment=shared) + fp32) * sums).all()


def test_k_4096_errs_by_about_two_percent_and_promotion_repairs_it():
    """V3 3.3.2: "a maximum relative error of nearly 2%", of what it does not say. The model's bound is 1.95% of |a| @ |b|;
    of the results' root mean square the largest error is between 1.3% and 1.8%, with the seed; and relative to itself
    one result in twenty errs by more than 1.9%.

    Expected of the typical result: 128 steps, each cutting 0.36 * 2^-13 of the sum so far, which grows linearly: 0.28%.
    All this of products aligned among themselves, V3's words; the chip's way is asked below.
    """
    a, b = e4m3(256, 4096), e4m3(4096, 256, seed=1)
    exact = a.double() @ b.double()
    rms = exact.pow(2).mean().sqrt()
    start = time.perf_counter()
    cut14 = (matmul(a, b, promote_every=None, shared_alignment=False) - exact) / rms
    seconds = time.perf_counter() - start
    promoted = (matmul(a, b, shared_alignment=False) - exact) / rms
    assert 0.0125 < cut14.abs().max() < 0.02
    assert (cut14 * rms / exact).abs().flatten().quantile(0.95).item() == pytest.approx(0.019, abs=0.001)
    assert error_bound(4096, promote_every=None, shared_alignment=False) == pytest.approx(0.0195, abs=1e-4)
    assert cut14.pow(2).mean().sqrt() == pytest.approx(128 * 0.36 / 2 * 2**-13, rel=0.15)
    assert promoted.abs().max() < 0.0006 and promoted.pow(2).mean().sqrt() < cut14.pow(2).mean().sqrt() / 25
    assert seconds < 20  # a second on an idle core

    towards_zero = (cut14 * exact.sign()).mean()
    assert towards_zero < -0.8 * cut14.abs().mean()  # errors do not average out
    assert (promoted * exact.sign()).mean().abs() < 2e-4


def test_error_grows_with_k_only_without_promotion():
    worst = {}
    for k in (256, 1024, 4096):
        a, b = e4m3(32, k, gen=torch.rand), e4m3(k, 32, seed=1, gen=torch.rand)
        exact = a.double() @ b.double()
        for promote in (None, 128):
            relative = ((matmul(a, b, promote_every=promote, shared_alignment=False) - exact) / exact).abs().max().item()
            assert relative < error_bound(k, promote_every=promote, shared_alignment=False)
            worst[k, promote] = relative
    assert worst[4096, None] > 3 * worst[1024, None] > 6 * worst[256, None]
    assert max(worst[k, 128] for k in (256, 1024, 4096)) < 4 * 2.0**-14  # four steps of less than half a unit in the mean


def test_by_default_it_loses_what_an_h200_loses():
    """Sums of numbers from 0 to 1, the mean loss: by default as measured (figures/bench/kernel_ladder.json), because the
    sum is aligned with the products; without that, 25 times less. Other draws than the chip's: 5% apart at most."""
    rows = json.loads((Path(__file__).parents[2] / "figures/bench/kernel_ladder.json").read_text())["data"]["adding"]
    chip = {row["k"]: row["lost"] for row in rows}
    for k in (512, 4096):
        a, b = e4m3(32, k, gen=torch.rand), e4m3(k, 32, seed=1, gen=torch.rand)
        exact = a.double() @ b.double()
        for promote, name in ((None, "tensor core"), (128, "minids")):
            lost = [((exact - matmul(a, b, promote_every=promote, **way)) / exact).mean().item()
                    for way in ({}, {"shared_alignment": False})]  # fmt: skip
            assert lost[0] == pytest.approx(chip[k][name], rel=0.05) and lost[1] < lost[0] / 4


def test_no_bits_is_fp32():
    a, b = e4m3(16, 500), e4m3(500, 16, seed=1)
    assert ((matmul(a, b, bits=None) - a @ b).abs() <= 1000 * 2.0**-24 * (a.abs() @ b.abs())).all()
    torch.testing.assert_close(matmul(a, b, bits=None, promote_every=None), a @ b, rtol=0, atol=0)


def test_scales_are_applied_at_promotion():
    """V3's Fprop: x in 1 x 128 tiles, w in 128 x 128 blocks. In FP32 the same as multiplying what was dequantised."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 300, generator=generator), torch.randn(200, 300, generator=generator)
    x_q, x_scale = quantize_tile(x)
    w_q, w_scale = quantize_block(w)
    b_scale = w_scale.repeat_interleave(128, 0)[:200].t()  # (k, N)
    expected = fake_quantize(x, (1, 128)).double() @ fake_quantize(w).double().t()
    sums = fake_quantize(x, (1, 128)).double().abs() @ fake_quantize(w).double().abs().t()
    fp32 = 310 * 2.0**-24  # a rounding for each of 300 additions and a few products, worst case
    exact = matmul(x_q, w_q.t(), bits=None, a_scale=x_scale, b_scale=b_scale)
    assert ((exact - expected).abs() <= fp32 * sums).all()
    rough = matmul(x_q, w_q.t(), a_scale=x_scale, b_scale=b_scale)
    error = (rough - expected).abs()
    assert (error > fp32 * sums).any() and (error <= (error_bound(300) + fp32) * sums).all()
    assert torch.equal(matmul(x_q, w_q.t(), a_scale=torch.full((1, 1), 2.0)), 2 * matmul(x_q, w_q.t()))


def test_zeros_and_tiny_numbers():
    assert torch.equal(matmul(torch.zeros(2, 64), torch.ones(64, 3)), torch.zeros(2, 3))
    a = torch.full((1, 32), 2.0**-9)
    assert matmul(a, a.t()).item() == 32 * 2.0**-18


def test_refuses():
    a, b = torch.ones(2, 64), torch.ones(64, 3)
    with pytest.raises(ValueError, match=r"got shapes \(2, 64\) and \(2, 64\)"):
        matmul(a, a)
    with pytest.raises(ValueError, match="bits: got 24, expected 2 to 17, or None"):
        matmul(a, b, bits=24)
    with pytest.raises(ValueError, match="promote_every: got 48, expected a multiple of group = 32"):
        matmul(a, b, promote_every=48)
    for name, value in (("bits", 14.5), ("promote_every", 128.0), ("group", None)):
        with pytest.raises(TypeError, match=f"{name}: got {value}, expected an integer"):
            matmul(a, b, **{name: value})
    with pytest.raises(ValueError, match="group: got 64"):
        matmul(a, b, group=64)
    with pytest.raises(ValueError, match="b: holds NaN"):
        matmul(a, b * math.nan)
    with pytest.raises(TypeError, match="a: got dtype torch.int64"):
        matmul(a.long(), b)
    with pytest.raises(ValueError, match=r"a_scale: got shape \(2, 2\), expected \(2, 1\)"):
        matmul(a, b, a_scale=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"b_scale: got shape \(2, 3\), expected \(1, 3\)"):  # without promotion: one scale
        matmul(a, b, promote_every=None, b_scale=torch.ones(2, 3))
