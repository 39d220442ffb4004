"""The RL loop: what an update does, what it leaves alone, and its switches, on a policy that learns in seconds."""

import copy
import math
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch

from minids.rl.answers import ask, replace_groups
from minids.rl.grpo import GRPOConfig, informative
from minids.rl.policy import new_policy, tiny_config
from minids.rl.rewards import Total
from minids.rl.supervised import SupervisedConfig, fit
from minids.rl.tasks import Problem, Sums, character_tokenizer
from minids.rl.zero import Zero, ZeroConfig

TOKENIZER = character_tokenizer()
SMALL = ZeroConfig(steps=2, questions=3, group=4, max_new_tokens=16)


@pytest.fixture(scope="module")
def trained():
    model = new_policy(tiny_config(TOKENIZER), seed=0)
    fit(model, TOKENIZER, Sums().document, SupervisedConfig(steps=80, tokens=512))
    return model


@dataclass(frozen=True)
class Digits:
    """Say nine: reward is the share of 9 in the answer. A task that a policy finds in a few steps."""

    levels: tuple[int, ...] = (1, 2)

    def draw(self, random, held_out=False, levels=None):
        level = random.choice(levels or self.levels)
        return Problem("1:" * level, "9", level=level)

    def rewards(self):
        return {"accuracy": (lambda problem, text: text.count("9") / max(len(text), 1), 1.0)}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_policy_learns(trained):
    zero = Zero(copy.deepcopy(trained), TOKENIZER, Digits(), replace(SMALL, steps=25, questions=4, group=8, lr=2e-3))
    records = zero.run()
    rewards = [record["reward"] for record in records]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
    assert [record["step"] for record in records] == list(range(1, 26))


def test_an_answer_that_ends_with_its_last_token_was_not_cut_off(trained):
    batch = ask(trained, TOKENIZER, [Problem("1:", "9")], Total(Digits().rewards()), group=3, max_new_tokens=2)
    eos = TOKENIZER.eos_id
    batch.rollout.answers[:] = [[eos], [5, eos], [5, 6]]
    assert batch.eos_id == eos and batch.summary(2)["cut_off"] == pytest.approx(1 / 3)


def test_equal_rewards_change_nothing(trained):
    class Constant(Digits):
        def rewards(self):
            return {"accuracy": (lambda problem, text: 0.7, 1.0)}

    zero = Zero(copy.deepcopy(trained), TOKENIZER, Constant(), SMALL)
    before = weights(zero.model)
    record = zero.step()
    assert record["no_variance"] == 1.0 and record["grad_norm"] == 0.0 and math.isfinite(record["reward"])
    assert all(torch.equal(before[name], now) for name, now in zero.model.state_dict().items())


def test_first_mini_batch_is_on_policy_and_the_next_are_not(trained):
    one = Zero(copy.deepcopy(trained), TOKENIZER, Digits(), SMALL)
    assert one.step()["ratio_max"] == 1.0
    four = Zero(copy.deepcopy(trained), TOKENIZER, Digits(), replace(SMALL, mini_batches=4, lr=1e-2))
    record = four.step()
    assert record["ratio_max"] > 1.05
    with pytest.raises(ValueError, match="mini_batches = 13"):
        replace(SMALL, mini_batches=13)


@pytest.mark.parametrize("mini_batches", [3, 5, 12])
def test_a_rollout_makes_as_many_updates_as_asked_and_uses_each_answer_once(trained, mini_batches):
    """12 answers in 5 parts: of sizes 3, 3, 2, 2, 2, where ``chunk`` would make four parts."""
    zero, moved, seen = Zero(copy.deepcopy(trained), TOKENIZER, Digits(), replace(SMALL, mini_batches=mini_batches)), [], []
    step, count = zero.optimizer.step, zero.denominators
    zero.optimizer.step = lambda lr: moved.append(lr) or step(lr)
    zero.denominators = lambda mask_BT: seen.append(len(mask_BT)) or count(mask_BT)
    zero.step()
    assert len(moved) == len(seen) == mini_batches and sum(seen) == 12 and max(seen) - min(seen) <= 1


def test_micro_batches_do_not_change_the_update(trained):
    models = []
    for micro in (12, 5):
        zero = Zero(copy.deepcopy(trained).double(), TOKENIZER, Digits(), replace(SMALL, micro_batch=micro))
        zero.step()
        models.append(zero.model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-6, atol=1e-8, msg=name)


def test_bias_is_frozen_unless_asked(trained):
    for gamma in (0.0, 0.25):
        zero = Zero(copy.deepcopy(trained), TOKENIZER, Digits(), replace(SMALL, gamma=gamma))
        before = [gate.e_score_correction_bias.clone() for gate in zero.model.routers()]
        zero.step()
        steps = {round(float(step), 6) for gate, old in zip(zero.model.routers(), before, strict=True)
                 for step in (gate.e_score_correction_bias - old).abs()}  # fmt: skip
        assert steps <= {0.0, gamma} and (gamma == 0.0 or gamma in steps)


def test_replay_uses_the_experts_of_the_rollout(trained):
    """After the first of two updates has thrown the gates about, the second sees the old choice with replay only."""
    seen = {}
    for replay in (False, True):
        zero = Zero(copy.deepcopy(trained), TOKENIZER, Digits(), replace(SMALL, mini_batches=2, routing_replay=replay))
        found = zero.sample().rollout
        chosen = zero.chosen_experts(found)
        calls = []
        for layer, gate in enumerate(zero.model.routers()):
            gate.register_forward_hook(lambda g, i, out, layer=layer, calls=calls: calls.append((layer, out)))
        advantages = torch.linspace(-1, 1, 12)
        original = zero.optimizer.step

        def throw_about(lr, original=original, zero=zero):
            moved = original(lr)
            with torch.no_grad():
                for gate in zero.model.routers():
                    gate.weight.neg_()
            return moved

        zero.optimizer.step = throw_about
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        zero.generator = torch.Generator().manual_seed(0)
        calls.clear()
        zero.update(found, advantages)
        used = [out for layer, out in calls if layer == 0][-1].indices.sort(-1).values
        wanted = chosen[0][order.chunk(2)[1]].flatten(0, 1).sort(-1).values
        seen[replay] = float((used == wanted).float().mean())
        assert all(gate.assign is None for gate in zero.model.routers())
    assert seen[True] == 1.0 and seen[False] < 0.9


def test_reference_is_replaced_every_n_steps(trained):
    config = replace(SMALL, steps=5, reference_every=2, objective=GRPOConfig(beta=0.1))
    zero, kls = Zero(copy.deepcopy(trained), TOKENIZER, Digits(), config), []
    for _ in range(5):
        kls.append(zero.step()["kl"])
    assert [abs(kl) < 1e-9 for kl in kls] == [True, False, True, False, True]  # reference = policy after steps 0, 2, 4


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach(trained):
    class Rare(Digits):
        """Half of the questions teach nothing."""

        def rewards(self):
            return {"accuracy": (lambda problem, text: 0.0 if problem.level == 1 else text.count("1") / 16, 1.0)}

    config = replace(SMALL, questions=8)
    plain = Zero(copy.deepcopy(trained), TOKENIZER, Rare(), config).sample()
    zero = Zero(copy.deepcopy(trained), TOKENIZER, Rare(), replace(config, dynamic_sampling=True))
    batch = zero.sample()
    assert informative(batch.rewards_QG).sum() > informative(plain.rewards_QG).sum()
    for q, problem in enumerate(batch.problems):  # every part of a replaced group is the new one's
        for g in range(4):
            row = q * 4 + g
            assert zero.total(problem, batch.texts[row])[0] == batch.rewards_QG[q, g]
            prompt = [0, *TOKENIZER.encode(problem.prompt)]
            assert batch.rollout.tokens_BT[row, : len(prompt)].tolist() == prompt
            assert batch.rollout.tokens_BT[row, 1:][batch.rollout.mask_BT[row]].tolist() == batch.rollout.answers[row]


def test_groups_of_another_width_fit(trained):
    task, total = Sums(), Total(Digits().rewards())
    generator = torch.Generator().manual_seed(0)
    wide = ask(trained, TOKENIZER, [task.problem([1] * 9), task.problem([2] * 9)], total, group=2, max_new_tokens=8,
               generator=generator)
    narrow = ask(trained, TOKENIZER, [task.problem([3, 3])], total, group=2, max_new_tokens=2, generator=generator)
    for old, new in ((wide, narrow), (narrow, wide)):
        keep = torch.tensor([i > 0 for i in range(len(old.problems))])
        merged = replace_groups(old, keep, new)
        assert merged.texts[:2] == new.texts[:2] and merged.texts[2:] == old.texts[2:]
        assert merged.problems[0] == new.problems[0] and old.problems[0] != new.problems[0]


def test_curriculum_asks_for_what_is_open(trained):
    zero = Zero(copy.deepcopy(trained), TOKENIZER, Sums(), replace(SMALL, curriculum=True))
    assert {zero.draw(zero.random).level for _ in range(10)} == {3}
    zero.curriculum.open = 4
    assert {zero.draw(zero.random).level for _ in range(60)} == {3, 4, 5, 6}


def test_a_reward_that_fails_does_not_stop_training(trained):
    class Broken(Digits):
        def rewards(self):
            return {"accuracy": (lambda problem, text: 1 / 0, 1.0), "length": (lambda p, text: float(len(text)), 1.0)}

    record = Zero(copy.deepcopy(trained), TOKENIZER, Broken(), SMALL).step()
    assert record["faults"] == 12 and record["accuracy"] == 0.0 and record["reward"] > 0


def test_held_out_problems_are_never_trained_on(trained):
    from minids.rl.tasks import is_held_out

    zero = Zero(copy.deepcopy(trained), TOKENIZER, Sums(), SMALL)
    for _ in range(300):
        assert not is_held_out("+".join(sorted(zero.draw(zero.random).prompt[:-1].split("+"))))
    assert Sums().draw(Random(0), held_out=True)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"group": 1}, {"temperature": 0.0}, {"lr": math.nan}, {"questions": 0},
                                 {"reference_every": 0}])  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ZeroConfig(**bad)
