"""The MTP experiment: equal means equal, the arms differ in what they say they do, acceptance is counted right."""

import dataclasses
import json
import math

import pytest
import torch

from minids import ModelConfig, Transformer
from minids.cli import main
from minids.data import PackedRows
from minids.experiments import mtp
from minids.experiments.mtp import ARMS, MTPConfig
from minids.model.mtp import mtp_labels

CFG = ModelConfig.preset("toy", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=2,
                         initializer_range=0.2)


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return Transformer(CFG.replace(**changes)).eval()


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_a_modules_flops_are_those_of_its_parameters_and_its_attention():
    """With all experts chosen every parameter works: 6 FLOPs each, the head's again, and one layer of attention."""
    cfg = CFG.replace(n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=8)
    module = Transformer(cfg).mtp_modules[0]
    weights = sum(p.numel() for p in module.parameters()) + 8 + 40 * 32  # the router's bias, the shared head
    heads, length = cfg.num_attention_heads, 64
    pairs = (length - 2) ** 2 / 2 / length  # a token's, averaged: causal over T - 2 positions of T
    attention = 3 * 2 * heads * (cfg.qk_head_dim + cfg.v_head_dim) * pairs
    expected = 6 * weights * (length - 2) / length + attention
    assert mtp.module_flops(cfg, length, depth=2) == pytest.approx(expected, rel=1e-12)
    both = mtp.training_flops(cfg, length) - cfg.flops_per_token(length)
    assert both == pytest.approx(mtp.module_flops(cfg, length, 1) + mtp.module_flops(cfg, length, 2))


def test_v3s_module_costs_four_percent():
    v3 = ModelConfig.preset("v3")
    assert mtp.training_flops(v3, 4096) / v3.flops_per_token(4096) - 1 == pytest.approx(0.0407, abs=1e-4)


def test_the_longer_arm_pays_what_one_module_costs(tmp_path):
    """To within a row, for the model that is trained: its vocabulary is the tokenizer's, not the preset's."""
    config, paid = MTPConfig(), {}
    for arm in ARMS:
        settings = mtp.settings(arm, 0, config, tmp_path)
        cfg = settings.model_config(settings.data.vocab_size)
        paid[arm] = settings.recipe.tokens * mtp.training_flops(cfg, settings.recipe.sequence_length)
        assert cfg.num_nextn_predict_layers == ARMS[arm][0]
        assert settings.recipe.tokens == 400_000 or arm == "plain, longer"
    row = paid["plain"] / 400_000 * settings.recipe.sequence_length
    assert abs(paid["plain, longer"] - paid["MTP, D = 1"]) < row
    assert paid["MTP, D = 2"] == paid["parallel, D = 2"] > paid["MTP, D = 1"] > 1.3 * paid["plain"]


# ---- arms ------------------------------------------------------------------------------------------------------------


def test_all_arms_start_from_the_same_main_model():
    plain = model_of(seed=7, num_nextn_predict_layers=0).state_dict()
    for depth in (0, 1, 2):
        model = model_of(seed=3, num_nextn_predict_layers=depth)
        mtp.start_alike(model, 7)
        found = model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
        assert len(found) > len(plain) or depth == 0


@torch.no_grad()
@pytest.mark.parametrize("parallel", [False, True])
def test_parallel_heads_read_no_later_token(parallel):
    model = model_of()
    if parallel:
        mtp.in_parallel(model)
    tokens = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 40
    for depth, (a, b) in enumerate(zip(model(tokens).mtp_logits, model(changed).mtp_logits, strict=True), start=1):
        moved = (a - b).abs().amax((0, 2)) > 1e-5
        first = 6 if parallel else 6 - depth
        assert not moved[:first].any() and moved[first]
    with torch.no_grad():
        before = model(tokens).mtp_logits[1]
        model.mtp_modules[0].eh_proj.weight.mul_(2.0)
        after = model(tokens).mtp_logits[1]
    assert torch.equal(before, after) == parallel  # no chain: head 2 does not hear head 1


# ---- acceptance ------------------------------------------------------------------------------------------------------


def packed(n=6, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (n * length + 1,), generator=generator).numpy()
    return PackedRows(tokens, torch.tensor([0, 7, 23, 41]).numpy(), length)


@torch.no_grad()
def test_acceptance_is_what_a_loop_counts():
    model, rows = model_of(), packed()
    found = mtp.acceptance(model, rows, 5, batch=2)
    sums, n, both = torch.zeros(3, 2, dtype=torch.float64), [0, 0], 0
    for place in range(5):
        tokens, ids = (torch.from_numpy(x) for x in rows.batch(place, 1))
        out = model(tokens[:, :-1])  # attention runs across documents, as in V3's pre-training
        for i in range(10):
            right = []
            for k in (1, 2):
                if i + k + 1 > 10 or ids[0, i] != ids[0, i + k + 1]:
                    continue
                p, q = out.logits[0, i + k].softmax(-1), out.mtp_logits[k - 1][0, i].softmax(-1)
                right.append(bool(p.argmax() == q.argmax()))
                sums[:, k - 1] += torch.stack([-q[tokens[0, i + k + 1]].log(), torch.tensor(float(right[-1])),
                                               torch.minimum(p, q).sum()])
                n[k - 1] += 1
            both += len(right) == 2 and all(right)
    expected = sums / torch.tensor(n)
    for row, name in enumerate(("mtp_valid", "agree", "overlap")):
        assert found[name] == pytest.approx(expected[row].tolist(), rel=1e-5)
    assert found["both"] == pytest.approx(both / n[1]) and 0 < n[1] < n[0] < 50


def test_a_module_that_says_what_the_model_says_is_always_accepted(monkeypatch):
    model, rows = model_of(), packed()
    plain = type(model).forward

    def echo(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.mtp_logits = [out.logits[:, k:] for k in (1, 2)]
        return out

    monkeypatch.setattr(type(model), "forward", echo)
    found = mtp.acceptance(model, rows, 6)
    assert found["agree"] == [1.0, 1.0] and found["both"] == 1.0
    assert found["overlap"] == pytest.approx([1.0, 1.0], rel=1e-6)


def test_labels_of_other_documents_do_not_count():
    rows = packed()
    ids = torch.stack([torch.from_numpy(rows.row(place)[1]) for place in range(6)])
    labels = torch.zeros(6, 10, dtype=torch.int64)
    assert (mtp_labels(labels, 1, ids) == -100).sum() == 3 * 2 - 1  # three borders, one of them at a row's first token


# ---- bookkeeping -----------------------------------------------------------------------------------------------------


def fake_run(arm, seed, config, folder):
    depth = ARMS[arm][0]
    extra = {"mtp_valid": [3.0] * depth, "agree": [0.5] * depth, "overlap": [0.6] * depth} if depth else {}
    return {"key": f"{arm}/{seed}", "arm": arm, "seed": seed, "tokens": 10, "flops": 1e12 * (1 + depth), "seconds": 0.1,
            "valid": 4.0 + 0.1 * depth + 0.01 * seed, **extra, **({"both": 0.3} if depth == 2 else {}), "losses": []}


def test_finished_runs_are_kept_and_the_figures_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CI", "1")
    calls = []
    monkeypatch.setattr(mtp, "one_run", lambda *a: calls.append(a[:2]) or fake_run(*a))
    mtp.run(MTPConfig(out=tmp_path, seeds=1))
    result = mtp.run(MTPConfig(out=tmp_path, seeds=3))
    assert calls == [(arm, seed) for seed in range(3) for arm in ARMS]  # each once
    assert json.loads((tmp_path / "mtp.json").read_text()) == result and len(result["runs"]) == 15
    assert {path.name for path in tmp_path.glob("*.png")} == {"with_and_without.png", "accepted_by_depth.png"}
    assert not list(tmp_path.glob("*.tmp"))
    assert mtp.differences(result["runs"], "MTP, D = 2", "plain") == pytest.approx([0.2] * 3)
    assert "| MTP, D = 2 | 10 | 3.00 | 4.210 +- 0.010 | 0.500 0.500 | 0.600 0.600 | 0.300 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds runs of other settings"):
        mtp.run(MTPConfig(out=tmp_path, seeds=1, tokens=50_000))
    assert mtp.run(MTPConfig(out=tmp_path, draw_only=True)) == result and len(calls) == 15


@pytest.mark.parametrize("field, value", [("seeds", 0), ("tokens", 100), ("max_bytes", 5)])
def test_settings_that_cannot_work_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}: must be at least"):
        dataclasses.replace(MTPConfig(), **{field: value})


def test_an_experiment_is_a_subcommand(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(mtp, "run", seen.append)
    main(["experiment", "mtp", "--seeds", "2", "--out", str(tmp_path)])
    assert seen == [MTPConfig(out=tmp_path, seeds=2)]
    for wrong in (["experiment"], ["experiment", "nothing"], ["experiment", "mtp", "--seeds", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2


def test_one_real_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")
    config = MTPConfig(tokens=16_000, max_bytes=250_000)
    line = mtp.one_run("parallel, D = 2", 0, config, tmp_path)
    assert line["tokens"] == 16_000 and len(line["agree"]) == len(line["mtp_valid"]) == 2
    assert 4 < line["valid"] < math.log(1024) and line["losses"][-1] < math.log(1024)
