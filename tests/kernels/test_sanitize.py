"""The calls that memory checkers are given reach every kernel, and run."""

import pytest
import sanitize

from minids import kernels


def test_every_public_kernel_has_a_call():
    assert set(sanitize.calls("cpu")) == set(kernels.FILE_OF)


@pytest.mark.parametrize("name", list(kernels.FILE_OF))
def test_call(kernel, name):
    sanitize.calls(kernel)[name]()
