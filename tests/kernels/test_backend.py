"""Which implementation runs: the argument, then the environment, then the device."""

import subprocess
import sys

import pytest
import torch

from minids.kernels import backend, quantize_tile

X = torch.zeros(2, 4)


def test_order_of_choice(monkeypatch):
    monkeypatch.delenv("MINIDS_KERNELS", raising=False)
    assert backend.choose(None, X) == "torch"
    monkeypatch.setattr(backend, "_obstacle", lambda device: None)
    assert backend.choose(None, X) == "torch"  # the interpreter is never the default
    monkeypatch.setenv("MINIDS_KERNELS", "triton")
    assert backend.choose(None, X) == "triton"
    assert backend.choose("torch", X) == "torch"


def test_a_kernel_asked_for_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for name, argument in (("backend", "triton"), ("MINIDS_KERNELS", None)):
        monkeypatch.setenv("MINIDS_KERNELS", "triton")
        with pytest.raises(ValueError, match=f"{name}=triton: got tensors on cpu, expected a CUDA device"):
            backend.choose(argument, X)
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(ValueError, match="backend=triton: Triton is not installed"):
        backend.choose("triton", X)


def test_bad_names_and_devices(monkeypatch):
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of torch, triton"):
        quantize_tile(X, backend="cuda")
    monkeypatch.setenv("MINIDS_KERNELS", "fast")
    with pytest.raises(ValueError, match="MINIDS_KERNELS: got 'fast', expected one of torch, triton"):
        quantize_tile(X)
    monkeypatch.delenv("MINIDS_KERNELS")
    with pytest.raises(ValueError, match="got tensors on cpu and meta, expected one device"):
        backend.choose(None, X, X.to("meta"))


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from minids.kernels import fp8_gemm, grouped_gemm, quantize_block, quantize_tile
a, b = quantize_tile(torch.ones(2, 128)), quantize_block(torch.ones(3, 128))
torch.testing.assert_close(fp8_gemm(*a, *b, out_dtype=torch.float32), torch.full((2, 3), 128.0))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
