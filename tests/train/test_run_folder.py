"""The run folder: what is refused, what survives a kill at every instant of a checkpoint write."""

import json
import os
import random

import numpy as np
import pytest
import torch

from minids.train import state

SETTINGS = {"seed": 0, "recipe": {"lr": 0.1, "batch": 4}, "keep": 2}


def write_model(folder):
    (folder / "config.json").write_text("{}")


def save(out, step, keep=2):
    return state.save_checkpoint(out, step, write_model, {"x": torch.full((3,), step)}, {"step": step}, keep)


def prepare(out, settings=SETTINGS, resume=False, overwrite=False):
    found = state.check_folder(out, settings, resume, overwrite, free={"keep"})
    state.open_folder(out, settings, resume)
    return found


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="--resume .* --overwrite"):
        prepare(tmp_path)
    with pytest.raises(FileExistsError, match="holds no run"):
        prepare(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"--out .*/runs/toy: .*/thesis\.txt is a file"):
        state.check_folder(tmp_path / "thesis.txt" / "runs" / "toy", SETTINGS, False, False, free=set())
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError, match=f"--out .*/runs/toy: {tmp_path} cannot be written to"):
        state.check_folder(tmp_path / "runs" / "toy", SETTINGS, False, False, free=set())


@pytest.mark.parametrize("name", ["trainer.safetensors", "trainer.json"])
def test_a_truncated_state_is_refused_by_name(tmp_path, name):
    prepare(tmp_path)
    folder = save(tmp_path, 5)
    os.truncate(folder / name, 10)
    with pytest.raises(ValueError, match=f"step-5/{name}: truncated"):
        state.load_checkpoint(folder)


def test_a_truncated_run_file_is_refused_by_name(tmp_path):
    prepare(tmp_path)
    os.truncate(tmp_path / "run.json", 10)
    with pytest.raises(ValueError, match=r"run\.json: truncated"):
        prepare(tmp_path, resume=True)


def test_others_may_read_a_checkpoint(tmp_path):
    """safetensors 0.8 writes files that the owner alone may read."""
    prepare(tmp_path)
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 5)
    finally:
        os.umask(before)
    assert (folder / "trainer.safetensors").stat().st_mode & 0o777 == 0o640


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    prepare(tmp_path)
    save(tmp_path, 1)
    (tmp_path / "notes.md").write_text("keep me")
    assert prepare(tmp_path, SETTINGS | {"seed": 1}, overwrite=True) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.md", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        prepare(tmp_path, resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        prepare(tmp_path, resume=True, overwrite=True)


def test_resume_with_other_settings_names_every_field(tmp_path):
    prepare(tmp_path)
    other = {"seed": 7, "recipe": {"lr": 0.1, "batch": 8, "gamma": 0.0}, "keep": 5}
    with pytest.raises(ValueError) as error:
        prepare(tmp_path, other, resume=True)
    text = str(error.value)
    assert "seed: the run has 0, now 7" in text and "recipe.batch: the run has 4, now 8" in text
    assert "recipe.gamma" in text and "recipe.lr" not in text and "keep" not in text
    assert prepare(tmp_path, SETTINGS | {"keep": 9}, resume=True) is None  # no checkpoint yet: from the start


def test_the_last_checkpoints_are_kept_and_latest_names_the_newest(tmp_path):
    prepare(tmp_path)
    for step in (5, 10, 15, 100):
        folder = save(tmp_path, step)
        assert prepare(tmp_path, resume=True) == folder == state.latest_checkpoint(tmp_path)
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-15", "step-100"]
    tensors, values = state.load_checkpoint(folder)
    assert torch.equal(tensors["x"], torch.full((3,), 100)) and values == {"step": 100}
    save(tmp_path, 101, keep=1)
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-101"]


class Killed(BaseException):
    """Stands for kill -9: nothing of the writer runs after it."""


def test_every_instant_of_a_write_leaves_a_complete_latest(tmp_path, monkeypatch):
    """Die before each call to the file system in turn; the newest complete checkpoint must load every time."""
    calls = {"left": None}

    def dying(function):
        def wrapped(*args, **kwargs):
            if calls["left"] is not None:
                if calls["left"] == 0:
                    raise Killed
                calls["left"] -= 1
            return function(*args, **kwargs)
        return wrapped

    for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
                         (state, "save_file")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    instants = 0
    for instant in range(1000):
        out = tmp_path / str(instant)
        prepare(out)
        save(out, 1, keep=1)
        calls["left"] = instant
        try:
            save(out, 2, keep=1)
            finished = True
        except Killed:
            finished = False
        calls["left"] = None
        found = prepare(out, resume=True)
        step = state.load_checkpoint(found)[1]["step"]
        assert found.name == f"step-{step}" and (found / "config.json").exists()
        assert not list(out.glob("*.tmp"))  # the resume has cleaned up
        save(out, 2, keep=1)  # and the run goes on
        assert state.latest_checkpoint(out).name == "step-2" and len(state.checkpoints(out)) == 1
        instants += 1
        if finished:
            break
    assert finished and instants > 12


def test_killed_before_the_first_pointer_the_renamed_folder_counts(tmp_path):
    prepare(tmp_path)
    save(tmp_path, 5)
    (tmp_path / "latest").unlink()
    (tmp_path / "step-9.tmp").mkdir()
    assert prepare(tmp_path, resume=True).name == "step-5"


def test_a_pointer_to_nothing_is_reported(tmp_path):
    prepare(tmp_path)
    save(tmp_path, 5)
    (tmp_path / "latest").write_text("step-6\n")
    with pytest.raises(FileNotFoundError, match="'step-6', which is not a checkpoint; there are .*step-5"):
        prepare(tmp_path, resume=True)


def test_generator_states_survive_json_and_safetensors(tmp_path):
    # The legacy global generator of numpy is what other people's code draws from, so it is saved too.
    def draw():
        numbers = np.random.rand(), np.random.randn()  # noqa: NPY002
        return random.random(), float(torch.rand(())), random.gauss(0, 1), *numbers

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    draw()
    tensors, values = state.rng_state()
    expected = [draw() for _ in range(3)]
    state.save_checkpoint(tmp_path, 1, write_model, tensors, json.loads(json.dumps(values)), 1)
    draw()
    state.set_rng_state(*state.load_checkpoint(tmp_path / "step-1"))
    assert [draw() for _ in range(3)] == expected
