"""Dispatch and combine over a simulated all-to-all, four ranks in one process, uneven and empty parts; then a real one."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minids import ModelConfig
from minids.fp8 import fake_quantize, quantize_tile
from minids.fp8.dispatch import combine, dispatch, pack, row_bytes, unpack

TILE = (1, 128)


class AllToAll:
    """counts[i][j] rows go from rank i to rank j. All ranks' rows lie in one tensor, sorted by rank, then by the other
    end, as all_to_all_single wants them and leaves them. Remembers what crossed the wire."""

    def __init__(self, counts):
        self.counts, self.bytes, self.dtypes = torch.tensor(counts), [], set()

    def there(self, rows):
        return self._move(rows, self.counts)

    def back(self, rows):
        return self._move(rows, self.counts.t())

    def _move(self, rows, counts):
        self.bytes.append(rows.numel() * rows.element_size())
        self.dtypes.add(rows.dtype)
        parts = rows.split(counts.flatten().tolist())
        n = len(counts)
        return torch.cat([parts[i * n + j] for j in range(n) for i in range(n)])


COUNTS = [[0, 3, 1, 2], [5, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def tokens(hidden, seed=0, binades=6.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(map(sum, COUNTS)), hidden)
    return torch.randn(shape, generator=generator) * torch.exp2(binades * torch.randn(shape, generator=generator))


@pytest.mark.parametrize("hidden", [128, 384, 300, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_ranks(hidden, dtype):
    wire, x = AllToAll(COUNTS), tokens(hidden).to(dtype).requires_grad_()
    received = dispatch(x, wire.there, wire.back)
    rounded = fake_quantize(x.detach(), TILE, scale="ue8m0")
    assert received.dtype == dtype and torch.equal(received.detach().float(), wire.there(rounded))
    home = combine(3 * received, wire.there, wire.back)
    assert torch.equal(home.detach().float(), (3 * rounded.to(dtype)).bfloat16().float())
    grad = tokens(hidden, seed=1).to(dtype)
    home.backward(grad)
    expected = (3 * fake_quantize(grad, TILE, scale="ue8m0").to(dtype)).bfloat16().to(dtype)
    assert torch.equal(x.grad, expected)


def test_three_processes(tmp_path):
    """The same over gloo's all-to-all, between processes: equal to the simulated one, bit for bit."""
    counts = [[0, 3, 2], [4, 0, 0], [1, 1, 0]]
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 11, 300, generator=generator)
    save_file({"x": x, "grad": grad, "counts": torch.tensor(counts)}, tmp_path / "given.safetensors")
    job = [sys.executable, str(Path(__file__).with_name("dispatch_job.py")), str(tmp_path)]
    subprocess.run(job, check=True, timeout=120)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(3)]
    wire, leaf = AllToAll(counts), x.clone().requires_grad_()
    arrived = dispatch(leaf, wire.there, wire.back)
    home = combine(3 * arrived, wire.there, wire.back)
    home.backward(grad)
    for name, expected in (("arrived", arrived.detach()), ("home", home.detach()), ("gradient", leaf.grad)):
        assert torch.equal(torch.cat([rank[name] for rank in ranks]), expected), name


def test_what_crosses_the_wire():
    wire, x = AllToAll(COUNTS), tokens(384).requires_grad_()
    combine(dispatch(x, wire.there, wire.back), wire.there, wire.back).sum().backward()
    n, fp8, bf16 = len(x), 384 + 3, 2 * 384
    assert wire.bytes == [n * fp8, n * bf16, n * fp8, n * bf16]  # dispatch, combine, gradient there, gradient back
    assert wire.dtypes == {torch.uint8}


def test_v3_row():
    hidden = ModelConfig.preset("v3").hidden_size
    assert row_bytes(hidden) == 7168 + 56 and row_bytes(hidden) / (2 * hidden) < 0.504


@given(hidden=st.integers(1, 300), rows=st.integers(0, 4), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_pack_is_quantize_tile(hidden, rows, seed):
    x = tokens(hidden, seed)[:rows]
    packed = pack(x)
    assert packed.shape == (rows, row_bytes(hidden)) and packed.dtype == torch.uint8
    q, scale_inv = unpack(packed, hidden)
    assert q.shape == (rows, hidden) and q.dtype == torch.float8_e4m3fn
    assert scale_inv.shape == (rows, math.ceil(hidden / 128)) and scale_inv.dtype == torch.float32
    if rows:
        expected = quantize_tile(x, scale="ue8m0")
        assert torch.equal(q.float(), expected[0].float()) and torch.equal(scale_inv, expected[1])


def test_nothing_is_lost_twice():
    """What arrives is a BF16 number, and an FP8 linear that quantises it into power-of-two tiles gets it unchanged."""
    received = dispatch(tokens(384), lambda rows: rows, lambda rows: rows)
    assert torch.equal(received.bfloat16().float(), received)
    assert torch.equal(fake_quantize(received, TILE, scale="ue8m0"), received)
    # With FP32 scales neither would hold, which is why V3 wants powers of two here.
    free = fake_quantize(tokens(384), TILE)
    assert not torch.equal(free.bfloat16().float(), free)


def test_nobody_sends_anything():
    x = torch.empty(0, 256, requires_grad=True)
    y = combine(dispatch(x, lambda r: r, lambda r: r), lambda r: r, lambda r: r)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 256)


def test_refuses():
    with pytest.raises(ValueError, match=r"x: got shape \(4,\), expected \(T, D\)"):
        pack(torch.ones(4))
    with pytest.raises(ValueError, match="1 of 8 values are NaN"):
        dispatch(torch.tensor([[1.0, math.nan, 1, 1]] + [[1.0] * 4]), lambda r: r, lambda r: r)
    rows = pack(torch.ones(2, 256))
    with pytest.raises(ValueError, match=r"rows: got shape \(2, 258\), expected \(R, 129\) for hidden = 128"):
        unpack(rows, 128)
    with pytest.raises(TypeError, match="rows: got dtype torch.float32"):
        unpack(rows.float(), 256)
