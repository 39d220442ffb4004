"""Block quantisation against a scalar E4M3 written from the format's definition, and its error bound."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.fp8 import E4M3_MAX, dequantize, quantize_block
from minids.fp8.quantize import scale_shape


def e4m3_grid() -> list[float]:
    """The non-negative finite E4M3 numbers in order of their codes: bias 7, code 0x7F is NaN, no infinity."""
    grid = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        grid.append(math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))
    return grid


GRID = e4m3_grid()


def round_to_e4m3(x: float) -> float:
    """Nearest E4M3 number in exact arithmetic, ties to the even code, saturating."""
    magnitude = abs(x)
    code = min(range(len(GRID)), key=lambda c: (abs(GRID[c] - magnitude), c & 1))
    return math.copysign(GRID[code], x)


def quantize_by_scalars(w: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one number at a time: FP32 scale and quotient, then the exact rounding above."""
    n_rows, n_columns = w.shape
    q = np.zeros(w.shape)
    scales = np.ones((-(-n_rows // block), -(-n_columns // block)), np.float32)
    for i, j in np.ndindex(scales.shape):
        part = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
        amax = max(abs(float(v)) for v in w[part].flat)
        scales[i, j] = np.float32(amax) / np.float32(448) if amax > 0 else 1.0
        q[part] = np.vectorize(lambda v, s=scales[i, j]: round_to_e4m3(float(np.float32(v) / s)))(w[part])
    return q, scales


def spread(shape, seed, low=-12, high=4) -> torch.Tensor:
    """Random signs and magnitudes over many binades, so that normals, subnormals and zeros of E4M3 all occur."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.empty(shape).uniform_(low, high, generator=generator)
    return torch.randn(shape, generator=generator) * torch.exp2(exponents)


def test_grid_is_the_dtype():
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert codes.double().tolist() == GRID and GRID[-1] == E4M3_MAX == 448


@given(
    n_rows=st.integers(1, 40), n_columns=st.integers(1, 40), block=st.sampled_from([4, 7, 16, 128]),
    seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_equals_scalar_definition(n_rows, n_columns, block, seed, scale):
    w = spread((n_rows, n_columns), seed) * scale
    q, scale_inv = quantize_block(w, block)
    expected_q, expected_scale = quantize_by_scalars(w.numpy(), block)
    assert (q.double().numpy() == expected_q).all()
    assert (scale_inv.numpy() == expected_scale).all() and scale_inv.dtype == torch.float32


@given(
    n_rows=st.integers(1, 300), n_columns=st.integers(1, 300), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_error_bound_and_idempotence(n_rows, n_columns, seed, dtype):
    w = spread((n_rows, n_columns), seed).to(dtype)
    q, scale_inv = quantize_block(w)
    assert scale_inv.shape == scale_shape(w.shape) == (math.ceil(n_rows / 128), math.ceil(n_columns / 128))
    s = scale_inv.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:n_rows, :n_columns]
    error = (w.double() - q.double() * s).abs()
    # Half a unit in the last place: relative for normal numbers, absolute below 2^-6 s; 1e-6 for the FP32 quotient.
    assert (error <= torch.maximum(w.double().abs() / 16, s / 1024) * (1 + 1e-6)).all()
    again, scale_again = quantize_block(dequantize(q, scale_inv))
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))
    torch.testing.assert_close(scale_again, scale_inv, rtol=2**-23, atol=0)


def test_bound_is_reached():
    """1 + 1/16 lies halfway between two E4M3 numbers: the relative bound is no looser than it must be."""
    w = torch.tensor([[448.0, 1 + 1 / 16]])
    q, scale_inv = quantize_block(w)
    assert scale_inv.item() == 1 and q[0, 1].item() == 1.0  # the tie goes to the even mantissa


@pytest.mark.parametrize("shape", [(576, 7168), (1, 1), (129, 128), (128, 129), (127, 257)])
def test_unaligned_shapes_equal_the_padded_matrix(shape):
    w = spread(shape, seed=1)
    q, scale_inv = quantize_block(w)
    padded = torch.zeros(-(-shape[0] // 128) * 128, -(-shape[1] // 128) * 128)
    padded[: shape[0], : shape[1]] = w
    q_padded, scale_padded = quantize_block(padded)
    assert q.shape == shape and q.is_contiguous() and torch.equal(scale_inv, scale_padded)
    assert torch.equal(q.float(), q_padded.float()[: shape[0], : shape[1]])
    for i, j in np.ndindex(*scale_inv.shape):
        tile = w[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        assert scale_inv[i, j] == tile.abs().max() / 448


def test_kv_a_proj_has_5_by_56_scales():
    assert scale_shape((576, 7168)) == (5, 56)


def test_leading_dimensions_are_independent_matrices():
    w = spread((3, 130, 70), seed=2)
    q, scale_inv = quantize_block(w)
    assert scale_inv.shape == (3, 2, 1)
    for e in range(3):
        one_q, one_scale = quantize_block(w[e])
        assert torch.equal(q[e].float(), one_q.float()) and torch.equal(scale_inv[e], one_scale)
    assert torch.equal(dequantize(q, scale_inv)[1], dequantize(q[1], scale_inv[1]))


def test_zero_block_has_scale_one_and_stays_zero():
    w = spread((256, 128), seed=3)
    w[:128] = 0
    q, scale_inv = quantize_block(w)
    assert scale_inv[0, 0] == 1 and scale_inv[1, 0] == w.abs().max() / 448
    assert torch.equal(dequantize(q, scale_inv)[:128], torch.zeros(128, 128))


@pytest.mark.parametrize("tiny", [1e-45, 1e-42, 1e-38, 3e-36])
def test_tiny_blocks_keep_a_normal_scale(tiny):
    w = torch.full((4, 4), tiny)
    q, scale_inv = quantize_block(w)
    assert scale_inv.item() >= torch.finfo(torch.float32).tiny
    error = (w.double() - q.double() * scale_inv.double()).abs()
    assert (error <= torch.maximum(w.double() / 16, scale_inv.double() / 1024)).all()


def test_largest_float32_neither_overflows_nor_becomes_nan():
    largest = torch.finfo(torch.float32).max
    q, scale_inv = quantize_block(torch.tensor([[largest, -largest]]))
    assert q.float().tolist() == [[448, -448]] and torch.isfinite(scale_inv).all()


def test_the_largest_weight_is_always_448():
    """amax / (amax / 448) rounds to above or below 448 for some amax; every one of these must land on 448."""
    w = torch.linspace(1, 2, 20001)[:, None]
    q, scale_inv = quantize_block(w, block=1)
    assert (w / scale_inv > 448).any() and (w / scale_inv < 448).any()
    assert (q.float() == 448).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_non_finite(bad):
    w = torch.ones(200, 200)
    w[150, 3] = bad
    with pytest.raises(ValueError, match="1 of 40000 values are NaN or infinite"):
        quantize_block(w)
    with pytest.raises(ValueError, match="1 of 2 values"):  # finite in float64 alone
        quantize_block(torch.tensor([[1e300, 1.0]], dtype=torch.float64))


def test_refuses_wrong_arguments():
    with pytest.raises(ValueError, match=r"w: got shape \(3,\)"):
        quantize_block(torch.ones(3))
    with pytest.raises(ValueError, match=r"w: got shape \(0, 4\)"):
        quantize_block(torch.ones(0, 4))
    with pytest.raises(TypeError, match="int64"):
        quantize_block(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="block: got 0"):
        quantize_block(torch.ones(3, 3), block=0)
    q, scale_inv = quantize_block(torch.ones(130, 3))
    with pytest.raises(ValueError, match=r"scale_inv: got shape \(1, 1\), expected \(2, 1\)"):
        dequantize(q, scale_inv[:1])
    with pytest.raises(TypeError, match="q: got dtype torch.float32"):
        dequantize(q.float(), scale_inv)


def test_dequantize_rounds_once_to_the_dtype():
    q, scale_inv = quantize_block(spread((130, 130), seed=4))
    s = scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :130]
    assert torch.equal(dequantize(q, scale_inv), q.float() * s)
    assert torch.equal(dequantize(q, scale_inv, dtype=torch.bfloat16), (q.float() * s).bfloat16())
