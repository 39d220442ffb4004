"""The experiment's bookkeeping: every strategy is in it, runs repeat, finished ones are skipped, figures are drawn."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from minids.experiments import balance, plan
from minids.experiments.balance import BalanceConfig, Job, Settings, jobs_of, model_config, one_run, read_lines, settings_of
from minids.experiments.domains import KINDS
from minids.model.balancer import STRATEGIES, parse_all
from minids.plots import balance as plots

TINY = Settings(6, 4, dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=16,
                           n_routed_experts=8, num_experts_per_tok=2), 3e-3, 10_000)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    return {f"{part}_{kind}": draw.integers(600 * i, 600 * (i + 1), (n, balance.LENGTH + 1))
            for part, n in (("train", 20), ("valid", 3)) for i, kind in enumerate(KINDS)}  # fmt: skip


@pytest.fixture
def small(monkeypatch, data):
    """The experiment on TINY, run in this process instead of workers."""
    class Pool:
        def __init__(self, processes, start, arguments):
            balance.start_worker(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def imap_unordered(self, work, jobs):
            return map(work, reversed(jobs))

    counts = {kind: {"documents": 1, "characters": 10, "tokens": 10} for kind in KINDS}
    parts = [{kind: data[f"{part}_{kind}"] for kind in KINDS} for part in ("train", "valid")]
    monkeypatch.setattr(balance, "settings_of", lambda config: TINY)
    monkeypatch.setattr(balance, "build_domains", lambda *a: balance.build_domains_result)
    monkeypatch.setattr(balance, "build_domains_result", type("D", (), dict(train=parts[0], valid=parts[1], counts=counts)),
                        raising=False)  # fmt: skip
    monkeypatch.setattr(balance.multiprocessing, "get_context", lambda kind: type("C", (), {"Pool": Pool}))


def job(**changes):
    return dataclasses.replace(Job("sweep", "bias", 1e-3, ("bias",), 1e-3, 4, 0), **changes)


def test_the_sweep_holds_every_strategy_and_fits_its_model():
    config = BalanceConfig()
    jobs = jobs_of(config)
    assert {text.split(":")[0] for j in jobs for text in j.balance} == set(STRATEGIES)
    assert len({j.key for j in jobs}) == len(jobs) and {j.seed for j in jobs} == {0, 1, 2}
    for j in jobs:
        parse_all(j.balance, model_config(settings_of(config), j.topk_group))


def test_a_run_repeats_and_differs_only_in_its_strategy(data):
    jobs = (job(), job(), job(seed=1), job(balance=(), gamma=0.0))
    one, again, other, free = (one_run(j, TINY, data, "cpu") for j in jobs)
    for run in (one, again):
        run.pop("seconds")
    assert one == again and one["losses"] != other["losses"]
    assert one["losses"][0] == free["losses"][0] and one["bias_spread"] > 0 == free["bias_spread"]
    assert len(one["losses"]) == 6 and one["every"] == 1 and one["violations"][-1] > 0
    assert {kind: np.array(load).sum() for kind, load in one["load"].items()} == dict.fromkeys(KINDS, 3 * 128 * 2)
    assert one["valid_as_trained"] == pytest.approx(one["valid_mean"], rel=1e-5)  # the bias acts in both


def test_expert_choice_is_balanced_in_training_and_not_at_inference(data):
    run = one_run(job(name="expert choice", balance=("expert_choice",), gamma=0.0), TINY, data, "cpu")
    assert run["maxvio_train"] == 0 and run["maxvio_batch"] > 0 and run["valid_as_trained"] != run["valid_mean"]


def test_finished_runs_are_kept_and_skipped(small, tmp_path, monkeypatch, capsys):
    config = BalanceConfig(out=tmp_path, quick=True)
    first = balance.run(config)
    keys = [run["key"] for run in first["runs"]]
    assert keys == [j.key for j in jobs_of(config)] and first["text"]["code"]["tokens"] == 10
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(keys) + 1 and {p.suffix for p in tmp_path.iterdir()} == {".jsonl", ".json", ".png"}
    done = []
    real = balance.one_run
    monkeypatch.setattr(balance, "one_run", lambda j, *rest: done.append(j.key) or real(j, *rest))
    assert balance.run(config)["runs"] == first["runs"] and done == []  # nothing to do: table and figures only
    assert balance.run(BalanceConfig(out=tmp_path, draw_only=True)) == first and done == []
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])  # killed within a line
    assert len(balance.run(config)["runs"]) == len(keys) and done == [json.loads(lines[-1])["key"]]


def test_a_failed_run_is_reported_and_the_others_are_kept(small, tmp_path, monkeypatch):
    real = balance.one_run
    monkeypatch.setattr(balance, "one_run", lambda j, *rest: 1 / 0 if j.name == "none" else real(j, *rest))
    config = BalanceConfig(out=tmp_path, quick=True)
    with pytest.raises(RuntimeError, match="1 runs failed.*ZeroDivisionError"):
        balance.run(config)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(jobs_of(config))  # a header, one run missing


def test_stops_when_the_time_is_over_and_goes_on_later(small, tmp_path):
    config = BalanceConfig(out=tmp_path, quick=True, minutes=1e-6)
    assert len(balance.run(config)["runs"]) == 1
    assert len(balance.run(dataclasses.replace(config, minutes=0.0))["runs"]) == len(jobs_of(config))


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"settings": 1}\n{"key": "a"}\n')
    assert read_lines(path, {"settings": 1}) == [{"key": "a"}]
    with pytest.raises(ValueError, match="other settings"):
        read_lines(path, {"settings": 2})


@pytest.mark.parametrize("changes, message", [({"seeds": 0}, "seeds = 0"), ({"device": "tpu"}, "tpu"),
                                              ({"workers": -1}, "workers = -1")])  # fmt: skip
def test_bad_settings_are_refused(changes, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        BalanceConfig(**changes)


def test_figures_of_the_committed_kind_of_data(data):
    """Every figure from two seeds of a few strategies: finite points, a label on every axis."""
    runs = []
    for seed in (0, 1):
        for name, coefficient, texts, gamma, limit, group in [
            ("none", None, (), 0.0, 4, "sweep"), ("bias", 3e-3, ("bias",), 3e-3, 4, "sweep"),
            ("bias", 1e-2, ("bias",), 1e-2, 4, "sweep"), ("sequence-wise", 0.1, ("sequence:alpha=0.1",), 0.0, 4, "sweep"),
            ("batch-wise", 0.1, ("batch:alpha=0.1",), 0.0, 4, "sweep"), ("bias", 3e-3, ("bias",), 3e-3, 2, "nodes"),
        ]:  # fmt: skip
            runs.append(one_run(Job(group, name, coefficient, texts, gamma, limit, seed), TINY, data, "cpu"))
    for name in ("pareto", "loss_by_kind", "gamma_sweep", "specialisation", "node_limit", "balance_over_time"):
        figure = getattr(plots, name)({"runs": runs})
        axes = [ax for ax in figure.axes if ax.has_data() or ax.images]
        assert axes and all(ax.get_xlabel() or ax.get_ylabel() or ax.images for ax in axes)
    gains = plots.against_none(runs, {"runs": runs}, "code")
    assert [run["gain"] for run in gains if run["name"] == "none"] == [0, 0]
    assert gains[-1]["gain"] == runs[-1]["valid"]["code"] - runs[6]["valid"]["code"]  # of its own seed
    mean, error = plots.mean_and_error(runs[:1] + runs[6:7], "valid_mean")
    both = [runs[0]["valid_mean"], runs[6]["valid_mean"]]
    assert mean == pytest.approx(sum(both) / 2) and error == pytest.approx(abs(both[0] - both[1]) / 2)


def test_the_figures_know_the_experiments_gamma():
    speeds = [c for c, *_ in plan.SWEEP["bias"]]
    assert plan.GAMMA in speeds and plots.GAMMA in speeds


def test_specialisation_index():
    even, split = [[1, 1]], {"code": [[2, 0]], "prose": [[0, 2]], "tables": [[1, 1]]}
    assert plots.specialisation_index({"load": dict.fromkeys(KINDS, even)}) == 0
    assert plots.specialisation_index({"load": split}) == pytest.approx((2 / 3) ** 0.5)


def test_runs_without_the_packages_of_the_course(tmp_path):
    """The machine with the GPU may lack them: the module imports and refuses bad settings without tyro and matplotlib."""
    hide = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'tqdm', 'matplotlib', 'transformers', 'nbval']))"
    code = f"{hide}; from minids.experiments import balance; sys.argv[1:] = ['--seeds', '0']; balance.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2 and "seeds = 0: must be at least 1" in result.stderr, result.stderr


def test_device_is_checked():
    if torch.cuda.is_available():
        assert BalanceConfig(device="cuda").device == "cuda"
    else:
        with pytest.raises(ValueError, match="device = 'cuda'"):
            BalanceConfig(device="cuda")


def test_only_some_strategies():
    jobs = balance.jobs_of(balance.BalanceConfig(only="none; capacity, by score", seeds=2))
    assert [(job.name, job.seed) for job in jobs] == [
        ("none", 0), ("capacity, by score", 0), ("none", 1), ("capacity, by score", 1)]
    with pytest.raises(ValueError, match="only = 'nothing': nothing unknown, allowed are none; bias"):
        balance.BalanceConfig(only="nothing")
