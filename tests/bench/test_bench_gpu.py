"""The GPU benchmark's own arithmetic, and its training step beside transformers', small and on the CPU."""

import json

import pytest
import torch

from minids.bench import __main__ as command
from minids.bench import gpu, gpu_equal, gpu_report, gpu_training
from minids.fp8 import to_fp8
from minids.fp8.products import Simulated

SMALL = dict(
    vocab_size=512, hidden_size=256, num_hidden_layers=3, intermediate_size=256, moe_intermediate_size=128,
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, num_attention_heads=4, q_lora_rank=128,
    kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
)  # fmt: skip


def test_the_model_of_the_training_step():
    assert gpu_training.config().count()["main"] == 4_868_483_776  # "4.87B"


@pytest.mark.parametrize("fp8", [False, True])
def test_training_step_beside_transformers(fp8):
    pytest.importorskip("transformers")
    limits = {"bf16": 1e11, "fp8": 2e11}
    row = gpu_training.compare(gpu_training.config(**SMALL), fp8, 2, limits, (2, 64), "cpu")
    assert row["operation"] == f"training step {'FP8' if fp8 else 'BF16'}" and row["best_peer"] == gpu_training.PEER
    assert row["rate"]["minids"] == pytest.approx(128 / row["seconds"]["minids"])
    assert 0 < row["error"] < (0.5 if fp8 else 0.1)
    assert list(row["refused"]) == ["minids, one CUDA graph"]  # on the CPU
    json.dumps(row)


@pytest.mark.parametrize("fp8", [False, True])
def test_another_model_is_not_timed(fp8):
    pytest.importorskip("transformers")
    model, twin = gpu_training.pair(gpu_training.config(**SMALL), "cpu")
    with torch.no_grad():
        twin.model.layers[1].mlp.experts.down_proj[3].neg_()
    model = to_fp8(model.float(), "v3") if fp8 else model
    with pytest.raises(RuntimeError, match="not the same step, nothing timed"):
        gpu_training.check_equal(model, twin, torch.randint(0, 512, (2, 129)), fp8)


def test_fp8_that_is_not_its_simulation_is_not_timed(monkeypatch):
    """A fault in input gradients alone, which no logits show: the scale of the token before."""
    pytest.importorskip("transformers")
    model, twin = gpu_training.pair(gpu_training.config(**SMALL), "cpu")
    model, rows, dgrad = to_fp8(model.float(), "v3"), torch.randint(0, 512, (2, 129)), Simulated.dgrad
    found = gpu_equal.check_equal(model, twin, rows, True)
    assert found["a layer, simulated"] == 0  # on the CPU
    assert 0 < found["BF16, choices given"] < found["FP8, choices given"] < found["minids"]
    assert all(gate.assign is None for gate in model.routers())

    def wrong(self, dy, w, dtype, ends=None):
        faulty = self.recipe.engine != "simulated" and w.joined and ends is None  # shared experts' and the dense layer's
        return dgrad(self, dy._replace(scale_inv=dy.scale_inv.roll(1, 0)) if faulty else dy, w, dtype, ends)

    monkeypatch.setattr(Simulated, "dgrad", wrong)
    with pytest.raises(RuntimeError, match="not the same step, nothing timed: distances .*a layer, simulated"):
        gpu_equal.check_equal(model, twin, rows, True)


def row(operation, shape, ours, unit="TFLOP/s", **peers):
    times = {name: [1 / rate] for name, rate in {"minids": ours, **peers}.items()}
    return gpu_report.row_of(operation, shape, unit, 1e12, 0.5 / ours, 1e-3, times) | {"refused": {}}


def test_a_row_of_the_report():
    found = row("FP8 decoding", "1, 2, 3", 4.0, slow=1.0, fast=5.0)
    assert found["rate"] == {"minids": 4.0, "slow": 1.0, "fast": 5.0} and found["best_peer"] == "fast"
    assert found["ratio"] == pytest.approx(0.8) and found["share_of_floor"] == pytest.approx(0.5)
    assert gpu_report.table_row(found)[-3:] == ["fast", 5.0, found["ratio"]]


def test_targets():
    rows = [
        row("quantise 1 x 128", "8192 x 7168", 3.6, "TB/s"), row("MoE forward FP8", "x", 700.0),
        row("FP8 decoding", "a", 1.2, cuBLASLt=1.0, DeepGEMM=1.5), row("FP8 decoding", "b", 1.2, cuBLASLt=1.0, BF16=1.5),
        row("training step BF16", "4.87B", 1.0, transformers=0.7),
        *[row("FP8 prefill", str(n), rate, cuBLASLt=1.0) for n, rate in enumerate((0.8, 0.85))],
        row("MLA decoding", "128 heads, 128 x 4096", 400.0, **{"FlashInfer FA3": 533.0}),
    ]  # fmt: skip
    assert gpu_report.missed(rows) == [
        "MoE forward FP8 x: 700 TFLOP/s, wanted 800",
        "FP8 decoding b: 0.8 times the better of cuBLASLt and BF16, wanted 1.0",
        "training step BF16 4.87B: 1.43 times transformers, wanted 1.5",
        "FP8 prefill, geometric mean: 0.825 times cuBLASLt, wanted 0.85",
        "MLA decoding 128 heads, 128 x 4096: 0.75 times FlashInfer FA3, wanted 0.8",
    ]  # fmt: skip
    assert gpu_report.missed([]) == []


def test_peers_that_did_not_run_are_named():
    alone = row("MLA decoding", "128 heads, 128 x 4096", 266.5)
    alone["refused"] = {"FlashInfer FA3": "ImportError: no flashinfer"}
    assert gpu_report.remarks({"copy": 4e12}, [alone])[1:] == [
        "MLA decoding, 128 heads, 128 x 4096: 0.50 of FlashInfer FA3 on an H200 in another run (533 TFLOP/s)",
        "did not run, FlashInfer FA3: ImportError: no flashinfer",
    ]


def test_a_row_that_fails_does_not_take_the_others(monkeypatch):
    """Each row is saved as it is measured; the failed one is named."""

    def fails():
        raise RuntimeError("out of memory\nlong story")

    made = [("one", lambda: row("quantise 1 x 128", "s", 3.0, "TB/s", copy=4.0)), ("two", fails),
            ("three", lambda: row("RMSNorm", "s", 3.0, "TB/s", torch=2.0))]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "measure_limits", lambda rounds: {"copy": 4e12})
    monkeypatch.setattr(gpu, "jobs", lambda chosen, limits, rounds: iter(made))
    monkeypatch.setattr(gpu, "reset_after_capture", lambda: None)
    saved = []
    report = gpu.run(1, save=lambda report: saved.append(len(report.rows)))
    assert saved == [1, 1, 2] and [r[0] for r in report.rows] == ["quantise 1 x 128", "RMSNorm"]
    assert report.missed == ["quantise 1 x 128 s: 3 TB/s, wanted 3.5", "two: not measured, RuntimeError: out of memory"]


def test_bad_groups(capsys):
    with pytest.raises(ValueError, match="only: got nonsense, expected some of training"):
        gpu.run(1, only=["nonsense"])
    for name in ("gpu", "router"):
        with pytest.raises(SystemExit):
            command.main([name, "--only", "nonsense"])
        assert "--only: got nonsense" in capsys.readouterr().err
