"""The FP8 benchmark: its GPU half at toy size, here with simulated products."""

import math

import pytest
import torch

from minids import ModelConfig
from minids.bench import fp8

SIZES = dict(hidden_size=128, num_hidden_layers=2, vocab_size=300, n_routed_experts=8, num_experts_per_tok=2)


def test_steps_are_the_trainers_and_rate_zero_moves_no_weight():
    rows = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    step = fp8.trainers_step(ModelConfig.preset("toy", **SIZES), "cpu", 2, "v3", {})
    first = step(rows)
    assert step(rows) == pytest.approx(first, rel=1e-6) and abs(first - math.log(300)) < 0.2


def test_report_has_a_row_a_candidate_and_checks_that_losses_agree(monkeypatch):
    cfg = ModelConfig.preset("toy", **SIZES)
    report = fp8.on_device(1, cfg, "cpu", 2, 16)
    assert [row[0] for row in report.rows] == ["BF16", "v3", "v3, nothing recomputed"]
    assert all(row[2] > 0 for row in report.rows) and report.rows[0][3] == 1
    assert report.data["losses"]["v3"] == report.data["losses"]["v3, nothing recomputed"] != report.data["losses"]["BF16"]
    real = fp8.trainers_step
    monkeypatch.setattr(fp8, "trainers_step", lambda *args: lambda rows: real(*args)(rows) * (1 if args[3] is None else 2))
    with pytest.raises(RuntimeError, match="not the same step, nothing timed"):
        fp8.on_device(1, cfg, "cpu", 2, 16)
