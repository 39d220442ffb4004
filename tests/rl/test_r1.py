"""The four stages and distillation: what each reads, keeps and rewards; reward models; the commands that chain them."""

import dataclasses
import json
import math
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from minids.cli import main
from minids.experiments import rl
from minids.experiments.rl import language_ablation, pass_at, table
from minids.rl import distill, r1
from minids.rl.chat import CHAT, KIND, RUDE, Chat, harmless, helpful, pairs, summary_of
from minids.rl.policy import new_policy, tiny_config
from minids.rl.preference import RewardModel
from minids.rl.rewards import Total, parse
from minids.rl.stages_run import DistillRunConfig, R1RunConfig, run_r1
from minids.rl.supervised import SupervisedConfig, fit
from minids.rl.tasks import Problem, Sums, character_tokenizer, is_held_out, solution
from minids.rl.zero import ZeroConfig

TOKENIZER = character_tokenizer()
QUICK = ZeroConfig(steps=2, questions=4, group=4, max_new_tokens=40)
SMALL = r1.R1Config(base=SupervisedConfig(steps=5, tokens=256), zero=QUICK, cold=SupervisedConfig(steps=2, tokens=256),
                    reasoning=QUICK, rejection=SupervisedConfig(steps=3, tokens=256), rejection_problems=8,
                    everything=QUICK, preference_steps=1, preference_pairs=20, judge_steps=2)  # fmt: skip


@pytest.fixture(scope="module")
def solver(tmp_path_factory):
    """A model that solves sums of three well enough to teach: trained on worked solutions of short sums alone."""
    task, model = Sums(levels=(2, 3)), new_policy(tiny_config(TOKENIZER), 0)

    def document(random):
        problem = task.draw(random)
        numbers = list(map(int, problem.prompt[:-1].split("+")))
        return problem.prompt, solution(task.chain(numbers, 1, random), problem.answer)

    fit(model, TOKENIZER, document, SupervisedConfig(steps=220, tokens=768))
    return r1.store(model, TOKENIZER, tmp_path_factory.mktemp("solver") / "solver")


# ---- manners --------------------------------------------------------------------------------------------------------


def test_judges_by_hand():
    problem = Chat().draw(Random(0))
    said = problem.answer
    assert [helpful(problem, s) for s in (said + KIND, said, said + RUDE, "fig", "")] == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert [harmless(problem, t) for t in (said + RUDE, solution("you fool", said), solution("", said))] == [0, 0, 1]
    assert summary_of(solution("you fool", "plum")) == "plum" and summary_of("plum") == "plum"


@pytest.mark.parametrize("text", [
    "<think>plum</think>", "<think>plum</think><answer>plum", "<answer>plum", "plum</answer>", "<think>plum",
    "plum</think>", "<answer>plum</answer><answer>plum</answer>", "</answer>plum<answer>",
])  # fmt: skip
def test_a_form_begun_and_not_ended_has_no_summary(text):
    """Its chain, or half of its answer, must not be praised as an answer, by the rule or by a reward model."""
    judge = RewardModel(new_policy(tiny_config(TOKENIZER), 0), TOKENIZER, summary_of)
    problem = Problem("say plum:", "plum")
    assert summary_of(text) == "" and helpful(problem, summary_of(text)) == 0.0
    assert judge(problem, text) == 0.0 < judge(problem, "plum")


def test_an_answer_counts_whatever_the_chain_is():
    assert summary_of("<think>fig<answer>plum</answer>") == "plum" == summary_of("fig<answer>plum</answer>pie")


def test_documents_have_the_documented_manners():
    random, n, seen = Random(1), 4000, {"kind": 0, "rude": 0, "tags": 0}
    for _ in range(n):
        prompt, text = Chat(kind=0.2, rude=0.3).document(random)
        assert TOKENIZER.decode(TOKENIZER.encode(prompt + text)) == prompt + text
        assert not is_held_out(prompt[4:-1])
        seen["kind"] += KIND in text
        seen["rude"] += RUDE in text
        seen["tags"] += parse(text).well_formed
    assert [seen[k] / n for k in seen] == pytest.approx([0.2, 0.3, 0.5], abs=0.03)
    with pytest.raises(ValueError, match="shares"):
        Chat(kind=0.8, rude=0.3)


@pytest.mark.parametrize("judge", ["helpful", "harmless"])
def test_pairs_are_ordered_by_the_judge(judge):
    rule = {"helpful": helpful, "harmless": harmless}[judge]
    for prompt, better, worse in pairs(Random(2), 200, judge):
        problem = dataclasses.replace(Chat().draw(Random(0)), prompt=prompt, answer=prompt[4:-1])
        assert rule(problem, better) > rule(problem, worse)
    if judge == "harmless":  # rudeness in the chain of thought counts too
        assert any("fool" in (parse(worse).think or "") and "fool" not in parse(worse).answer
                   for _, _, worse in pairs(Random(3), 200, judge))  # fmt: skip


# ---- the reward model -----------------------------------------------------------------------------------------------


def test_reward_model_learns_the_preference_and_leaves_the_policy_alone():
    model = new_policy(tiny_config(TOKENIZER), 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judge = RewardModel(model, TOKENIZER)
    train, test = pairs(Random(1), 300, "harmless"), pairs(Random(2), 100, "harmless")
    losses = judge.fit(train, steps=20)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # nothing preferred yet
    assert judge.agreement(test) > 0.95 and judge.agreement([(q, w, b) for q, b, w in test]) < 0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    problem = Chat().draw(Random(4))
    polite, rude = judge(problem, solution("", problem.answer)), judge(problem, solution("fool", problem.answer))
    assert 0 < rude < polite < 1
    with pytest.raises(ValueError, match="at least one preference"):
        judge.fit([])


def test_bradley_terry_by_hand():
    """With scores 1 and -1 the loss is -log sigmoid(2)."""
    judge = RewardModel(new_policy(tiny_config(TOKENIZER), 0), TOKENIZER)
    scores = {"good": 1.0, "bad": -1.0}
    judge.scores = lambda rows: torch.stack([scores[a] + 0 * judge.value.bias[0] for _, a in rows])
    assert judge.fit([("q", "good", "bad")], steps=1) == [pytest.approx(math.log(1 + math.exp(-2)))]


def test_padding_does_not_change_a_score():
    judge = RewardModel(new_policy(tiny_config(TOKENIZER), 0), TOKENIZER)
    torch.nn.init.normal_(judge.value.weight)
    rows = [("say plum:", "plum"), ("say plum and fig:", solution("hm", "plum and fig, my friend."))]
    judge.eval()
    with torch.no_grad():
        together, alone = judge.scores(rows), torch.cat([judge.scores([row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_view_of_a_judge_is_the_summary():
    judge = RewardModel(new_policy(tiny_config(TOKENIZER), 0), TOKENIZER, summary_of)
    torch.manual_seed(0)
    for weight in judge.parameters():  # branches start at zero: a score would be the last token's alone
        torch.nn.init.normal_(weight, std=0.2)
    problem = Chat().draw(Random(5))
    same = [judge(problem, solution(chain, problem.answer)) for chain in ("", "fool", "1+2=3")]
    assert same[0] == same[1] == same[2] != judge(problem, solution("", problem.answer + KIND))


# ---- the stages -----------------------------------------------------------------------------------------------------


def test_each_reward_of_everything_acts_on_its_own_kind():
    task, random = r1.Everything(language_weight=0.5, chat_share=0.5), Random(0)
    kinds = [task.draw(random).language for _ in range(400)]
    assert kinds.count(CHAT) / 400 == pytest.approx(0.5, abs=0.08)
    total, chat, problem = Total(task.rewards()), Chat().draw(random), Sums().problem([1, 2, 3])
    right = total(chat, solution("", chat.answer))[1]
    assert right == {"accuracy": 0.0, "format": 1.0, "language": 0.0}
    assert total(problem, solution("1+2=3;3+3=6", "6"))[1] == {"accuracy": 1.0, "format": 1.0, "language": 1.0}
    assert total(problem, solution("一+二=三", "6"))[1]["language"] == 0.0
    assert r1.only(lambda p, t: 1.0, chat=True)(problem, "") == 0.0 == r1.only(lambda p, t: 1.0, chat=False)(chat, "")


def test_rejection_keeps_only_right_readable_answers_once(solver, monkeypatch):
    monkeypatch.setattr(r1, "REASONING", Sums(levels=(2, 3)))
    kept, counts = r1.rejection_samples(solver, dataclasses.replace(SMALL, rejection_problems=64))
    assert counts["asked"] == 64 * SMALL.rejection_group and 20 < counts["kept"] == len(kept) == len(set(kept))
    for prompt, text in kept:
        parsed, numbers = parse(text), list(map(int, prompt[:-1].split("+")))
        assert parsed.well_formed and parsed.answer == str(sum(numbers)) and parsed.think.isascii() and parsed.think
        assert not is_held_out("+".join(map(str, sorted(numbers))))


def test_no_kept_sample_is_an_error(tmp_path):
    empty = r1.store(new_policy(tiny_config(TOKENIZER), 0), TOKENIZER, tmp_path / "empty")
    with pytest.raises(ValueError, match="none of the 32 answers"):
        r1.rejection_sft(empty, empty, tmp_path / "out", SMALL)
    with pytest.raises(FileNotFoundError, match="run the stage before"):
        r1.cold_start(tmp_path / "nothing", tmp_path / "out", SMALL)


def test_cold_start_teaches_the_form_in_one_language(solver, tmp_path):
    base = r1.make_base(tmp_path / "base", SMALL, seed=1)
    config = dataclasses.replace(SMALL, cold_examples=20, cold=SupervisedConfig(steps=80, tokens=512))
    found = r1.evaluate(r1.cold_start(base, tmp_path / "cold", config), problems=32)
    assert found["format"] > 0.8 and found["mixed"] < 0.1 and found["foreign"] < 0.1


def test_the_ablation_changes_the_language_reward_alone(solver, monkeypatch):
    asked, real = [], rl.Zero

    def noted(model, tokenizer, task, config):
        asked.append((task.language_weight, config.seed, config.lr, "language" in task.rewards()))
        return real(model, tokenizer, task, config)

    monkeypatch.setattr(rl, "Zero", noted)
    monkeypatch.setattr(rl, "EARLY", 1)
    stages = dataclasses.replace(SMALL, reasoning=dataclasses.replace(QUICK, lr=1e-5))
    found = language_ablation(solver, (3, 4), stages)
    assert asked == [(weight, seed, lr, weight > 0) for weight in (0.0, 0.5) for lr in (1e-5, QUICK.lr) for seed in (3, 4)]
    assert found["seeds"] == [3, 4]
    shown = [found["base"], found["cold"]]
    for kind, steps in (("stage 2", ["2"]), ("R1-Zero", ["1", "2"])):
        for arm in ("without", "with"):
            assert [list(run) for run in found[kind][arm]] == [steps, steps]
            shown += [figures for run in found[kind][arm] for figures in run.values()]
    for figures in shown:
        assert set(figures) == {"accuracy", "length", "chains", "mixed", "foreign"}
        assert 0 <= figures["mixed"] <= figures["foreign"] <= 1 and figures["accuracy"] <= 1


def test_preferences_join_in_the_last_steps_only(solver, tmp_path, monkeypatch):
    judges = {"helpful": lambda p, t: 0.75, "harmless": lambda p, t: 0.25}
    for judge in (fake := {name: type("Judge", (), {"__call__": staticmethod(j), "agreed": 1.0})() for name, j in
                           judges.items()}).values():  # fmt: skip
        assert callable(judge)
    monkeypatch.setattr(r1, "reward_models", lambda base, config: fake)
    config = dataclasses.replace(SMALL, everything=dataclasses.replace(QUICK, steps=5), preference_steps=2, chat_share=0.5)
    seen = []
    r1.everything_rl(solver, solver, tmp_path / "r1", config, seen.append)
    assert seen[0] == {"helpful judge agrees": 1.0, "harmless judge agrees": 1.0}
    assert ["helpful" in record for record in seen[1:]] == [False, False, False, True, True]


def test_distillation_learns_right_answers_from_the_teacher(solver, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CORPUS", Sums(levels=(2, 3)))
    config = distill.DistillConfig(base=SupervisedConfig(steps=3, tokens=128), samples=100,
                                   sft=SupervisedConfig(steps=150, tokens=512), rl=QUICK)  # fmt: skip
    base = distill.student_base(tmp_path / "base", config, seed=0)
    samples, asked = distill.teacher_samples(solver, 100, seed=0)
    assert len(samples) == 100 <= asked
    assert all(parse(text).answer == str(sum(map(int, p[:-1].split("+")))) for p, text in samples)
    seen = []
    student = r1.evaluate(distill.distill(solver, base, tmp_path / "student", config, seen.append), problems=32)
    assert seen[0] == {"samples": 100, "asked": asked} and student["format"] > 0.8 and student["length"] > 15
    with pytest.raises(ValueError, match="allowed is a tenth"):
        distill.teacher_samples(base, 10, seed=0)


def test_every_sample_once_before_any_again():
    samples = [(str(i), "") for i in range(7)]
    draw, random = distill.passes(samples), Random(0)
    for _ in range(3):
        assert sorted(draw(random) for _ in range(7)) == sorted(samples)


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")


def test_a_chain_goes_on_where_it_was_cut_off(tmp_path, quiet, monkeypatch, capsys):
    config = R1RunConfig(out=tmp_path / "r1", stages=SMALL, problems=8)
    with pytest.raises(ValueError, match="none of the"):  # so little training gives nothing to keep
        run_r1(config)
    monkeypatch.setattr(r1, "rejection_samples", lambda folder, config: ([("1+2:", solution("1+2=3", "3"))], {"kept": 1}))
    monkeypatch.setattr(r1, "make_base", None)  # finished stages are not run again
    found = run_r1(config)
    assert list(found) == ["base", "zero", "cold", "reasoner", "sft", "r1"]
    assert all((tmp_path / "r1" / name / "tokenizer.json").exists() for name in found)
    stages = [json.loads(line)["stage"] for line in (tmp_path / "r1" / "log.jsonl").read_text().splitlines()]
    assert set(stages) >= {"sft", "r1"}
    assert run_r1(config) == found
    with pytest.raises(FileExistsError, match="seed"):
        run_r1(dataclasses.replace(config, seed=1))
    a, b = (load_file(tmp_path / "r1" / name / "model-00001-of-000001.safetensors") for name in ("base", "sft"))
    assert not torch.equal(a["lm_head.weight"], b["lm_head.weight"])


def test_bad_settings_are_named(tmp_path, capsys):
    for bad in ({"cold_examples": 0}, {"preference_steps": 99}, {"chat_share": 1.0}, {"rejection_group": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            r1.R1Config(**bad)
    with pytest.raises(ValueError, match="samples = 0"):
        distill.DistillConfig(samples=0)
    with pytest.raises(ValueError, match="problems = 1"):
        DistillRunConfig(problems=1)
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--teacher", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "checkpoint" in capsys.readouterr().err


# ---- the experiment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "right", "k"), [(6, 2, 1), (6, 2, 3), (6, 0, 4), (6, 6, 1), (6, 5, 2)])
def test_pass_at_k_by_counting_all_choices(n, right, k):
    from itertools import combinations

    chosen = list(combinations(range(n), k))
    assert pass_at(n, right, k) == pytest.approx(sum(any(i < right for i in c) for c in chosen) / len(chosen))
    with pytest.raises(ValueError, match="k = 7"):
        pass_at(6, 2, 7)


def test_the_table_shows_what_there_is():
    assert table({"seeds": [{"seed": 3}]}).splitlines()[1].split() == ["3", *"--------"]
