"""Indices out of range are told; where only shapes are worked out, nothing is looked at."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minids.model.check import check_indices


@pytest.mark.parametrize("values", [[], [0, 4], [-100, 3], [-100]])
def test_indices_inside_pass(values):
    check_indices("labels", torch.tensor(values, dtype=torch.int64), 5, -100)


@pytest.mark.parametrize("values, told", [
    ([0, 5], "labels from 0 to 5: allowed are 0 to 4, and -100"),
    ([-100, -1, 2], "labels from -1 to 2"),
    ([[-101], [1]], "labels from -101 to 1"),
])  # fmt: skip
def test_indices_outside_are_told(values, told):
    with pytest.raises(ValueError, match=told):
        check_indices("labels", torch.tensor(values), 5, -100)
    with pytest.raises(ValueError, match="allowed are 0 to 4$"):
        check_indices("tokens", torch.tensor([[-100]]), 5)


def test_where_only_shapes_are_worked_out_nothing_is_read():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        check_indices("tokens", mode.from_tensor(torch.tensor([9])), 5)
        check_indices("tokens", torch.full((2,), 9), 5)
    check_indices("tokens", torch.full((2,), 9, device="meta"), 5)
