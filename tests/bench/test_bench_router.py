"""The router benchmark times two routers that do the same, and finds out when they do not."""

import pytest
import torch

from minids.bench import router


def test_both_sides_route_alike_and_a_difference_is_found(monkeypatch):
    monkeypatch.setattr(router, "TOKENS", 64)
    gate, twin, x = router.contestants(hidden=32)
    router.check_equal(gate, twin, x)
    gate.e_score_correction_bias[3] += 0.5  # another choice
    with pytest.raises(RuntimeError, match="differ"):
        router.check_equal(gate, twin, x)


def test_without_the_product_both_read_the_given_logits():
    gate, twin, x = router.contestants(hidden=32)
    logits = torch.full((4, 256), -3.0)
    logits[:, :8] = 3.0  # group 0 holds the eight best; bias is far smaller
    found = []
    router.given_logits(lambda: found.extend([gate(x[:4]).indices, twin(x[:4])[2]]), logits)()
    assert all(indices.sort().values.tolist() == [list(range(8))] * 4 for indices in found)


def test_the_report_has_a_row_for_each_case(monkeypatch):
    monkeypatch.setattr(router, "TOKENS", 64)
    report = router.run(rounds=1)
    assert [row[0] for row in report.rows] == ["forward", "routing alone", "routing alone, forward + backward"]
    assert all(row[1] > 0 and row[2] > 0 and row[3] > 0 for row in report.rows)
