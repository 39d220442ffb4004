"""Rollouts: the recorded probabilities are the trainer's, and answers are samples of the model."""

import copy
import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

from minids.rl.policy import new_policy, tiny_config
from minids.rl.r1 import restore
from minids.rl.rollout import rollout, score
from minids.rl.supervised import SupervisedConfig, collate, encode, fit, real_loads
from minids.rl.tasks import Sums, character_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """A little trained, so that answers end and differ."""
    model = new_policy(tiny_config(tokenizer), seed=0)
    fit(model, tokenizer, Sums().document, SupervisedConfig(steps=60, tokens=512))
    return model


def prompts(tokenizer):
    return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("1+2+3:", "7+8+5+9+1+2:", "#4+4+4:")]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_probabilities_are_those_of_the_trainer(model, tokenizer, temperature):
    found = rollout(model, prompts(tokenizer), 16, 40, eos_id=tokenizer.eos_id, temperature=temperature,
                    generator=torch.Generator().manual_seed(1))
    assert len({len(answer) for answer in found.answers}) > 3  # rows ended at different times: the batch was compacted
    model.train()
    logp_BT, _ = score(model, found.tokens_BT, temperature)
    difference = (logp_BT.detach() - found.logp_BT).masked_fill(~found.mask_BT, 0.0)
    assert difference.abs().max() < 1e-5
    if temperature != 1.0:  # the trap: scored untempered, the ratio is far from 1
        untempered, _ = score(model, found.tokens_BT)
        assert (untempered.detach() - found.logp_BT)[found.mask_BT].abs().max() > 0.1


def test_what_is_left_of_the_difference_is_rounding():
    """A base that was trained to the end is steep: a rounding of a score becomes a larger one of a probability. Each side
    is within 1e-5 of the exact figure but for one token in a thousand at most; in float64 all tokens agree to the rounding
    of the float32 in which probabilities are recorded."""
    folder = Path(__file__).parents[2] / "figures" / "rl" / "base"
    model, tokenizer = restore(folder)
    exact, random, far, count = copy.deepcopy(model).double(), Random(1), 0, 0
    for seed in range(3):
        asked = [[tokenizer.bos_id, *tokenizer.encode(Sums().draw(random).prompt)] for _ in range(8)]
        settings = dict(eos_id=tokenizer.eos_id, generator=torch.Generator().manual_seed(seed))
        found = rollout(model, asked, 16, 64, **settings)
        sides = [found.logp_BT, *(score(side, found.tokens_BT)[0].detach() for side in (model, exact))]
        sides = [side[found.mask_BT] for side in sides]
        for side in sides[:2]:
            far, count = far + int(((side - sides[2]).abs() > 1e-5).sum()), count + side.numel()
        found = rollout(exact, asked, 16, 64, **settings)
        again = score(exact, found.tokens_BT)[0].detach()
        assert (again - found.logp_BT)[found.mask_BT].abs().max() < 2e-6
    assert count > 6000 and far <= count / 1000


def test_rows_hold_prompt_and_answer(model, tokenizer):
    asked = prompts(tokenizer)
    found = rollout(model, asked, 4, 12, eos_id=tokenizer.eos_id, generator=torch.Generator().manual_seed(2))
    for row, answer in enumerate(found.answers):
        prompt = asked[row // 4]
        assert found.tokens_BT[row, : len(prompt) + len(answer)].tolist() == prompt + answer
        assert found.tokens_BT[row, 1:][found.mask_BT[row]].tolist() == answer
        assert tokenizer.eos_id not in answer[:-1] and 1 <= len(answer) <= 12
        assert answer[-1] == tokenizer.eos_id or len(answer) == 12
        assert (found.logp_BT[row][~found.mask_BT[row]] == 0).all()
    assert 0 < found.entropy < math.log(tokenizer.vocab_size)


def test_first_tokens_are_drawn_from_the_model(model, tokenizer):
    """Chi-square of 4,000 first tokens against the model's own distribution."""
    prompt = prompts(tokenizer)[1]
    n = 4000
    found = rollout(model, [prompt], n, 1, eos_id=tokenizer.eos_id, generator=torch.Generator().manual_seed(3))
    probs = model(torch.tensor([prompt]), mtp=False).logits[0, -1].detach().double().softmax(-1)
    counts = Counter(answer[0] for answer in found.answers)
    common = [i for i in range(len(probs)) if probs[i] * n >= 5]
    rest = n - sum(counts[i] for i in common), n * (1 - float(probs[common].sum()))
    pairs = [(counts[i], n * float(probs[i])) for i in common] + ([rest] if rest[1] > 1 else [])
    chi = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    freedom = len(pairs) - 1
    assert freedom >= 3 and chi < freedom + 4 * math.sqrt(2 * freedom)


def test_a_seed_is_a_rollout(model, tokenizer):
    def again(seed):
        return rollout(model, prompts(tokenizer), 3, 20, eos_id=tokenizer.eos_id,
                       generator=torch.Generator().manual_seed(seed)).answers

    assert again(4) == again(4) != again(5)


@pytest.mark.parametrize(("change", "message"), [
    ({"group": 0}, "group = 0"), ({"prompts": []}, "0 prompts"), ({"temperature": 0.0}, "temperature = 0.0"),
    ({"temperature": math.inf}, "temperature = inf"), ({"prompts": [[]]}, "empty"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"prompts": [[0, 99999]]}, "99999"), ({"max_new_tokens": 1000}, "max_position_embeddings"),
])  # fmt: skip
def test_bad_input(model, tokenizer, change, message):
    settings = {"prompts": [[0, 5]], "group": 2, "max_new_tokens": 4, "eos_id": 1, "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        rollout(model, settings.pop("prompts"), settings.pop("group"), settings.pop("max_new_tokens"), **settings)


def test_examples_are_padded_on_the_right_and_only_answers_count(tokenizer):
    inputs, labels = collate(encode([("1+2:", "3"), ("#1+2+3:", "3;6")], tokenizer))
    text = tokenizer.encode
    assert inputs[0, :6].tolist() == [0, *text("1+2:3")] and labels[0].tolist()[4:6] == [*text("3"), 1]
    assert (labels[0, :4] == -100).all() and (labels[0, 6:] == -100).all()
    assert inputs[1].tolist() == [0, *text("#1+2+3:3;6")] and labels[1, 7:].tolist() == [*text("3;6"), 1]


def test_padding_is_not_counted_as_load(model, tokenizer):
    pairs = encode([("1+2:", "3"), ("1+2+3+4+5:", "<think>1+2=3</think>")], tokenizer)
    model.eval()
    together = collate(pairs)
    loads = real_loads(model(together[0], mtp=False).routing, *together)
    alone = 0
    for pair in pairs:
        tokens, labels = collate([pair])
        alone = alone + real_loads(model(tokens, mtp=False).routing, tokens, labels)
    assert torch.equal(loads, alone)
    real = sum(len(a) + len(b) - 1 for a, b in pairs)
    assert loads.sum(1).tolist() == [real * 2] * 2


def test_supervised_learning_lowers_the_loss_and_repeats(tokenizer):
    def run():
        model = new_policy(tiny_config(tokenizer), seed=1)
        return fit(model, tokenizer, Sums().document, SupervisedConfig(steps=20, tokens=256)), model

    (first, model), (second, again) = run(), run()
    assert first == second and sum(first[-5:]) < 0.6 * sum(first[:5])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert any(gate.e_score_correction_bias.abs().sum() > 0 for gate in model.routers())


@pytest.mark.parametrize("bad", [{"steps": 0}, {"tokens": 0}, {"lr": -1.0}, {"gamma": math.nan}])
def test_bad_supervised_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SupervisedConfig(**bad)
