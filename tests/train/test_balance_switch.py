"""Balancing strategies as a setting of a training run."""

import json

import pytest
import torch

from minids.model.auxiliary import SwitchLoss
from minids.train.metrics import read_metrics
from minids.train.trainer import Trainer, train


def first_steps(config, count=3):
    trainer = Trainer.start(config)
    records = [trainer.step() for _ in range(count)]
    trainer.log.close()
    return trainer, records


def biases(trainer):
    return torch.stack([gate.e_score_correction_bias for gate in trainer.model.routers()])


def test_default_is_what_v3_does(tiny, tmp_path):
    plain, records = first_steps(tiny())
    named, same = first_steps(tiny(out=tmp_path / "named", balance=("bias", "sequence")))
    assert [r["loss"] for r in records] == [r["loss"] for r in same]
    assert torch.equal(biases(plain), biases(named)) and biases(plain).abs().max() > 0
    assert records[0]["balance_loss"] > 0


def test_no_balancing_at_all(tiny):
    trainer, records = first_steps(tiny(balance=()))
    assert biases(trainer).abs().max() == 0 and [r["balance_loss"] for r in records] == [0.0] * 3


def test_a_loss_acts_and_the_recipe_sets_the_biases_speed(tiny, tmp_path):
    trainer, records = first_steps(tiny(balance=("switch:alpha=0.5", "bias"), recipe={"gamma": 0.25}))
    assert isinstance(trainer.balancer.strategies[0], SwitchLoss) and records[0]["balance_loss"] > 0.5
    assert set((biases(trainer) / 0.25).flatten().tolist()) <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert biases(trainer).abs().max() >= 0.25


def test_refused_before_anything_is_read(tiny):
    with pytest.raises(ValueError, match="'bias' does not fit: topk_method='greedy'"):
        tiny(balance=("bias",), model=("topk_method=greedy",))
    with pytest.raises(ValueError, match="expert_choice' does not fit: topk_group=2 of n_group=4"):
        tiny(balance=("expert_choice",))


def test_a_router_without_bias_trains_by_default(tiny):
    _, records = first_steps(tiny(model=("topk_method=greedy",)))
    assert records[0]["balance_loss"] > 0 and "bias_spread" not in records[0]


def test_statistics_are_in_the_metrics(tiny, tmp_path):
    train(tiny(balance=("capacity:factor=0.75",)))
    lines = read_metrics(tmp_path / "run")
    for line in lines:
        experts = line["experts_per_token"]
        assert 0.2 < line["dropped_share"] < 1 and experts == pytest.approx(2 * (1 - line["dropped_share"]))
        assert experts / 2 <= line["nodes_per_token"] <= experts  # two experts a node, two choices a token
        assert 0 < line["load_entropy"] <= 2.08 and 0 < line["token_entropy"] <= 2.08
    last = lines[-1]
    assert sum(last["valid_load"][0]) == 4 * 32 * 2  # evaluation drops nothing: rows, tokens, experts a token
    assert last["valid_max_violation_global"][0] == pytest.approx(max(last["valid_load"][0]) / 32 - 1)
    assert len(last["bias"]) == 2 and len(last["bias"][0]) == 8  # the MTP module's router too
    assert json.loads((tmp_path / "run" / "run.json").read_text())["balance"] == ["capacity:factor=0.75"]
