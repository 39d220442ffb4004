"""The benchmarks' arithmetic, tables and command; timings themselves are not tested."""

import json

import pytest
import torch

from minids.bench import __main__ as command
from minids.bench import common
from minids.bench.common import Report


def test_ratio_is_the_median_of_the_ratios_within_a_round():
    times = {"peer": [2.0, 30.0, 4.0], "minids": [1.0, 10.0, 1.0]}
    assert common.ratio(times, slow="peer", fast="minids") == 3.0


def test_candidates_take_turns_and_warm_up():
    calls = []
    times = common.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=1)
    assert calls == [*"abc", *"abc", *"bca", *"cab"]
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        common.interleaved({}, rounds=0)


def test_a_second_is_a_second(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    assert common.seconds(lambda: None) == 2.5


def test_matmul_rate_counts_two_flops_a_multiply_add(monkeypatch):
    monkeypatch.setattr(common, "seconds", lambda function: (function(), 4.0)[1])
    assert common.matmul_seconds(torch.float32, size=8) == 4.0 / (2 * 8**3)


def test_one_thread_is_put_back():
    before = torch.get_num_threads()
    with common.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_cells_and_table():
    cells = [common.cell(value) for value in (1234567, 0.123456, 1234.5, True, None, "x")]
    assert cells == ["1,234,567", "0.123", "1,234", "yes", "-", "x"]
    table = common.format_table(["name", "rate"], [["a", 12], ["bcd", 3456]])
    assert table == "| name |  rate |\n|------|------:|\n| a    |    12 |\n| bcd  | 3,456 |"


@pytest.fixture
def report(monkeypatch) -> Report:
    """The generation benchmark's measurement replaced by this report; it checks that it runs on one thread."""
    made = Report("Title", ["x"], [[1]], notes=["a note"], data={"seconds": [0.5]}, missed=["x: 1, wanted 2"])

    def run(rounds: int) -> Report:
        assert torch.get_num_threads() == 1
        made.data["rounds"] = rounds
        return made

    monkeypatch.setattr("minids.bench.generation.run", run)
    return made


def test_the_command_prints_writes_and_checks(report, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert command.main(["generation", "--rounds", "3", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "Title" in shown and "a note" in shown and "target missed: x: 1, wanted 2" in shown
    written = json.loads(file.read_text())
    assert written["data"] == {"seconds": [0.5], "rounds": 3} and written["machine"]["threads"] == 1
    assert list(tmp_path.iterdir()) == [file]
    assert command.main(["generation", "--check"]) == 1
    report.missed.clear()
    assert command.main(["generation", "--check"]) == 0


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["generation", "--rounds", "0"], ["generation", "--json", "/no/such/x.json"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert arguments[-1].rpartition("/")[0] in capsys.readouterr().err


def test_every_benchmark_is_listed():
    assert "generation" in command.names() and not {"common", "peer", "__main__"} & set(command.names())
