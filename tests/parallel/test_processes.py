"""Four gloo processes: every dispatch is one process, pipelines that share experts too, and `train --expert-parallel`, with
--pipeline or without, writes the losses of one, resumed on the same ranks, on others, and on one. A job beside this file
starts the processes, because only a process that has run no backward may be forked."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minids import checkpoint
from minids.data import DataConfig
from minids.parallel.check import CASES
from minids.parallel.mesh import Layout
from minids.parallel.planner import training_memory
from minids.pipeline.check import tiny_config
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.trainer import train

HERE = Path(__file__).parent


def run_job(argument: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, str(HERE / "expert_job.py"), str(argument)], env=env, timeout=240,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[dict[str, dict], dict]:
    folder = tmp_path_factory.mktemp("check")
    run_job(folder)
    lines, more = (json.loads((folder / name).read_text()) for name in ("check.json", "more.json"))
    return {line["case"]: line for line in lines}, more


def test_every_dispatch_over_processes_is_one_process(compared):
    found = compared[0]
    assert found.keys() == {case.name for case in CASES}
    for case in CASES:
        line = found[case.name]
        if case.wire.combine == "exact":
            assert line["gradient"] < 1e-5 and line["losses"] < 2e-6 and line["grad_norm"] < 1e-5, line
            assert line["loads_equal"] and line["bias"] == 0 and line["ib_rows"] == line["ib_rows_expected"]
            assert line["next_loss"] < 1e-4
        else:  # parts of a sum in BF16
            assert 1e-5 < line["gradient"] < 0.5 and line["losses"] < 0.01
    plain = [case for case in CASES if case.replicas == 1 and case.wire.dispatch == "exact" and case.pipeline is None]
    rows = {case.dispatch: found[case.name]["ib_rows"] for case in plain}
    assert rows["flat"] > rows["once"] > rows["two_hop"] > 0
    exact, fp8 = found["two hops, ZeRO-1"], found["FP8 there"]
    assert exact["ib_bytes"] == exact["ib_rows"] * 4 * tiny_config(4).hidden_size
    assert fp8["ib_bytes"] == fp8["ib_rows"] * 48  # 32 numbers, a scale, and 15 that fill up


def test_pipelines_that_share_experts_are_one_process(compared):
    """PP 2 x EP 2, and PP 2 x 2 replicas; weights after three steps."""
    cases = [case for case in CASES if case.pipeline is not None]
    assert {"1f1b", "zb1p", "zbv", "dualpipe"} == {case.pipeline for case in cases}
    for line in (compared[0][case.name] for case in cases):
        assert line["gradient"] < 2e-6 and line["losses"] < 1e-6 and line["grad_norm"] < 1e-6, line
        assert line["loads_equal"] and line["bias"] == 0 and line["weights"] < 1e-5 and line["next_loss"] < 5e-6, line


def test_ranks_of_a_stage_make_the_same_calls_in_the_same_order(compared):
    """All-to-alls of one step of dualpipe: of two directions in turn, and other ones in another stage."""
    first, second, third, fourth = compared[1]["calls"]
    assert first == second and third == fourth and first != third
    made = [call.split(" micro-batch")[0] for call in first]
    stages = [int(call.split()[-1]) for call in made]
    assert set(stages) == {0, 3}  # of direction 0, and the last of direction 1
    assert sum(a != b for a, b in pairwise(stages)) > 4
    assert {call.split()[0] for call in made} == {"forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"}


def test_every_parameter_has_one_place_in_the_optimizers_state(compared):
    """DualPipe holds an expert twice here, and all else four times. The planner counts so too, and the routers' bias."""
    cfg, more = tiny_config(4), compared[1]
    assert sum(more["kept"]) == more["parameters"] and max(more["kept"]) - min(more["kept"]) < 8
    planned = training_memory(cfg, Layout(4, 2, 2, gpus_per_node=1), tokens=1)
    routers = cfg.num_hidden_layers - cfg.first_k_dense_replace + cfg.num_nextn_predict_layers
    assert planned.master == 4 * (more["parameters"] + routers * cfg.n_routed_experts) / 4  # bytes, on each of four ranks


@pytest.mark.parametrize("case, field, least", [
    ("mirror ranks not summed", "gradient", 0.1),
    ("norm of one stage", "grad_norm", 0.01),
    ("loads of one pipeline", "bias", 1e-3),
    ("loads of one pipeline", "losses", 0.1),
    ("all pipelines have the same rows", "gradient", 0.1),
])  # fmt: skip
def test_a_mistake_is_seen(compared, case, field, least):
    assert {line["case"]: line for line in compared[1]["broken"]}[case][field] > least


TINY = ("hidden_size=32", "num_hidden_layers=4", "intermediate_size=48", "moe_intermediate_size=16",
        "num_attention_heads=2", "q_lora_rank=16", "kv_lora_rank=16", "qk_nope_head_dim=8", "qk_rope_head_dim=8",
        "v_head_dim=8", "n_routed_experts=8", "num_experts_per_tok=2", "n_group=4", "topk_group=2")  # fmt: skip


@pytest.fixture
def settings(tmp_path) -> dict:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        lines = [f"    total_{j} = first * {i * j % 17} + second / {j + 1}" for j in range(20)]
        (text / f"{i}.py").write_text("\n".join([f"def function_{i}(first, second):", *lines, ""]))
    data = {"corpus": "folder", "path": str(text), "vocab_size": 300, "min_chars": 1, "valid_fraction": 0.1,
            "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    recipe = {"tokens": 4 * 8 * 16 + 3 * 16, "sequence_length": 16, "batch": 8, "batch_start": 8, "warmup_steps": 1}
    return {"data": data, "recipe": recipe, "model": TINY, "sample_tokens": 0, "eval_every": 2, "eval_rows": 4,
            "save_every": 2, "micro_batch": 2}  # fmt: skip


def train_on_one(out: Path, settings: dict, **changes) -> Path:
    parts = {"data": DataConfig(**settings["data"]), "recipe": RecipeConfig(**settings["recipe"])}
    train(TrainConfig(out=out, **settings | parts | changes))
    return out


def stopped_after_two(run: Path, folder: Path) -> Path:
    """A copy of a run of four steps as a kill behind its second step's checkpoint would leave it."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "step-4")
    (folder / "latest").write_text("step-2\n")
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()][:4]


def check_same_bits(a: Path, b: Path) -> None:
    """The losses of two runs, and their last checkpoints but for the state of random generators."""
    assert losses(a) == losses(b)
    for file in ("model-00001-of-000001.safetensors", "trainer.safetensors"):
        x, y = load_file(a / "step-4" / file), load_file(b / "step-4" / file)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x if not k.startswith("rng/")), file


def test_training_writes_the_losses_of_one_process_and_goes_on_anywhere(tmp_path, settings):
    one = train_on_one(tmp_path / "one", settings)
    runs = [{"out": str(tmp_path / "four"), "expert_parallel": 4}]
    (tmp_path / "settings.json").write_text(json.dumps([settings | run for run in runs]))
    run_job(tmp_path)
    four = tmp_path / "four"
    assert losses(four) == pytest.approx(losses(one), abs=2e-5)
    assert not list(four.glob("*.tmp"))
    a, b = checkpoint.load(four / "step-4").state_dict(), checkpoint.load(one / "step-4").state_dict()
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=5e-4) for key in a)

    same, other = (stopped_after_two(four, tmp_path / name) for name in ("same", "other"))
    runs = [{"out": str(same), "expert_parallel": 4, "resume": True},
            {"out": str(other), "expert_parallel": 2, "expert_dispatch": "flat", "resume": True}]  # fmt: skip
    (tmp_path / "settings.json").write_text(json.dumps([settings | run for run in runs]))
    run_job(tmp_path)
    check_same_bits(same, four)
    assert losses(other) == pytest.approx(losses(four), abs=2e-5)

    alone = train_on_one(stopped_after_two(four, tmp_path / "alone"), settings, resume=True)
    assert losses(alone) == pytest.approx(losses(one), abs=2e-5)


def test_training_in_pipelines_goes_on_bit_for_bit_and_anywhere(tmp_path, settings):
    one = train_on_one(tmp_path / "one", settings)
    grid = {"pipeline": "dualpipe", "expert_parallel": 2}
    (tmp_path / "settings.json").write_text(json.dumps([settings | grid | {"out": str(tmp_path / "grid")}]))
    run_job(tmp_path)
    whole = tmp_path / "grid"
    assert losses(whole) == pytest.approx(losses(one), abs=2e-5)
    a, b = checkpoint.load(whole / "step-4").state_dict(), checkpoint.load(one / "step-4").state_dict()
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=5e-4) for key in a)

    again, spread = (stopped_after_two(whole, tmp_path / name) for name in ("again", "spread"))
    runs = [grid | {"out": str(again)}, {"expert_parallel": 4, "out": str(spread)}]
    (tmp_path / "settings.json").write_text(json.dumps([settings | run | {"resume": True} for run in runs]))
    run_job(tmp_path)
    check_same_bits(again, whole)
    assert losses(spread) == pytest.approx(losses(whole), abs=2e-5)

    alone = train_on_one(stopped_after_two(whole, tmp_path / "alone"), settings, resume=True)
    assert losses(alone) == pytest.approx(losses(one), abs=2e-5)


@pytest.mark.parametrize("changes, ranks, message", [
    ({"expert_parallel": 2, "pipeline": "1f1b"}, "2", "on 2 processes: a pipeline of 1 ranks; allowed is an even number"),
    ({"expert_parallel": 3, "pipeline": "1f1b"}, "4", "ep=3: allowed are divisors of world / pp = 4"),
    ({"expert_parallel": 2, "pipeline": "dualpipe", "pipeline_ranks": 4}, "4", "ep=2: allowed are divisors of world / pp"),
    ({"expert_parallel": 2, "pipeline": "dualpipe", "pipeline_ranks": 3}, "4", "pp=3: allowed are divisors of world=4"),
    ({"expert_parallel": 2, "pipeline": "1f1b", "model": ("num_hidden_layers=3",)}, "4", "num_hidden_layers=3 does not"),
    ({"expert_parallel": 2, "pipeline": "dualpipe", "recipe": RecipeConfig(batch=6)}, "4", "of 3 sequences cannot be cut"),
    ({"expert_parallel": 2, "pipeline": "dualpipe", "balance": ("noisy",)}, "4", "balance: noisy"),
    ({"expert_parallel": 3}, "4", "ep=3: allowed are divisors of world / pp = 4"),
    ({"expert_parallel": 4, "model": ("n_routed_experts=6", "n_group=1", "topk_group=1")}, "4",
     "ep=4: allowed are divisors of n_experts=6"),
    ({"expert_parallel": 2}, "3", "ep=2: allowed are divisors of world / pp = 3"),
    ({"expert_parallel": 1}, "3", "a global batch of 8 sequences on 3 data ranks: allowed are multiples of 3"),
    ({"expert_parallel": 4, "balance": ("noisy",)}, "4", "balance: noisy"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_is_read(monkeypatch, tmp_path, changes, ranks, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, start", [
    ({"expert_parallel": 4}, "4 -m minids train --expert-parallel"),
    ({"expert_parallel": 2, "pipeline": "zb1p"}, "4 -m minids train --pipeline zb1p --expert-parallel"),
    ({"expert_parallel": 2, "pipeline": "zb1p", "pipeline_ranks": 4}, "8 -m minids train --pipeline zb1p"),
])  # fmt: skip
def test_without_torchrun_it_says_how_to_start(monkeypatch, changes, start):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=f"torchrun --nproc-per-node {start}"):
        train(TrainConfig(**changes))


@pytest.mark.parametrize("changes, message", [
    ({"expert_parallel": 0}, "expert_parallel = 0: must be at least 1"),
    ({"pipeline": "dualpipe", "pipeline_ranks": 2}, "pipeline_ranks = 2 needs --pipeline NAME and --expert-parallel EP"),
    ({"pipeline": "dualpipe", "expert_parallel": 2, "pipeline_ranks": 1}, "pipeline_ranks = 1: must be at least 2"),
    ({"expert_wire": "v3"}, "need --expert-parallel EP"),
    ({"expert_parallel": 2, "expert_wire": "fp4"}, "expert_wire = 'fp4': must be one of exact, v3"),
])  # fmt: skip
def test_settings_name_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
