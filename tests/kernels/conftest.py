"""Where a kernel test runs: `where` is (backend, device).

- the reference on the CPU, always;
- the Triton kernel in the CPU interpreter, if TRITON_INTERPRET=1 was set before the start (`test_interpreter.py` starts
  such a run);
- the Triton kernel on the GPU, marked gpu.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import interpreter

assert interpreter.ENABLED == (os.environ.get("TRITON_INTERPRET") == "1")
HAS_GPU = torch.cuda.is_available() and not interpreter.ENABLED
WHERE = [
    pytest.param(("torch", "cpu"), id="reference"),
    pytest.param(
        ("triton", "cpu"), id="interpreted",
        marks=pytest.mark.skipif(not interpreter.ENABLED, reason="needs TRITON_INTERPRET=1; test_interpreter.py runs it"),
    ),
    pytest.param(("triton", "cuda"), id="gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")]),
]  # fmt: skip
KERNELS = WHERE[1:]


@pytest.fixture(params=WHERE)
def where(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request) -> str:
    """The device of a run of the Triton kernels."""
    return request.param[1]
