"""Execution: every schedule on 4 gloo processes equals one process, and broken ones do not. The processes are started by
jobs beside this file, because only a process that has run no backward may be forked."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minids import checkpoint
from minids.bench.pipeline_record import recorded_timeline
from minids.data import DataConfig
from minids.pipeline.schedules import NAMES, build_schedule
from minids.pipeline.simulate import needs
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.trainer import train

HERE = Path(__file__).parent
# The model is random and small, so its numbers are of order one; a wrong factor shows as 1e-3 at least (see BROKEN).
LIMIT = 1e-5
VARIANTS = ("two MTP modules", "no MTP", "tied head", "MTP before the norm", "uneven layers", "empty ends", "recompute",
            "own pair", "V2 router", "FP8 dualpipe", "FP8 zb1p, an end without layers")  # fmt: skip


def run_job(name: str, argument: Path, timeout: float) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    return subprocess.run([sys.executable, str(HERE / name), str(argument)], env=env, timeout=timeout, capture_output=True,
                          text=True)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("pipeline") / "results.json"
    done = run_job("pipeline_job.py", out, 240)
    assert done.returncode == 0, done.stderr
    return {result["case"]: result for result in json.loads(out.read_text())}


@pytest.mark.parametrize("case", [*NAMES, *VARIANTS])
def test_a_pipeline_is_one_process(results, case):
    found = results[case]
    assert found["gradient"] < LIMIT, found["gradient_name"]
    assert found["losses"] < LIMIT and found["grad_norm"] < LIMIT
    assert found["weights"] < LIMIT and found["next_loss"] < LIMIT
    assert found["loads_equal"] and found["bias"] == 0


@pytest.mark.parametrize("schedule", ["dualpipe", "zbv"])
def test_in_float64_gradients_agree_to_the_last_bits(results, schedule):
    found = results[f"float64 {schedule}"]
    assert found["gradient"] < 1e-14, found["gradient_name"]
    assert found["weights"] < 1e-9  # the norm that clips is summed in float32


def test_an_overlapped_pair_may_have_a_body_of_its_own(results):
    assert results["own pair"]["pairs"] > 0


@pytest.mark.parametrize("schedule", ["dualpipe", "zbv"])
def test_messages_that_pass_through_the_host_arrive(results, schedule):
    """Four ranks on two GPUs: gloo, by way of the host's memory."""
    found = results[f"{schedule} through the host"]
    assert found["hosted"] > results[schedule]["hosted"]
    assert found["gradient"] < LIMIT and found["weights"] < LIMIT and found["next_loss"] < LIMIT


@pytest.mark.parametrize("schedule, stages", [("zb1p", 4), ("dualpipe_v", 8)])
def test_stages_run_alone_and_keep_no_graph_behind_their_weight_backward(results, schedule, stages):
    found = results[f"stages of {schedule} alone"]
    assert found["kept"] == 0
    assert all(len(found["times"][kind]) == stages for kind in "FBIW")
    assert all(seconds > 0 for kind in "FBW" for seconds in found["times"][kind])


@pytest.mark.parametrize("name", ["zb1p", "dualpipe"])
def test_a_recorded_step_is_the_schedule(results, name):
    """Every action of every rank, in the order of its list (a pair as F, then B), none before what it needs."""
    schedule = build_schedule(name, ranks=4, micro_batches=8)
    timeline = recorded_timeline(schedule, results[f"{name} recorded"]["rows"])
    for cells, actions in zip(timeline.cells, schedule.actions, strict=True):
        assert [cell.action for cell in cells] == [part for action in actions for part in action.parts()]
        assert all(a.end <= b.start for a, b in pairwise(cells)) and cells[0].start >= 0
    assert timeline.makespan > max(timeline.busy) > 0
    ends = {(a.kind == "F", a.direction, a.stage, a.micro_batch): cell.end
            for row in timeline.cells for cell in row if (a := cell.action).kind != "W"}  # fmt: skip
    rounded = 1e-5  # seconds; one clock for all ranks
    for row in timeline.cells:
        for cell in row:
            if cell.action.kind != "W" and (key := needs(cell.action, schedule.stages)) is not None:
                assert cell.start > ends[not key[0], *key[1:]] - rounded


# (case, what must differ, by how much at least): the comparison would see these mistakes.
BROKEN = [
    ("stages not in FP8", "gradient", 1e-3),
    ("micro-batches weighed alike", "gradient", 0.01),
    ("micro-batches weighed alike", "losses", 0.01),
    ("mirror ranks not summed", "gradient", 0.1),
    ("MTP embedding not summed", "gradient", 0.01),
    ("loads of one direction", "bias", 1e-3),
    ("norm of one rank", "grad_norm", 0.01),
]


@pytest.mark.parametrize("case, field, least", BROKEN)
def test_a_mistake_is_seen(results, case, field, least):
    assert results[case][field] > least


def test_an_embedding_left_out_shows_in_the_embedding(results):
    assert results["MTP embedding not summed"]["gradient_name"] == "model.embed_tokens.weight"


def test_a_rank_that_dies_is_named_by_all_others(tmp_path):
    done = run_job("dying_job.py", tmp_path, 120)
    lines = re.findall(r"rank (\d): exit code (-?\d+) after ([\d.]+) s", done.stdout)
    ends = {int(rank): (int(code), float(seconds)) for rank, code, seconds in lines}
    assert ends.keys() == {0, 1, 2, 3} and ends[2][0] == -9, done.stdout + done.stderr
    for rank in (0, 1, 3):
        code, seconds = ends[rank]
        assert code == 1 and seconds < 30
        assert f"error: rank {rank} ends because rank 2 died" in done.stderr


def test_ranks_that_wait_for_each_other_say_where_they_stand():
    """Two ranks that both receive first: without an end of its own, the job would wait ten minutes for gloo's."""
    text = """
import torch, torch.distributed as dist
from minids.pipeline.launch import deadline, start_local
from minids.pipeline.messages import transfer

def wait(rank):
    with deadline(2, "zbv"):
        transfer(dist.irecv, torch.zeros(1), 1 - rank)

if __name__ == "__main__":
    start_local(wait, 2)
"""
    env = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run([sys.executable, "-c", text], env=env, timeout=60, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(r"error: rank [01] ends because zbv is not done after 2 s", done.stderr)
    assert "in transfer" in done.stderr  # the stack


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
            "save_every": 2, "micro_batch": 1}  # fmt: skip


def train_on_four(folder: Path, settings: dict, schedule: str = "dualpipe", **changes) -> Path:
    """``train --pipeline`` on 4 processes, in FOLDER/run."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings | changes | {"pipeline": schedule}))
    done = run_job("train_job.py", folder, 120)
    assert done.returncode == 0, done.stderr
    return folder / "run"


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


def steps_of(run: Path) -> list[dict]:
    timings = ("tokens_per_second", "mfu")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timings} for line in lines]


def test_a_resumed_pipeline_is_the_uninterrupted_one(tmp_path, settings):
    """Bit for bit on the same schedule: weights, bias, moments, metrics. On another schedule, and on one process, the same
    run but for the order of sums."""
    whole = train_on_four(tmp_path / "whole", settings)
    again = stopped_after_two(whole, tmp_path / "again" / "run").parent
    train_on_four(again, settings, resume=True)
    files = [path.name for path in (whole / "step-4").glob("*.safetensors")]
    assert len(files) >= 2
    for name in files:
        assert (again / "run" / "step-4" / name).read_bytes() == (whole / "step-4" / name).read_bytes()
    assert steps_of(again / "run") == steps_of(whole) and len(steps_of(whole)) == 4

    other = stopped_after_two(whole, tmp_path / "other" / "run").parent
    train_on_four(other, settings, "zb1p", resume=True)
    one = train_on_one(stopped_after_two(whole, tmp_path / "one"), settings, resume=True)
    for run in (other / "run", one):
        assert steps_of(run)[:2] == steps_of(whole)[:2]
        for ours, wanted in zip(steps_of(run)[2:], steps_of(whole)[2:], strict=False):
            for field in ("loss", "grad_norm", "balance_loss"):
                assert ours[field] == pytest.approx(wanted[field], rel=1e-3), (run, ours["step"], field)


def test_a_run_of_one_process_goes_on_as_a_pipeline(tmp_path, settings):
    whole = train_on_one(tmp_path / "whole", settings, keep=3)
    part = stopped_after_two(whole, tmp_path / "part" / "run").parent
    shutil.rmtree(part / "run" / "step-5")
    train_on_four(part, settings, "1f1b", resume=True)
    assert steps_of(part / "run")[:2] == steps_of(whole)[:2] and len(steps_of(part / "run")) == 4
    for ours, wanted in zip(steps_of(part / "run")[2:], steps_of(whole)[2:4], strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    found, wanted = (load_file(run / "step-4" / "trainer.safetensors") for run in (part / "run", whole))
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == value.shape and found[name].dtype == value.dtype for name, value in wanted.items())


def test_train_pipeline_is_train(tmp_path, settings):
    """Four steps: losses, validation and the published checkpoint are those of one process, which takes a fifth step with
    the rest of three rows that no pipeline of four ranks can cut."""
    train_on_four(tmp_path, settings)
    train_on_one(tmp_path / "one", settings)
    lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
             for run in ("run", "one")]  # fmt: skip
    assert [len(found) for found in lines] == [4, 5]
    for ours, wanted in zip(*lines, strict=False):
        for field in ("loss", "balance_loss", "grad_norm", "maxvio_max", "token_entropy"):
            assert ours[field] == pytest.approx(wanted[field], rel=1e-3), (ours["step"], field)
        assert ours["mtp_loss"] == pytest.approx(wanted["mtp_loss"], rel=1e-3)
    model = checkpoint.load(tmp_path / "run" / "step-4")
    other = checkpoint.load(tmp_path / "one" / "step-4").state_dict()
    assert all(torch.allclose(value, other[name], atol=3e-3) for name, value in model.state_dict().items())
    assert lines[0][3]["valid_loss"] == pytest.approx(lines[1][3]["valid_loss"], rel=1e-3)
