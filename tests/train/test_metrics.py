"""metrics.jsonl, the spike watch and the table of peaks."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids.train.metrics import MetricsLog, peak_flops, read_metrics, spikes


def test_a_resumed_log_has_no_step_twice_and_no_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1, "loss": 2.5})
    position = log.sync()
    log.write({"step": 2, "loss": 2.0})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    resumed = MetricsLog(path, position)
    resumed.write({"step": 2, "loss": 2.0})
    resumed.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="3 bytes, the checkpoint was made at 99"):
        MetricsLog(path, 99)
    assert path.read_text() == "{}\n"


def test_every_line_is_strict_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"loss": math.nan, "grad_norm": math.inf, "mtp_loss": [1.0, math.nan], "step": 1})
    log.close()

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"loss": None, "grad_norm": None, "mtp_loss": [1.0, None], "step": 1}


def test_spikes_finds_jumps_and_only_jumps():
    smooth = [8 * math.exp(-i / 60) + 2 + 0.05 * math.sin(7 * i) for i in range(300)]
    assert spikes(smooth) == []
    bumpy = list(smooth)
    bumpy[150] += 1.5
    bumpy[200] = math.nan
    bumpy[201] = None
    assert spikes(bumpy) == [150, 200, 201]
    diverged = smooth[:200] + [9.0] * 20
    assert spikes(diverged) == list(range(200, 220))  # a run that stays up is a spike at every step


@given(st.lists(st.floats(0.1, 20.0), max_size=80))
def test_spikes_never_reports_a_new_minimum(losses):
    found = set(spikes(losses, window=8))
    for i in found:
        assert losses[i] > min(losses[:i])


def test_peaks_are_looked_up_by_whole_words():
    assert peak_flops("NVIDIA H200", half=True) == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", half=True) == 312e12
    assert peak_flops("NVIDIA H100 PCIe", half=True) == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", half=False) == pytest.approx(66.9e12)
    assert peak_flops("NVIDIA L40S", half=True) == 362e12
    assert peak_flops("NVIDIA A1000", half=True) is None
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", half=True) is None
