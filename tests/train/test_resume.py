"""A run that was stopped, killed in training or killed in a checkpoint write continues bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from minids.train import state
from minids.train.metrics import read_metrics
from minids.train.optim import OptimConfig
from minids.train.settings import TrainConfig
from minids.train.trainer import Trainer, train

MEASURED = {"tokens_per_second", "mfu"}  # the clock is not part of the run


def losses(folder):
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(folder)]


def tensor_files(folder):
    """Bytes of every tensor file of the last checkpoint: weights, bias, moments, masters, generator states."""
    last = state.latest_checkpoint(folder)
    found = {p.name: p.read_bytes() for p in last.glob("*.safetensors")}
    values = json.loads((last / "trainer.json").read_text())
    values["progress"].pop("seconds")
    values.pop("metrics_bytes")  # lines hold measured speeds, of varying length
    return found | {"config.json": (last / "config.json").read_bytes(), "values": values}


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    first, second = tensor_files(one), tensor_files(other)
    assert first.keys() == second.keys() and len(first) >= 4
    assert [k for k in first if first[k] != second[k]] == []


def full_run(config):
    trainer = Trainer.start(config)
    trainer.run()
    trainer.log.close()
    return trainer


SWITCHES = {
    "plain": {},
    "switches": {"document_mask": True, "recompute": True, "micro_batch": 3, "precision": "bf16", "keep": 1},
    "fp16": {"precision": "fp16"},
    "fp8": {"fp8": "v3", "precision": "bf16-autocast", "micro_batch": 3, "optim": OptimConfig(moments="bf16")},
    "fp8, recomputed": {"fp8": "mx", "recompute": True, "document_mask": True},
    # W_noise is a parameter that a published checkpoint has no place for; its noise comes from the saved generator.
    "noisy top-k": {"balance": ("noisy", "importance", "load"), "precision": "bf16", "model": ("topk_group=4",)},
    "proportional, capacity": {"balance": ("proportional_bias", "capacity:priority=score", "z"), "recompute": True},
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_resume_is_bit_exact(tiny, tmp_path, whole, switches):
    """Stopped by an exception after step 13, resumed from step 10, against the uninterrupted run."""
    torch.use_deterministic_algorithms(True)
    try:
        if switches:
            whole = tmp_path / "whole"
            full_run(tiny(out=whole, **switches))
        trainer = Trainer.start(tiny(**switches))
        real = trainer.step

        def step():
            if trainer.progress.step == 13:
                raise KeyboardInterrupt
            return real()

        trainer.step = step
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        trainer.log.close()
        assert [r["step"] for r in losses(tmp_path / "run")] == list(range(1, 14))
        resumed = full_run(tiny(resume=True, **switches))
    finally:
        torch.use_deterministic_algorithms(False)
    assert resumed.progress.step == 20
    assert_same_run(whole, tmp_path / "run")


def test_a_finished_run_resumes_to_itself(tiny, tmp_path):
    first = train(tiny())
    before = tensor_files(tmp_path / "run")
    again = train(tiny(resume=True))
    assert tensor_files(tmp_path / "run") == before
    assert again["loss"] == first["loss"] and again["sample"] == first["sample"] and again["step"] == 20


CHILD = """
import json, sys, time
import torch
from minids.data import DataConfig
from minids.train import state
from minids.train.optim import OptimConfig
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.trainer import Trainer, train

torch.set_num_threads(int(sys.argv[3]))  # bit for bit holds between equal numbers of threads
values = json.loads(sys.argv[1])
for name, kind in (("data", DataConfig), ("recipe", RecipeConfig), ("optim", OptimConfig)):
    values[name] = kind(**values[name])
values["model"], values["prompts"] = tuple(values["model"]), tuple(values["prompts"])
config, where = TrainConfig(**values), sys.argv[2]

step = Trainer.step
def slow_step(self):
    record = step(self)
    if self.progress.step == 13 and where == "training":
        print("NOW", flush=True)
        time.sleep(60)
    if self.progress.step == 13 and where == "signal":
        print("NOW", flush=True)
        while not interrupted():
            time.sleep(0.01)
    return record
Trainer.step = slow_step

def interrupted():
    import signal
    handler = signal.getsignal(signal.SIGINT)
    return handler.__self__.received

save_file = state.save_file
def slow_save(tensors, path):
    if where == "write" and "step-15" in str(path):
        with open(path, "wb") as file:
            file.write(b"half a file")
        print("NOW", flush=True)
        time.sleep(60)
    save_file(tensors, path)
state.save_file = slow_save
train(config)
"""


def child(config, where):
    """Start the run in a process of its own; returns it when it has reached the place named by `where`."""
    command = [sys.executable, "-c", CHILD, json.dumps(config.to_dict()), where, str(torch.get_num_threads())]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "CI": "1"})
    for line in process.stdout:
        if line.strip() == "NOW":
            return process
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def whole(build_tiny, tmp_path_factory):
    """The uninterrupted run, made once."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    full_run(build_tiny(out=folder))
    return folder


@pytest.mark.parametrize(("where", "resumes_at"), [("training", 10), ("write", 10)])
def test_kill_nine_leaves_a_run_that_continues(tiny, whole, tmp_path, where, resumes_at):
    process = child(tiny(), where)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close(), process.stderr.close()
    out = tmp_path / "run"
    assert state.latest_checkpoint(out).name == f"step-{resumes_at}"
    if where == "write":
        assert (out / "step-15.tmp" / "trainer.safetensors").read_bytes() == b"half a file"
    full_run(tiny(resume=True))
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*"))
    assert_same_run(whole, out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_continue(tiny, whole, tmp_path, number, code):
    process = child(tiny(), "signal")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert re.search(r"stopped after step 13 of 20, saved as .*step-13; .*--resume", out)
    assert number.name in err
    assert state.latest_checkpoint(tmp_path / "run").name == "step-13"
    full_run(tiny(resume=True))
    assert_same_run(whole, tmp_path / "run")


def test_killed_before_the_first_checkpoint_it_starts_again(tiny, whole, tmp_path):
    trainer = Trainer.start(tiny(save_every=1000))
    for _ in range(3):
        trainer.log.write(trainer.step())
    trainer.log.close()
    full_run(tiny(save_every=5, resume=True))
    assert_same_run(whole, tmp_path / "run")


def test_resume_on_another_text_is_refused(tiny, tmp_path, corpus):
    text = tmp_path / "text"
    shutil.copytree(corpus / "text", text)
    five = {"recipe": {"tokens": 5 * 4 * 32}, "data": {"path": str(text)}}
    full_run(tiny(**five))
    before = (tmp_path / "run" / "tokenizer.json").read_bytes()
    for path in sorted(text.iterdir())[:30]:
        path.write_text(path.read_text().replace("omega", "lambda"))
    with pytest.raises(ValueError, match="training tokens are not those of the run"):
        Trainer.start(tiny(resume=True, **five))
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == before


def test_resume_with_another_recipe_is_refused_before_any_work(tiny, tmp_path):
    full_run(tiny(recipe={"tokens": 5 * 4 * 32}))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="recipe.lr: the run has 0.003, now 0.5"):
        train(tiny(recipe={"tokens": 5 * 4 * 32, "lr": 0.5}, resume=True))
    with pytest.raises(FileExistsError, match="--resume"):
        train(tiny())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_settings_that_fail_on_the_data_leave_no_trace(tiny, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        train(tiny(data={"path": str(tmp_path / "nowhere")}))
    with pytest.raises(ValueError, match="vocab_size"):
        train(tiny(model=("vocab_size=300",)))
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_leaves(tiny, tmp_path, capsys):
    summary = train(tiny())
    out = tmp_path / "run"
    assert sorted(p.name for p in out.iterdir()) == ["latest", "loss.png", "metrics.jsonl", "run.json", "sample.txt",
                                                     "step-15", "step-20", "tokenizer.json"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text().startswith("def alpha")
    records = read_metrics(out)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert records[-1]["tokens"] == summary["tokens"] == 20 * 4 * 32
    assert [r["step"] for r in records if "valid_loss" in r] == [5, 10, 15, 20]
    for key in ("loss", "grad_norm", "lr", "batch", "gamma", "lambda", "maxvio_mean", "maxvio_max", "bias_spread",
                "tokens_per_second", "skipped", "balance_loss"):
        assert isinstance(records[-1][key], (int, float)), key
    assert len(records[-1]["mtp_loss"]) == 1 and records[-1]["loss"] < records[0]["loss"]
    printed = capsys.readouterr().out
    for name in ("metrics.jsonl", "loss.png", "sample.txt", "step-20"):
        assert str(out / name) in printed


@pytest.mark.parametrize(("change", "message"), [
    ({"micro_batch": 0}, "micro_batch = 0: must be at least 1"),
    ({"precision": "fp8"}, "precision = 'fp8': must be one of"),
    ({"device": "tpu"}, "device = 'tpu': must be cpu, cuda"),
    ({"device": "cuda:99"}, "device = 'cuda:99': this machine has"),
    ({"name": "a/b"}, "name = 'a/b'"),
    ({"preset": "huge"}, "preset='huge'"),
    ({"model": ("hidden_size",)}, "model = 'hidden_size': must be FIELD=VALUE"),
    ({"model": ("hiden_size=3",)}, "hiden_size"),
    ({"model": ("max_position_embeddings=8",)}, "sequence_length = 128: must be at most"),
    ({"max_skips": 0}, "max_skips = 0"),
])
def test_impossible_settings_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**change)
