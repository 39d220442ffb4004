"""The sweep of notebook 07: each kind of run changes what it says and nothing else, and the committed file is a sweep."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minids.train import seeds
from minids.train.seeds import CHANGES, Job, jobs, one_run, settings
from minids.train.trainer import Trainer

TOKENS = 40_000  # the least that holds the warm-up is 10 steps; runs in these tests stop after the first
COMMITTED = Path(__file__).parents[2] / "figures" / "pretraining" / "seeds.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("seeds")


def started(job, folder, name):
    """(weights, first rows) of a run."""
    trainer = Trainer.start(dataclasses.replace(settings(job, folder, TOKENS), out=folder / name))
    trainer.data.train.seed = job.order
    trainer.log.close()
    rows, _ = trainer.data.train.batch(0, 8)
    return trainer.model.state_dict(), rows


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_seeds_change_weights_or_order_alone(folder):
    weights, rows = started(Job("both", 0, 0), folder, "a")
    other_weights, same_rows = started(Job("init", 1, 0), folder, "b")
    same_weights, other_rows = started(Job("order", 0, 1), folder, "c")
    assert not same(weights, other_weights) and np.array_equal(rows, same_rows)
    assert same(weights, same_weights) and not np.array_equal(rows, other_rows)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_differs_from_the_baseline_where_it_says(folder, name):
    baseline, changed = (settings(Job(group, 3, 3), folder, 200_000).to_dict() for group in ("both", name))
    baseline["out"] = changed["out"] = ""
    run, recipe, optim = CHANGES[name]
    expected = json.loads(json.dumps({**baseline, **run, "recipe": baseline["recipe"] | recipe,
                                      "optim": baseline["optim"] | optim}, default=str))  # fmt: skip
    assert changed == expected != baseline


def test_another_micro_batch_is_the_same_step_up_to_rounding(folder, monkeypatch):
    """Two whole runs of 12 steps, in one process."""
    monkeypatch.setattr(seeds, "RECIPE", {**seeds.RECIPE, "warmup_steps": 2})
    whole, parts = (one_run((Job(group, 0, 0), folder, 10_000)) for group in ("both", "micro-batches of 2, not 8"))
    assert parts["valid"] == pytest.approx(whole["valid"], abs=1e-3)
    assert whole["valid"] < 6.9 and len(whole["losses"]) > 9 and parts["losses"] == []


def test_the_committed_file_holds_every_job_once():
    found = json.loads(COMMITTED.read_text())
    assert found["command"] == "python -m minids.train.seeds --seeds 12 --paired 8 --tokens 200000"
    runs = [Job(run["group"], run["init"], run["order"]) for run in found["runs"]]
    assert sorted(map(dataclasses.astuple, runs)) == sorted(map(dataclasses.astuple, jobs(12, 8)))
    same_run = {run["valid"] for run in found["runs"]
                if (run["init"], run["order"]) == (0, 0) and run["group"] in ("init", "order", "both")}
    assert len(same_run) == 1  # weights 0 and order 0 three times over: one loss
