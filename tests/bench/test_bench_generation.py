"""The generation benchmark does the same work on both sides, and says so when it does not."""

import pytest

from minids.bench import generation
from minids.bench.common import Report
from minids.bench.peer import benchmark_config, benchmark_model, transformers_twin


def test_the_model_has_the_size_that_is_claimed():
    assert 19.6e6 < benchmark_config().count()["main"] < 19.8e6


@pytest.mark.slow
def test_both_sides_write_the_same_tokens(monkeypatch):
    """A short run of the benchmark's own comparison, on a smaller model with two rows."""
    monkeypatch.setattr(generation, "NEW_TOKENS", 12)
    model = benchmark_model(vocab_size=200, hidden_size=64, num_hidden_layers=2)
    ours, theirs = generation.contestants(model, transformers_twin(model), batch=2)
    generation.check_equal(ours(), theirs(), batch=2)


def test_different_tokens_are_never_timed(monkeypatch):
    monkeypatch.setattr(generation, "NEW_TOKENS", 2)
    generation.check_equal([[1, 2]], [[1, 2]], batch=1)
    with pytest.raises(RuntimeError, match=r"batch 2: .* differ in rows \[1\]"):
        generation.check_equal([[1, 2], [3, 4]], [[1, 2], [3, 5]], batch=2)
    with pytest.raises(RuntimeError, match=r"rows \[0\]"):
        generation.check_equal([[1]], [[1]], batch=1)  # equal, but cut short


def test_a_missed_target_is_noted():
    model, report = benchmark_model(vocab_size=64, hidden_size=32, num_hidden_layers=2), Report("", [], [])
    times = {"minids": [1.0, 1.0, 1.0], "transformers": [1.5, 4.0, 1.5], "matmul": [1e-11] * 3}
    generation.add_row(report, model, 1, times, target=1.4)
    assert report.missed == [] and report.data["batch_1"]["ratio"] == 1.5
    generation.add_row(report, model, 1, times, target=2.0)
    assert report.missed == ["batch 1: 1.50 times transformers, wanted 2.0"]


def test_step_bytes_counts_experts_that_are_hit():
    """All weights but the embedding at a large batch; at batch 1 the K of E experts that one token chooses."""
    model = benchmark_model(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    all_weights = sum(p.numel() for p in model.parameters()) - 64 * 32
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert generation.step_bytes(model, 10_000) == pytest.approx(4 * all_weights)
    assert generation.step_bytes(model, 1) == pytest.approx(4 * (all_weights - experts * 28 / 32))
