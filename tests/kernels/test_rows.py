"""Rows for the wire in FP8, against the plain description of them in minids/fp8/dispatch.py."""

import pytest
import torch
from numbers_ import hard, same_bits, tame

from minids.fp8 import dispatch as plain
from minids.fp8 import rows as wire
from minids.fp8.quantize import dequantize

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def of_backend(where, monkeypatch):
    monkeypatch.setattr(wire, "on_device", lambda x: where[0] == "triton")


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [128, 200, 1152, 7168])
def test_rows_are_those_described(where, d, dtype):
    x = hard(5, d, BF16 if dtype == BF16 else torch.float32, where[1]).to(dtype)
    source = torch.tensor([4, 0, 0, 2, 3, 4, 1], device=where[1])
    rows, packed = wire.pack(x, source), plain.pack(x.float()[source])
    assert rows.shape[1] == wire.row_bytes(d) and rows.shape[1] % wire.ALIGN == 0
    assert torch.equal(rows[:, : packed.shape[1]], packed) and not rows[:, packed.shape[1] :].any()
    assert torch.equal(wire.pack(x), wire.pack(x, torch.arange(5, device=where[1])))
    for out in (BF16, torch.float32):
        want = dequantize(*plain.unpack(packed, d), (1, 128), out)
        found = wire.unpack(rows, d, out)
        assert same_bits(found, want)


def test_what_arrives_is_the_same_after_a_second_wire(where):
    """Its bytes need not be: a tile whose largest number was rounded down to 224 scales has the scale below there."""
    once = wire.unpack(wire.pack(tame(9, 600, where[1], dtype=BF16)), 600, BF16)
    assert same_bits(wire.unpack(wire.pack(once), 600, BF16), once)


def test_what_is_not_finite_becomes_nan(where):
    x = tame(3, 384, where[1])
    x[0, 130], x[2, 383] = torch.inf, torch.nan
    found = wire.unpack(wire.pack(x), 384, torch.float32)
    spoilt = found.isnan()
    assert spoilt[0, 128:256].all() and spoilt[2, 256:].all() and spoilt.sum() == 256


def test_no_rows(where):
    x, none = tame(3, 128, where[1]), torch.zeros(0, dtype=torch.int64, device=where[1])
    assert wire.pack(x, none).shape == (0, 144) and wire.pack(x[:0]).shape == (0, 144)
    assert wire.unpack(wire.pack(x, none), 128, BF16).shape == (0, 128)
