"""Combine against a sum in FP64, spread against a copy row by row."""

import pytest
import torch
from numbers_ import error, same_bits, tame

from minids.kernels import combine
from minids.kernels.slots import spread


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 8, 300), (20, 3, 1025)], ids=str)
def test_values(where, shape):
    backend, device = where
    n, k, d = shape
    y = tame(n * k, d, device, dtype=torch.bfloat16)
    slot = torch.randperm(n * k, generator=torch.Generator().manual_seed(0)).view(n, k).to(device)
    out = combine(y, slot, backend=backend)
    assert out.dtype == torch.bfloat16 and error(out, y.double()[slot].sum(1)) < 3e-3


def test_no_tokens(where):
    backend, device = where
    y, slot = torch.zeros(0, 8, dtype=torch.bfloat16, device=device), torch.zeros(0, 2, dtype=torch.int64, device=device)
    assert combine(y, slot, backend=backend).shape == (0, 8)


def test_bad_input():
    y, slot = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="slot: got dtype torch.int32, expected torch.int64"):
        combine(y, slot.int())
    with pytest.raises(ValueError, match=r"y, slot: got strides \(1, 4\)"):
        combine(y.view(8, 4).t(), slot)


def test_registered(kernel):
    y, slot = tame(6, 40, kernel, dtype=torch.bfloat16), torch.arange(6, device=kernel).view(3, 2)
    torch.library.opcheck(torch.ops.minids.combine.default, (y, slot), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("n, k, d", [(1, 1, 8), (5, 8, 24), (37, 3, 1032), (9, 2, 2048)])
def test_spread(where, n, k, d):
    """Every slot holds its token's bits, infinities and NaN too; combine of it is K times the token."""
    backend, device = where
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d + 8, generator=generator).to(torch.bfloat16)[:, :d]
    x[0, 0], x[-1, -1] = torch.inf, torch.nan
    slot = torch.randperm(n * k, generator=generator).view(n, k)
    out = spread(x.to(device), slot.to(device), backend=backend).cpu()
    for token in range(n):
        for row in slot[token]:
            assert same_bits(out[row], x[token])
    x = x.nan_to_num(1, 1, 1)
    there_and_back = combine(spread(x.to(device), slot.to(device), backend=backend), slot.to(device), backend=backend)
    assert torch.equal(there_and_back.cpu(), (k * x.float()).to(torch.bfloat16))


def test_spread_bad_input():
    x, slot = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64)
    for args, exception, message in [
        ((x.float(), slot), TypeError, "x: got dtype torch.float32"),
        ((x, slot.int()), TypeError, "slot: got dtype torch.int32"),
        ((x, slot[:3]), ValueError, r"slot: got shape \(3, 2\), expected \(4, 2\)"),
        ((x.t().contiguous().t(), slot), ValueError, "x, slot: got strides"),
    ]:
        with pytest.raises(exception, match=message):
            spread(*args)
