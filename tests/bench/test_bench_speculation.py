"""The speculation benchmark: equal work on both sides, its arithmetic, and a refusal when texts differ."""

import pytest
import torch

from minids import ModelConfig, Transformer
from minids.bench import speculation
from minids.bench.common import Report
from minids.infer import SpeculationStats


class Bytes:
    bos_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + byte % 40 for byte in text.encode()]


def untrained():
    torch.manual_seed(0)
    return Transformer(ModelConfig.preset("toy", vocab_size=50, num_hidden_layers=1, initializer_range=0.2)), Bytes()


def test_it_measures_both_ways_of_writing_the_same(monkeypatch):
    monkeypatch.setattr(speculation, "NEW_TOKENS", 6)
    report = speculation.run(1, untrained)
    assert [row[0] for row in report.rows] == list(speculation.MODES)
    for row, data in zip(report.rows, report.data.values(), strict=True):
        assert len(row) == len(report.columns) and data["seconds"]["plain"][0] > 0
        assert 0 <= data["acceptance"][0] <= 1 and data["tokens_per_step"] >= 1


def test_the_row_by_hand():
    """1,024 tokens in 2 s for 4 s; of two steps one kept its draft: 1.5 tokens, at 0.75 of a plain step."""
    report, stats = Report("", [], []), SpeculationStats()
    stats.count(1, 1)
    stats.count(1, 0)
    speculation.add_row(report, "greedy", {"plain": [4.0], "speculative": [2.0]}, stats)
    assert report.rows == [["greedy", 512.0, 256.0, 2.0, 1.0, "50.0%", 1.5, 0.75]] and not report.missed
    speculation.add_row(report, "slow", {"plain": [1.0], "speculative": [2.0]}, stats)
    assert report.missed == ["slow: 0.50 times plain decoding, wanted more than 1"]


def test_different_texts_are_not_timed():
    same = [[1] * speculation.NEW_TOKENS]
    speculation.check_equal(same, same)
    with pytest.raises(RuntimeError, match=r"differ in rows \[0\]; nothing was timed"):
        speculation.check_equal(same, [[2] * speculation.NEW_TOKENS])
