"""MTP of any depth in the training loop: losses and their weight, shared tensors, document ends, balance, checkpoints."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from minids import checkpoint
from minids.model.mtp import mtp_labels
from minids.train.optim import Optimizer
from minids.train.step import compute_gradients, split_rows
from minids.train.trainer import Trainer

DEPTHS = (1, 2, 3)


@pytest.fixture
def start(tiny):
    trainers = []

    def build(depth, **changes):
        trainers.append(Trainer.start(tiny(overwrite=True, model=(f"num_nextn_predict_layers={depth}",), **changes)))
        return trainers[-1]

    yield build
    for trainer in trainers:
        trainer.log.close()


def gradients(trainer, mtp_lambda, tokens, ids):
    """(result, gradients) of a batch without any balancing loss."""
    optimizer = Optimizer(trainer.model)
    result = compute_gradients(trainer.model, optimizer, tokens, ids, mtp_lambda, trainer.config, trainer.balancer)
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    optimizer.zero_grad()
    return result, found


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_gate_moves_by_gamma_and_by_its_own_load(start, depth):
    """The module at depth k routes T - k positions of a row; its bias answers to these alone, over all micro-batches."""
    trainer = start(depth, recipe={"batch": 6, "batch_start": 6, "gamma": 0.01}, micro_batch=2)
    gates, cfg = trainer.model.routers(), trainer.model.cfg
    assert [layer.index for layer in trainer.model.mtp_modules] == [2 + k for k in range(depth)]
    before = [gate.e_score_correction_bias.clone() for gate in gates]
    tokens, ids = trainer.data.train.batch(0, 6)
    expected = trainer.model(split_rows(tokens, ids, False, "cpu")[0]).loads()
    assert expected.sum(1).tolist() == [6 * (32 - k) * cfg.num_experts_per_tok for k in range(depth + 1)]
    record = trainer.step()
    assert len(record["mtp_loss"]) == depth
    for gate, old, load in zip(gates, before, expected, strict=True):
        step = 0.01 * (load.float().mean() - load).sign()
        assert torch.equal(gate.e_score_correction_bias, old + step) and step.abs().max() > 0


def test_lambda_falls_to_a_third_after_two_thirds_of_the_tokens(start):
    trainer = start(2, recipe={"mtp_lambda": 0.3, "tokens": 37 * 4 * 32})
    found = [trainer.step()["lambda"] for _ in range(37)]
    assert found == [0.3] * 25 + [pytest.approx(0.1)] * 12  # 10 / 14.8 of 37 steps


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_gradient_is_linear_in_lambda_and_reaches_what_is_shared(start, depth):
    """grad(lambda) = grad(0) + lambda * g for every tensor; g is the gradient of (L_1 + ... + L_D) / D alone."""
    trainer = start(depth, balance=())
    batch = trainer.data.train.batch(0, 4)
    plain, found = (gradients(trainer, value, *batch)[1] for value in (0.0, 0.25))
    inputs, labels, ids = split_rows(*batch, False, "cpu")
    parameters = dict(trainer.model.named_parameters())
    out = trainer.model(inputs, labels=labels, document_ids=ids, document_mask=False)
    alone = torch.autograd.grad(sum(out.mtp_losses) / depth, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, alone, strict=True):
        extra = torch.zeros_like(plain[name]) if gradient is None else gradient
        torch.testing.assert_close(found[name], plain[name] + 0.25 * extra, rtol=1e-4, atol=1e-7, msg=name)
    shared = ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    by_name = dict(zip(parameters, alone, strict=True))
    assert all(by_name[name].abs().max() > 1e-5 for name in shared)
    last = f"model.layers.{1 + depth}."
    assert all(not plain[name].any() and found[name].any() for name in found if name.startswith(last) and "eh_proj" in name)


def test_documents_too_short_to_look_ahead_teach_the_modules_nothing(start):
    """Documents of two tokens: no position has a token two ahead in its own document."""
    trainer = start(2, balance=())
    tokens, _ = trainer.data.train.batch(0, 4)
    pairs = (torch.arange(33) // 2).expand(4, 33)
    result, found = gradients(trainer, 0.3, tokens, pairs)
    assert result.mtp_losses == [0.0, 0.0] and result.loss > 1
    assert not any(found[name].any() for name in found if name.startswith(("model.layers.2.", "model.layers.3.")))
    triples = (torch.arange(33) // 3).expand(4, 33)
    result, found = gradients(trainer, 0.3, tokens, triples)
    assert result.mtp_losses[0] > 0 and result.mtp_losses[1] == 0
    labels = torch.as_tensor(tokens)[:, 1:]
    assert (mtp_labels(labels, 1, triples) != -100).sum() == 4 * 11  # one position of each of 11 documents
    assert found["model.layers.2.eh_proj.weight"].any() and not found["model.layers.3.eh_proj.weight"].any()


@pytest.mark.parametrize("depth", (2, 3))
def test_a_trained_chain_survives_the_disk_in_the_published_layout(start, depth):
    trainer = start(depth)
    for _ in range(3):
        trainer.step()
    folder = trainer.save()
    stored = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    ours = trainer.model.state_dict()
    for layer in range(2, 2 + depth):
        prefix = f"model.layers.{layer}."
        assert torch.equal(stored[prefix + "embed_tokens.weight"], ours["model.embed_tokens.weight"])
        assert torch.equal(stored[prefix + "shared_head.head.weight"], ours["lm_head.weight"])
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm"):
            assert torch.equal(stored[f"{prefix}{name}.weight"], ours[f"{prefix}{name}.weight"])
        assert stored[prefix + "mlp.gate.e_score_correction_bias"].abs().max() > 0
    assert not any(name.startswith(f"model.layers.{2 + depth}.") for name in stored)
    loaded = checkpoint.load(folder)
    assert loaded.cfg.num_nextn_predict_layers == depth and loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())
    tokens = torch.randint(trainer.model.cfg.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = trainer.model.eval()(tokens), loaded.eval()(tokens)
    assert len(found.mtp_logits) == depth
    assert all(torch.equal(a, b) for a, b in zip(expected.mtp_logits, found.mtp_logits, strict=True))


def test_a_run_with_two_depths_resumes_bit_for_bit(start, tiny):
    whole = start(2, recipe={"tokens": 8 * 4 * 32})
    for _ in range(4):
        whole.step()
    whole.save()
    expected = [whole.step()["mtp_loss"] for _ in range(4)]
    again = Trainer.start(dataclasses.replace(whole.config, resume=True, overwrite=False))
    found = [again.step()["mtp_loss"] for _ in range(4)]
    again.log.close()
    assert found == expected
    ours = whole.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.model.state_dict().items())
