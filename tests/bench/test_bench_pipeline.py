"""The table of executed pipelines, from figures made up; that the figures are made is shown in tests/pipeline."""

import torch

from minids.bench.pipeline import RANKS, SIZES, bench_model, report_of
from minids.config import ModelConfig


def entry(gradient: float, measured: float, predicted: float) -> dict:
    times = {"measured_s": measured, "predicted_s": predicted, "ratio": measured / predicted}
    return {"equal": {"gradient": gradient}, **times}


def test_a_schedule_that_is_not_one_process_misses_its_target():
    schedules = {"1f1b": entry(1e-7, 2.0, 1.0), "dualpipe": entry(2e-5, 1.5, 0.75)}
    found = {"backend": "gloo", "tokens_a_micro_batch": 64, "schedules": schedules}
    report = report_of(found, "cpu")
    assert [row[-3:] for row in report.rows] == [[2.0, 1.0, 1.0], [2.0, 0.75, 0.75]]
    assert len(report.missed) == 1 and report.missed[0].startswith("dualpipe: gradients differ by 2.0e-05")


def test_the_timed_model_divides_into_the_stages_of_every_schedule():
    for kind in SIZES:
        cfg, rows, length, precision = bench_model(torch.device(kind))
        assert isinstance(cfg, ModelConfig) and (rows, length, precision) == SIZES[kind][1:]
        assert cfg.num_hidden_layers % (2 * RANKS) == 0
