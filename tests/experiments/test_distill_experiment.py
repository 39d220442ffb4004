"""What notebook 14 draws: work is counted on the tokens that are there, sets of samples are what their names say."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minids.experiments import distill as experiment
from minids.experiments.distill import DistillExperimentConfig
from minids.rl.distill import CORPUS, STUDENT, DistillConfig, teacher_samples
from minids.rl.policy import new_policy, tiny_config
from minids.rl.supervised import SupervisedConfig, collate, encode
from minids.rl.tasks import character_tokenizer, solution
from minids.rl.zero import ZeroConfig

TEACHER = Path(__file__).parents[2] / "figures" / "rl" / "teacher"


@pytest.fixture(scope="module")
def tok():
    return character_tokenizer()


@pytest.fixture(scope="module")
def student(tok):
    return new_policy(tiny_config(tok, **STUDENT), 0)


def test_flops_are_those_that_torch_counts(student):
    """Products alone, and attention to all pairs instead of half of them: within a tenth at this length."""
    with FlopCounterMode(display=False) as counter:
        student(torch.randint(3, 60, (8, 42)), mtp=False)
    ratio = counter.get_total_flops() / experiment.forward_flops(student.cfg, [42] * 8)
    assert 0.9 < ratio < 1.1


def test_sft_counts_three_passes_over_each_document_and_no_padding(student, tok, monkeypatch):
    samples = [("1+2+3:", "6"), ("1+2+3:", solution("1+2=3;3+3=6", "6"))]
    lengths = [1 + len(tok.encode(p)) + len(tok.encode(text)) for p, text in samples]
    alone = [3 * experiment.forward_flops(student.cfg, [n]) for n in lengths]
    one_by_one = SupervisedConfig(steps=16, tokens=1)  # a batch is full with its first document
    steps = experiment.sft_flops(student.cfg, tok, samples, one_by_one)
    found = [b - a for a, b in zip([0.0, *steps], steps, strict=False)]
    assert {round(x) for x in found} == {round(x) for x in alone}
    monkeypatch.setattr(experiment, "batches", lambda *_: iter([collate(encode(samples, tok))]))
    assert experiment.sft_flops(student.cfg, tok, samples, SupervisedConfig(steps=1)) == [sum(alone)]


def test_rl_counts_four_passes_over_each_answer(student, tok):
    zero = experiment.Counted(student, tok, CORPUS, ZeroConfig(steps=1, questions=2, group=3, max_new_tokens=5))
    random = Random(0)
    problems = [CORPUS.draw(random) for _ in range(2)]
    batch = zero.answer(problems)
    lengths = [len(tok.encode(problems[i // 3].prompt)) + len(a) for i, a in enumerate(batch.rollout.answers)]
    assert zero.flops == pytest.approx(4 * experiment.forward_flops(student.cfg, lengths))


def test_samples_are_what_they_are_called():
    good, given, seconds = experiment.sampled(TEACHER, 40, seed=3, temperature=1.8)
    assert len(given) == 256 and [pair for pair in given if experiment.is_good(*pair)][:40] == good and seconds > 0
    assert 0 < sum(experiment.is_good(*pair) for pair in given) < 256
    for operands, signs in ((0, 0), (3, None), (1, None)):
        for (prompt, text), (same, _) in zip(experiment.reworked(good, operands), good, strict=True):
            assert prompt == same and experiment.is_good(prompt, text)
            steps = text.count("=")
            assert steps == (0 if not operands else -(-prompt.count("+") // operands)) and (signs is None or not steps)
    assert not experiment.is_good("1+2+3:", solution("", "7")) and not experiment.is_good("1+2+3:", "6")


def test_without_rejection_every_answer_is_kept():
    given, asked = teacher_samples(TEACHER, 300, 0, rejection=False)
    assert len(given) == 300 and asked == 512
    with pytest.raises(ValueError, match="temperature = 0.0: must be finite and above 0"):
        DistillConfig(temperature=0.0)


def test_a_run_writes_each_seed_once(tmp_path, capsys):
    tiny = DistillConfig(base=SupervisedConfig(steps=2, tokens=64), samples=40, sft=SupervisedConfig(steps=2, tokens=64),
                         rl=ZeroConfig(steps=1, questions=2, group=2, max_new_tokens=8))  # fmt: skip
    config = DistillExperimentConfig(out=tmp_path, seeds=(0, 1), teacher=TEACHER, stages=tiny, data_seeds=(1,),
                                     after_steps=1, fewer=(5,), eval_every=1)  # fmt: skip
    first = experiment.run(config)
    path = tmp_path / "distill0.json"
    stamp = path.stat().st_mtime_ns
    assert experiment.run(config) == first and path.stat().st_mtime_ns == stamp
    zero, one = (json.loads((tmp_path / f"distill{seed}.json").read_text()) for seed in (0, 1))
    assert "data" not in zero and set(one["data"]) == {"all", "hot", "hot all", "bare", "coarse", "scratch", "5"}
    assert one["data"]["hot"]["good"] == 1.0 > one["data"]["hot all"]["good"]
    assert zero["distilled"]["flops"] > zero["sampling_flops"] > 0
    assert zero["after"]["curve"][0][1] == zero["distilled"]["flops"] < zero["after"]["flops"]
    assert [point[0] for point in zero["rl"]["curve"]] == [0, 1]
    assert len(capsys.readouterr().out.splitlines()) == 2 * 3


@pytest.mark.parametrize("given, said", [
    (dict(seeds=()), "seeds = "),
    (dict(fewer=(5500,)), "to below stages.samples, 5500"),
    (dict(eval_every=0), "eval_every = 0"),
])  # fmt: skip
def test_bad_settings_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        DistillExperimentConfig(**given)
