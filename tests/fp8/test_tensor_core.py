"""The quick accumulator against a scalar loop, against the exact one, and in a layer."""

import math

import pytest
import torch

from minids.fp8 import Fp8Linear, Fp8Recipe
from minids.fp8.accumulate import matmul
from minids.fp8.tensor_core import collect, promoted


def cut(x, bits):
    """x with its leading bits only, towards zero."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.trunc(mantissa * 2**bits), exponent - bits)


@pytest.mark.parametrize("bits", [8, 14, 20])
def test_collect_is_a_scalar_loop(bits):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, shape, generator=generator).float() for shape in ((3, 130), (130, 4)))
    found = collect(a, b, bits)
    for i in range(3):
        for j in range(4):
            acc = 0.0
            for k in range(0, 130, 32):
                acc = cut(acc + sum(float(a[i, m] * b[m, j]) for m in range(k, min(k + 32, 130))), bits)
            assert float(found[i, j]) == acc


def test_it_errs_as_the_bit_exact_accumulator_does():
    """Non-negative numbers, K = 4096: both lose on the same side; the exact one cuts the products of a step as well. With
    the sum in the alignment, as on the chip, it loses more than ten times as much: what `collect` leaves out."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(shape, generator=generator).to(torch.float8_e4m3fn).float() for shape in ((8, 4096), (4096, 8)))
    exact = a.double() @ b.double()
    full = matmul(a, b, promote_every=None, shared_alignment=False)
    quick, full = (1 - x.double() / exact for x in (collect(a, b, 14), full))
    assert (quick > 0).all() and (full >= quick - 1e-6).all()
    assert float(quick.mean()) == pytest.approx(float(full.mean()), rel=0.35) and 0.001 < float(quick.mean()) < 0.02
    chip = 1 - matmul(a, b, promote_every=None).double() / exact
    assert float(chip.mean()) > 10 * float(quick.mean())
    ones = torch.ones(8, 32), torch.ones(32, 8)
    repaired = 1 - promoted(a, ones[0], b, ones[1], 14, 128).double() / exact
    assert float(repaired.abs().max()) < 0.15 * float(quick.mean())


def layer(recipe, seed=0, m=96, k=320, n=256):
    generator = torch.Generator().manual_seed(seed)
    found = Fp8Linear(k, n, recipe)
    with torch.no_grad():
        found.weight.copy_(torch.rand(n, k, generator=generator))
    x = torch.rand(m, k, generator=generator).requires_grad_()
    y = found(x)
    y.backward(torch.rand(m, n, generator=generator))
    return y.detach(), x.grad, found.weight.grad


@pytest.mark.parametrize("changes", [{}, {"scaling": "tensor", "promote_every": None}, {"scaling": "tensor"}])
def test_all_three_products_use_it_and_scales_are_applied_where_they_belong(changes):
    """All numbers positive: the accumulator's loss is one-sided, at most 2^-13 a step of 32, and never none."""
    exact = layer(Fp8Recipe.named("v3", **{"promote_every": 128, **changes}))
    for bits in (14, 24):
        found = layer(Fp8Recipe.named("v3", **{"bits": bits, **changes}))
        for ours, theirs, summed in zip(found, exact, (320, 256, 96), strict=True):
            lost = 1 - ours.double() / theirs.double()
            steps = 4 if changes.get("promote_every", 128) else math.ceil(summed / 32)
            assert float(lost.max()) < steps * 2.0 ** -(bits - 1) + 400 * 2.0**-23
            if bits == 14:
                assert float(lost.mean()) > 1e-5
