"""A run of many processes that is stopped: Ctrl-C loses nothing, a run that is over may be resumed, and processes that
nobody told to share the work are refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from minids.cli import main
from minids.pipeline.train import batches_left
from minids.train.settings import RecipeConfig, TrainConfig

TRAIN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minids", "train"]


@pytest.fixture
def words(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for n in range(1, 21):
        (text / f"{n}.txt").write_text("".join(f"{i} times {n} is {i * n}\n" for i in range(300)))
    return ["--out", str(tmp_path / "run"), "--data.corpus", "folder", "--data.path", str(text), "--data.vocab-size", "300",
            "--data.cache-dir", str(tmp_path / "cache"), "--recipe.tokens", "8960", "--recipe.sequence-length", "32",
            "--recipe.batch", "4", "--eval-rows", "4", "--eval-every", "0", "--sample-tokens", "0"]  # fmt: skip


def start(words, *more):
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {"OMP_NUM_THREADS": "1", "CI": "1"}
    return subprocess.Popen([sys.executable, *TRAIN, *words, *more], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def steps(folder) -> list[int]:
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def test_ctrl_c_saves_the_step_and_another_layout_goes_on(words, tmp_path):
    run = start(words, "--pipeline", "1f1b", "--save-every", "100000")
    patience = time.time() + 120
    while len(steps(tmp_path / "run")) < 3 and run.poll() is None and time.time() < patience:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    done = steps(tmp_path / "run")
    assert done, said
    assert f"stopped after step {done[-1]} of " in said and said.count("finishing this step") == 1, said
    assert done[-1] < 70 and (tmp_path / "run" / "latest").read_text().strip() == f"step-{done[-1]}"
    run = start(words, "--expert-parallel", "2", "--resume")
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said
    assert steps(tmp_path / "run") == list(range(1, 71))


def test_a_run_that_is_over_has_no_batch_to_refuse():
    config = TrainConfig(recipe=RecipeConfig(tokens=60_000, batch=8, batch_start=8))
    assert batches_left(config, 0) == [8]
    assert batches_left(config, 58 * 1024) == []  # 608 tokens are left, 5 rows: dropped on two ranks
    assert batches_left(TrainConfig(recipe=RecipeConfig(tokens=1000, batch=8, batch_start=8, warmup_steps=0)), 0) == [8]


def test_processes_without_a_layout_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "WORLD_SIZE = 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
