"""The two ladders of notebook 06: every rung against the references, in the interpreter and on a GPU."""

import pytest
import torch
from numbers_ import error, hard, same_bits, tame

from minids.bench.ladder_kernels import PRODUCT, QUANTIZE, product, quantize
from minids.fp8 import accumulate
from minids.kernels import gemm_fp8, quantize_block, quantize_tile
from minids.kernels.quantize import reference

EXACT = {"a true division", "reciprocal, corrected"}


@pytest.mark.parametrize("rung", QUANTIZE, ids=lambda r: r.name)
def test_rungs_of_quantisation_give_the_references_bits(kernel, rung):
    x = hard(37, 384, torch.bfloat16, kernel)
    x = x[3:].contiguous().clamp(-1e30, 1e30)  # without the tiles that the rungs say they do not take
    x = torch.where(x.abs() < 1e-30, 0.0, x)
    q, s = quantize(rung, x)
    expected_q, expected_s = reference(x)
    codes = (q.view(torch.uint8).int() - expected_q.view(torch.uint8).int()).abs()
    assert codes.max() <= 1 and (codes > 0).double().mean() < 0.01  # a fast division: the neighbour, seldom
    assert torch.allclose(s, expected_s, rtol=1e-6, atol=0)
    if rung.name in EXACT or (kernel == "cpu" and rung.name != "times the reciprocal"):
        assert same_bits(q, expected_q) and same_bits(s, expected_s)


@pytest.mark.parametrize("rung", PRODUCT, ids=lambda r: r.name)
def test_rungs_of_the_product_give_the_reference(kernel, rung):
    m, n, k = (8, 140, 256) if rung.name == "one number a program" else (192, 384, 512)
    a, a_scale = quantize_tile(tame(m, k, kernel), column_major=True)
    b, b_scale = quantize_block(tame(n, k, kernel, seed=1))
    expected, bound = gemm_fp8.reference(a, a_scale, b, b_scale), 1e-6
    if kernel == "cuda" and "widened" in rung.name:
        bound = 2e-3  # the tensor core reads FP32 with 10 bits
    elif kernel == "cuda" and rung.kernel is not PRODUCT[0].kernel:
        expected, bound = as_hopper_adds(a, a_scale, b, b_scale), 1e-5
    assert error(product(rung, a, a_scale, b, b_scale, torch.float32), expected) < bound


def as_hopper_adds(a, a_scale, b, b_scale):
    """The product with the tensor core's own sums: 14 bits, everything aligned to the largest number at hand."""
    a, a_scale, b, b_scale = (x.cpu().float() for x in (a, a_scale, b, b_scale))
    columns = b_scale.t().repeat_interleave(128, 1)[:, : len(b)]
    summed = accumulate.matmul(
        a, b.t(), bits=14, promote_every=128, a_scale=a_scale, b_scale=columns, shared_alignment=True)  # fmt: skip
    return summed.to("cuda" if torch.cuda.is_available() else "cpu")


def test_what_hopper_adds_was_measured():
    """On an H200 the rungs were 3.26486e-4 from the exact sums, for these inputs; the simulation says the same."""
    a, a_scale = quantize_tile(tame(192, 512, "cpu"), column_major=True)
    b, b_scale = quantize_block(tame(384, 512, "cpu", seed=1))
    found = error(as_hopper_adds(a, a_scale, b, b_scale).cpu(), gemm_fp8.reference(a, a_scale, b, b_scale))
    assert abs(found / 3.2648621906e-4 - 1) < 1e-6


def test_what_a_rung_cannot_take_is_refused():
    x = torch.randn(4, 200, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x: got shape \(4, 200\)"):
        quantize(QUANTIZE[0], x)
    a = torch.zeros(96, 256, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="multiples of 64, 128 and 128"):
        product(PRODUCT[-1], a, torch.ones(2, 96).t(), a, torch.ones(1, 2))


def test_without_a_gpu_the_benchmark_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from minids.bench.__main__ import main

    assert main(["kernel_ladder"]) == 0
    assert "no CUDA device" in capsys.readouterr().out
