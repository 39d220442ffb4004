"""The schedule benchmark times what it says, and reports a missed limit."""

from minids.bench import schedules
from minids.pipeline import build_schedule


def test_torch_builds_as_many_actions_as_we_do():
    ours = build_schedule("dualpipe_v", ranks=4, micro_batches=16).actions
    assert [len(row) for row in schedules.torch_order(4, 16)] == [len(row) for row in ours]


def test_rows_limits_and_a_miss(monkeypatch):
    monkeypatch.setattr(schedules, "DRAW_LIMIT", 1e-6)
    report = schedules.run(rounds=1)
    assert all(row[1] > 0 for row in report.rows) and len(report.rows) == 9
    missed = [line.split(":")[0] for line in report.missed if "draw" in line]
    assert missed == [f"draw 8 x 20, {kind}" for kind in ("SVG", "PDF", "PNG")]
    assert report.data["simulate 16 x 1,024"]["limit"] == 1.0
