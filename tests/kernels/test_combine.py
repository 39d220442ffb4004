"""Combine against a sum in FP64."""

import pytest
import torch
from numbers_ import error, tame

from minids.kernels import combine


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
