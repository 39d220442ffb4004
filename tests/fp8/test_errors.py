"""Error statistics on cases whose answers are known."""

import math

import pytest
import torch

from minids.fp8.errors import GRANULARITIES, error_stats, error_table


def test_by_hand():
    """Per tensor, scale 1: 448 and 2^-6, the smallest normal number, stay, 1.0625 becomes 1, 2^-8 stays subnormal, 2^-11
    becomes 0, 0 counts nowhere."""
    stats = error_stats(torch.tensor([[448.0, 1.0625, 2.0**-6, 2.0**-8, 2.0**-11, 0.0]]), granularity="tensor")
    lost = math.hypot(0.0625, 2.0**-11) / math.sqrt(448**2 + 1.0625**2 + 2.0**-12 + 2.0**-16 + 2.0**-22)
    assert stats.relative_error == pytest.approx(lost, rel=1e-9)
    assert stats.sqnr_db == pytest.approx(-20 * math.log10(lost), rel=1e-9)
    assert stats.median == 0 and stats.underflow == 1 / 5 and stats.subnormal == 2 / 5 and stats.saturation == 0
    assert stats.bits == 8 + 32 / 6


def test_saturation_is_mxs_alone():
    x = torch.full((1, 32), 1.0)
    x[0, :4] = 500 / 256
    stats = error_stats(x, "e4m3", "mx")
    assert stats.saturation == 4 / 32 and stats.scale == "e8m0" and stats.bits == 8.25
    assert stats.relative_error == pytest.approx(math.sqrt(4 * (52 / 256) ** 2 / (28 + 4 * (500 / 256) ** 2)))
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    assert all(error_stats(x, granularity=g, scale=s).saturation == 0
               for g in ("tile", "block", "row", "tensor") for s in ("fp32", "ue8m0"))  # fmt: skip


def test_uniform_mantissas_lose_what_theory_says():
    """Log-uniform numbers: spacing u over a binade, error uniform in u / 2: RMS u / sqrt(12)."""
    torch.manual_seed(0)
    x = torch.exp2(torch.rand(256, 1024) * 8)  # all well inside the normal range
    for fmt, mantissa in (("e4m3", 3), ("e5m2", 2), ("e5m6", 6)):
        spacing = torch.exp2(x.log2().floor() - mantissa)
        expected = ((spacing**2 / 12).sum() / (x**2).sum()).sqrt().item()
        assert error_stats(x, fmt, "row", "ue8m0").relative_error == pytest.approx(expected, rel=0.03)


def test_one_outlier_costs_its_group():
    torch.manual_seed(0)
    x = torch.randn(256, 512)
    x[3, 5] = 3e5
    found = {g: error_stats(x, granularity=g) for g in GRANULARITIES}
    assert found["tensor"].underflow > 0.2 and found["block"].underflow < found["tensor"].underflow / 5
    assert found["row"].underflow < found["block"].underflow and found["tile"].underflow < found["row"].underflow
    assert found["tile"].underflow * x.numel() < 128


def test_table_and_refusals():
    x = torch.randn(4, 64)
    rows = error_table(x, [("e4m3", "tile", "fp32"), ("e2m1", "mx", "fp32")])
    assert [(r.fmt, r.granularity, r.scale) for r in rows] == [("e4m3", "tile", "fp32"), ("e2m1", "mx", "e8m0")]
    assert error_stats(torch.ones(1, 4), scale="ue8m0").sqnr_db == math.inf
    with pytest.raises(ValueError, match="granularity: got 'column', expected one of tile, block"):
        error_stats(x, granularity="column")
    for bad in (torch.zeros(2, 2), torch.ones(3)):
        with pytest.raises(ValueError, match="expected \\(T, K\\) with a number other than 0"):
            error_stats(bad)
    with pytest.raises(ValueError, match="fmt: got 'e2m1'"):
        error_stats(x, "e2m1")
