"""`python -m minids rl`: the folder it leaves, a resume bit for bit, what it refuses, and two ranks as one."""

import copy
import dataclasses
import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from minids.checkpoint import load, save
from minids.cli import main
from minids.data.tokenizer import BytePairTokenizer
from minids.rl.grpo import GRPOConfig
from minids.rl.policy import new_policy, tiny_config
from minids.rl.ranks import Ranks
from minids.rl.run import RLConfig, run_rl
from minids.rl.supervised import SupervisedConfig, fit
from minids.rl.tasks import Sums, character_tokenizer
from minids.rl.zero import Zero, ZeroConfig

SMALL = ["--pretrain.steps", "10", "--pretrain.tokens", "256", "--zero.questions", "2", "--zero.group", "4",
         "--zero.max-new-tokens", "32", "--eval-problems", "8", "--eval-every", "2", "--save-every", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Trained enough to earn a reward now and then."""
    folder, tokenizer = tmp_path_factory.mktemp("base") / "base", character_tokenizer()
    model = new_policy(tiny_config(tokenizer), 0)
    fit(model, tokenizer, Sums().document, SupervisedConfig(steps=100, tokens=512))
    save(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setenv("CI", "1")


def rl(out, *more, steps=4):
    main(["rl", "--out", str(out), "--zero.steps", str(steps), *SMALL, *more])


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def no_time(record):
    return {name: value for name, value in record.items() if "seconds" not in name}


def test_a_run_leaves_a_readable_folder(tmp_path):
    rl(tmp_path / "run")
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in found if "held_out_accuracy" in record] == [0, 2, 4]
    watched = {"reward", "accuracy", "format", "length", "entropy", "no_variance", "grad_norm", "kl", "faults"}
    assert watched <= set(found[1])
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert samples.count("---") == 6 and samples.count("(right:") == 12
    model = load(tmp_path / "run" / "step-4")
    assert model.cfg.vocab_size == BytePairTokenizer.load(tmp_path / "run").vocab_size
    assert load(tmp_path / "run" / "base").cfg == model.cfg
    main(["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "1+2+3:", "--max-new-tokens", "5"])


@pytest.mark.parametrize("more", [(), ("--zero.objective.beta", "0.1", "--zero.reference-every", "3", "--zero.mini-batches",
                                       "2", "--zero.curriculum", "--zero.gamma", "0.01")])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, base, more, monkeypatch):
    more = (*more, "--base", str(base))
    rl(tmp_path / "whole", *more)
    kept = Zero.step

    def dies(zero):
        if zero.steps == 3:
            raise KeyboardInterrupt
        return kept(zero)

    monkeypatch.setattr(Zero, "step", dies)
    with pytest.raises(SystemExit, match="130"):  # what a shell gives for Ctrl-C
        rl(tmp_path / "cut", *more)
    monkeypatch.setattr(Zero, "step", kept)
    rl(tmp_path / "cut", *more, "--resume")
    for name in ("model-00001-of-000001.safetensors", "trainer.safetensors"):
        whole, cut = (load_file(tmp_path / run / "step-4" / name) for run in ("whole", "cut"))
        assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    started = load_file(base / "model-00001-of-000001.safetensors")
    assert any(not torch.equal(started[key], load(tmp_path / "cut" / "step-4").state_dict()[key]) for key in
               ("lm_head.weight", "model.embed_tokens.weight"))  # the run learned something
    whole, cut = (records(tmp_path / run) for run in ("whole", "cut"))
    assert [no_time(record) for record in whole] == [no_time(record) for record in cut]


def test_a_given_base_is_used_and_overwriting_clears_the_old_one(tmp_path, base):
    rl(tmp_path / "a", steps=1)
    rl(tmp_path / "b", "--base", str(base), steps=1)
    assert not (tmp_path / "b" / "base").exists()
    first = load(tmp_path / "a" / "base").lm_head.weight
    rl(tmp_path / "a", "--overwrite", "--seed", "1", steps=1)
    assert not torch.equal(first, load(tmp_path / "a" / "base").lm_head.weight)
    assert (tmp_path / "a" / "samples.txt").read_text().count("step 0") == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"task": "poetry"}, "task = 'poetry'"), ({"task": "x.jsonl"}, "needs --base"), ({"eval_problems": 0}, "eval_problems"),
    ({"save_every": 0}, "save_every"), ({"seed": -1}, "seed"),
])  # fmt: skip
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        RLConfig(**change)


def test_a_run_ends_with_where_its_answers_are_and_how_to_ask(base, tmp_path, capsys):
    rl(tmp_path / "run", "--base", str(base), steps=2)
    said = capsys.readouterr().out.splitlines()
    where, ask = (next(line for line in said if line.startswith(word)) for word in ("answers", "ask it"))
    assert os.path.exists(where.split()[1].rstrip(":"))
    _, words = ask.split("python -m minids ")
    main([word.strip("'") for word in words.split()])  # the line works as it stands
    assert capsys.readouterr().out.startswith(words.split()[-1].strip("'"))


def test_a_folder_with_a_run_is_not_written_over(tmp_path, capsys):
    rl(tmp_path / "run", steps=1)
    with pytest.raises(SystemExit) as stop:
        rl(tmp_path / "run", steps=1)
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rl(tmp_path / "run", "--resume", "--seed", "3", steps=1)
    assert "seed: the run has 0, now 3" in capsys.readouterr().err


def test_a_jsonl_task_trains_a_given_base(tmp_path, base):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}+{i}:", "answer": str(2 * i)}) for i in range(60)))
    rl(tmp_path / "run", "--task", str(path), "--base", str(base), steps=2)
    assert len(records(tmp_path / "run")) == 3


# ---- two ranks ------------------------------------------------------------------------------------------------------


def half(rank, world, port, zero, found, advantages, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    zero.ranks = Ranks.start("cpu")
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found.tokens_BT, found.mask_BT, found.logp_BT = found.tokens_BT[rows], found.mask_BT[rows], found.logp_BT[rows]
    stats = zero.update(found, advantages[rows])
    assert zero.ranks.share([0, 1, 2, 3]) == [[0, 2], [1, 3]][rank]
    assert zero.ranks.mean({"x": float(rank)}) == {"x": 0.5}
    results[rank] = (zero.ranks.mean(stats), {name: tensor.clone() for name, tensor in zero.model.state_dict().items()})
    zero.ranks.stop()


@pytest.mark.parametrize("length", ["answer", "token"])
def test_two_ranks_make_the_update_of_one(length):
    tokenizer = character_tokenizer()
    config = ZeroConfig(steps=1, questions=2, group=4, max_new_tokens=8, gamma=0.01,
                        objective=GRPOConfig(beta=0.05, length=length))  # fmt: skip
    zero = Zero(new_policy(tiny_config(tokenizer), 0).double(), tokenizer, Sums(), config)
    found = zero.sample().rollout
    advantages = torch.linspace(-1, 1, 8, dtype=torch.float64)
    alone = copy.deepcopy(zero)
    stats = alone.update(copy.deepcopy(found), advantages)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with mp.get_context("fork").Manager() as manager:
        results = manager.dict()
        mp.start_processes(half, (2, port, zero, found, advantages, results), nprocs=2, start_method="fork")
        results = dict(results)
    for figures, weights in results.values():
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
        for name in ("policy", "kl", "clipped", "grad_norm"):
            assert figures[name] == pytest.approx(stats[name], rel=1e-6, abs=1e-9), name


def one_of_two(rank, port, config, dies_at, fails):
    """``run_rl`` as rank ``rank`` of two under torchrun; with ``dies_at`` both ranks die before that step's update."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", CI="1")
    torch.set_num_threads(1)
    kept = Zero.update

    def update(zero, *args):
        if zero.steps == dies_at:
            raise ConnectionError("a node is lost")
        return kept(zero, *args)

    Zero.update = update
    try:
        run_rl(config)
    except (ConnectionError, ValueError) as error:
        fails[rank] = str(error)


def on_two_ranks(config, dies_at=None):
    """What each rank died of, {} when both came to the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with mp.get_context("fork").Manager() as manager:
        fails = manager.dict()
        mp.start_processes(one_of_two, (port, config, dies_at, fails), nprocs=2, start_method="fork")
        return dict(fails)


def test_two_ranks_resume_bit_for_bit(tmp_path, base):
    """Each rank goes on with its own generators: answers, and questions that dynamic sampling draws anew."""
    zero = ZeroConfig(steps=4, questions=2, group=4, max_new_tokens=24, dynamic_sampling=True, curriculum=True,
                      objective=GRPOConfig(beta=0.05))  # fmt: skip
    config = RLConfig(base=base, zero=zero, eval_every=2, eval_problems=4, save_every=2, out=tmp_path / "whole")
    assert on_two_ranks(config) == {}
    config = dataclasses.replace(config, out=tmp_path / "cut")
    assert on_two_ranks(config, dies_at=3) == {0: "a node is lost", 1: "a node is lost"}
    resumed = dataclasses.replace(config, resume=True)
    assert not (tmp_path / "cut" / "step-4").exists()
    with pytest.raises(ValueError, match="made by 2 processes, now there are 1"):
        run_rl(resumed)
    assert on_two_ranks(resumed) == {}
    for name in ("model-00001-of-000001.safetensors", "trainer.safetensors"):
        whole, cut = (load_file(tmp_path / run / "step-4" / name) for run in ("whole", "cut"))
        assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    whole, cut = (records(tmp_path / run) for run in ("whole", "cut"))
    assert [record["step"] for record in cut] == [0, 1, 2, 3, 4]
    assert [no_time(record) for record in whole] == [no_time(record) for record in cut]
    found = json.loads((tmp_path / "cut" / "step-4" / "trainer.json").read_text())["zero"]["ranks"]
    assert len(found) == 2 and found[0]["torch"] != found[1]["torch"] and found[0]["random"] != found[1]["random"]


def test_questions_must_divide_among_ranks():
    with pytest.raises(ValueError, match="questions = 3: must be a multiple of the 2"):
        Zero(new_policy(tiny_config(character_tokenizer()), 0), character_tokenizer(), Sums(), ZeroConfig(questions=3),
             ranks=Ranks(0, 2))
    with pytest.raises(ValueError, match="mini_batches = 5: must be at most the answers of a process, 4"):
        Zero(new_policy(tiny_config(character_tokenizer()), 0), character_tokenizer(), Sums(),
             ZeroConfig(questions=2, group=4, mini_batches=5), ranks=Ranks(0, 2))


def test_run_from_python(tmp_path):
    config = RLConfig(out=tmp_path / "run", pretrain=SupervisedConfig(steps=5, tokens=128), eval_problems=4, eval_every=0,
                      zero=ZeroConfig(steps=1, questions=1, group=2, max_new_tokens=4))  # fmt: skip
    assert run_rl(config)["step"] == 1
