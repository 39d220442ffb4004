"""The ladder benchmark without a GPU: its counting, its table, and that every rung was recorded."""

import json
from pathlib import Path

import pytest
import torch

from minids.bench import kernel_ladder
from minids.bench.gpu_cases import Case
from minids.bench.ladder_kernels import PRODUCT, QUANTIZE

RECORDED = Path(__file__).parents[2] / "figures" / "bench" / "kernel_ladder.json"


def test_wrong_numbers_and_scales_are_counted_together():
    q, s = torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.ones(2, 1)
    assert kernel_ladder.different((q, s), (q, s)) == 0
    minus_zero = q.clone()
    minus_zero.view(torch.uint8)[0, 0] = 0x80  # equal to 0, and other bits
    assert kernel_ladder.different((minus_zero, s * 1.0000001), (q, s)) == 3 / 10


def test_a_wrong_rung_is_not_timed(monkeypatch):
    monkeypatch.setattr(kernel_ladder, "measure", lambda *_: pytest.fail("timed"))
    case = Case("product", "1", "TFLOP/s", 1.0, 1.0, {"minids": lambda: None}, 0.0)
    for error in (0.5, float("nan")):
        with pytest.raises(ArithmeticError, match="product, minids: error"):
            kernel_ladder.ladder(case, {"minids": lambda error=error: error}, 1)


def test_the_table_says_which_share_of_the_floor(monkeypatch):
    row = {"operation": "product", "shape": "1", "unit": "TB/s", "seconds": {"minids": 2.0, "copy": 1.0},
           "rate": {"minids": 5.0, "copy": 10.0}, "refused": {}}  # fmt: skip
    monkeypatch.setattr(kernel_ladder, "measure", lambda *_: row)
    entry = kernel_ladder.ladder(Case("product", "1", "TB/s", 1.0, 0.8, {}, 0.0), {"minids": lambda: 0.01}, 1)
    assert kernel_ladder.table_rows(entry) == [
        ["product, 1", "minids", 5.0, "TB/s", 0.4, "1.0e-02"], ["product, 1", "copy", 10.0, "TB/s", 0.8, "-"],
    ]  # fmt: skip


def test_every_rung_was_recorded_on_a_gpu():
    recorded = json.loads(RECORDED.read_text())
    assert "H200" in recorded["machine"]["gpu"]
    quantise, small, large = recorded["data"]["ladders"]
    for rungs, entry in ((QUANTIZE, quantise), (PRODUCT, small), (PRODUCT, large)):
        names = [r.name for r in rungs if entry is not large or r.name not in kernel_ladder.SLOW]
        assert list(entry["rate"])[: len(names)] == names and set(names) <= set(entry["error"])
    assert quantise["error"]["reciprocal, corrected"] == 0 < quantise["error"]["times the reciprocal"]
