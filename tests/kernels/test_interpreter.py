"""Runs the kernels' tests under Triton's CPU interpreter, and checks the corrected conversions against torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import interpreter
import numpy as np
import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(interpreter.ENABLED, reason="this is that run")
def test_every_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-q", str(HERE)]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "-k", "interpreted"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 50 and "skipped" not in run.stdout, run.stdout[-500:]


@pytest.mark.parametrize("name", ["fp8e4nv", "fp8e5", "bf16", "fp16"])
def test_conversions_of_every_value_both_ways(name):
    target = interpreter.TORCH[name]
    codes = np.arange(2 ** (8 * target.itemsize), dtype=interpreter.BITS[target.itemsize])
    wide = interpreter.convert(codes, target, torch.float32).view(np.float32)
    exact = torch.from_numpy(codes.copy()).view(target).float().numpy()
    assert np.array_equal(wide, exact, equal_nan=True)
    # Each value, and what lies just below, at and just above the middle between neighbours.
    values = np.unique(wide[np.isfinite(wide)])
    middles = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    probes = np.concatenate([values, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])
    back = interpreter.convert(probes.view(np.uint32), torch.float32, target)
    made = torch.from_numpy(back.copy()).view(target).float().numpy()
    nearest = values[np.abs(values[None, :].astype(np.float64) - probes[:64, None]).argmin(1)]
    assert np.array_equal(made[: len(values)], values) and np.array_equal(made[:64], nearest)
    assert np.array_equal(made, torch.from_numpy(probes).to(target).float().numpy())


def test_float8_saturates():
    probes = np.array([449, 464, 1e9, np.inf, -1e9, np.nan], dtype=np.float32)
    made = torch.from_numpy(interpreter.convert(probes.view(np.uint32), torch.float32, torch.float8_e4m3fn))
    made = made.view(torch.float8_e4m3fn).float()
    assert made[:5].tolist() == [448, 448, 448, 448, -448] and made[5].isnan()


@pytest.mark.skipif(not interpreter.ENABLED, reason="needs TRITON_INTERPRET=1")
def test_interpreted_fused_multiply_add_rounds_once():
    import triton
    import triton.language as tl

    @triton.jit
    def fma(x_ptr, y_ptr):
        x = tl.load(x_ptr + tl.arange(0, 4))
        tl.store(y_ptr + tl.arange(0, 4), tl.fma(x, x, -1.0 + x * 0.0))

    x = torch.full((4,), 1 + 2.0**-12)
    y = torch.empty(4)
    fma[(1,)](x, y)
    assert y.tolist() == [2.0**-11 + 2.0**-24] * 4
