"""One optimizer step: accumulation is exact, loads are the global batch's, bad steps change nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from minids.model.balance import sequence_balance_loss
from minids.model.mtp import mtp_labels
from minids.train.optim import Optimizer
from minids.train.step import compute_gradients, split_rows, validation_loss
from minids.train.trainer import Trainer, TrainingStopped


@pytest.fixture
def start(tiny):
    trainers = []

    def build(**changes):
        trainers.append(Trainer.start(tiny(overwrite=True, **changes)))
        return trainers[-1]

    yield build
    for trainer in trainers:
        trainer.log.close()


def gradients(trainer, rows, micro_batch, mtp_lambda=0.3):
    trainer.config.micro_batch = micro_batch
    tokens, ids = trainer.data.train.batch(0, rows)
    optimizer = Optimizer(trainer.model)
    result = compute_gradients(trainer.model, optimizer, tokens, ids, mtp_lambda, trainer.config)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    optimizer.zero_grad()
    return result, grads


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_is_one_batch(start, document_mask, micro_batch):
    """7 rows in parts (the last one smaller) against all 7 at once: masked labels spread unevenly over the parts."""
    trainer = start(document_mask=document_mask)
    whole, expected = gradients(trainer, 7, 7)
    parts, found = gradients(trainer, 7, micro_batch)
    assert torch.equal(whole.loads, parts.loads)
    assert parts.total == pytest.approx(whole.total, rel=1e-6)
    assert parts.mtp_losses == pytest.approx(whole.mtp_losses, rel=1e-6)
    assert parts.balance_loss == pytest.approx(whole.balance_loss, rel=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_loss_is_what_the_report_says(start, document_mask):
    """LM + lambda * MTP + balance, rebuilt from logits with plain cross entropy."""
    trainer = start(document_mask=document_mask, model=("num_nextn_predict_layers=2",))
    result, _ = gradients(trainer, 4, 2, mtp_lambda=0.25)
    tokens, ids = (torch.from_numpy(x) for x in trainer.data.train.batch(0, 4))
    labels = tokens[:, 1:].clone()
    if document_mask:
        labels[ids[:, 1:] != ids[:, :-1]] = -100
    with torch.no_grad():
        out = trainer.model(tokens[:, :-1], document_ids=ids, document_mask=document_mask)
    n = (labels != -100).sum()
    main = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    mtp = [F.cross_entropy(z.flatten(0, 1), mtp_labels(labels, k, ids).flatten(), ignore_index=-100, reduction="sum") / n
           for k, z in enumerate(out.mtp_logits, start=1)]
    balance = sum(sequence_balance_loss(r, 4, trainer.model.cfg) for r in out.routing)
    assert len(mtp) == 2 and float(balance) > 0
    assert result.loss == pytest.approx(float(main), rel=1e-5)
    assert result.mtp_losses == pytest.approx([float(x) for x in mtp], rel=1e-5)
    assert result.total == pytest.approx(float(main + 0.25 * sum(mtp) / 2 + balance), rel=1e-5)


def test_masks_change_labels_only_at_document_ends():
    tokens = torch.arange(10).view(1, 10)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    inputs, labels, kept = split_rows(tokens, ids, True, "cpu")
    assert labels.tolist() == [[1, 2, -100, 4, 5, 6, -100, 8, 9]] and inputs.tolist() == [list(range(9))]
    assert split_rows(tokens, ids, False, "cpu")[1].tolist() == [list(range(1, 10))]
    assert torch.equal(kept, ids)


def test_loads_count_every_choice_and_the_bias_moves_by_gamma(start):
    trainer = start(recipe={"batch": 6, "batch_start": 6, "gamma": 0.01}, micro_batch=2)
    before = [gate.e_score_correction_bias.clone() for gate in trainer.model.routers()]
    tokens, ids = trainer.data.train.batch(0, 6)
    expected = trainer.model(*split_rows(tokens, ids, False, "cpu")[:1], document_mask=False).loads()
    trainer.step()
    cfg = trainer.model.cfg
    sizes = expected.sum(1).tolist()
    assert sizes == [6 * 32 * cfg.num_experts_per_tok, 6 * 31 * cfg.num_experts_per_tok]  # main layer, MTP module
    for gate, old, load in zip(trainer.model.routers(), before, expected, strict=True):
        direction = (load.float().mean() - load).sign()
        assert torch.equal(gate.e_score_correction_bias, old + 0.01 * direction) and direction.any()


def test_recomputation_changes_memory_and_nothing_else(start):
    plain, expected = gradients(start(), 4, 2)
    again, found = gradients(start(recompute=True), 4, 2)
    assert torch.equal(plain.loads, again.loads) and plain.total == again.total
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-9, msg=name)


def everything(trainer):
    tensors, values = trainer.optimizer.state()
    return {k: v.clone() for k, v in (tensors | trainer.model.state_dict()).items()}, values


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_is_skipped_counted_and_left_without_trace(start, where):
    trainer = start()
    trainer.step()
    before, _ = everything(trainer)
    if where == "gradient":
        handle = trainer.model.lm_head.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), math.inf))
    else:
        handle = trainer.model.model.norm.register_forward_hook(lambda m, i, out: out * math.nan)
    record = trainer.step()
    handle.remove()
    after, _ = everything(trainer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)  # weights, moments, bias
    assert record["applied"] is False and record["skipped"] == 1 and trainer.progress.step == 2
    assert trainer.progress.position == 8  # the rows are behind us: the same batch is not tried for ever
    record = trainer.step()
    assert record["applied"] and record["skipped"] == 1 and trainer.progress.skips_in_row == 0
    assert not torch.equal(before["lm_head.weight"], trainer.model.lm_head.weight)


def test_too_many_bad_steps_in_a_row_stop_the_run(start):
    trainer = start(max_skips=3)
    trainer.model.lm_head.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(TrainingStopped, match="3 steps in a row .up to step 3. .* not finite .* Lower --recipe.lr"):
        trainer.run()
    assert trainer.progress.skipped == 3


def test_one_batch_can_be_learned_by_heart(start, monkeypatch):
    trainer = start(recipe={"tokens": 100 * 4 * 32, "lr": 1e-2})
    same = trainer.data.train.batch(0, 4)
    monkeypatch.setattr(type(trainer.data.train), "batch", lambda self, position, rows: same)
    losses = [trainer.step() for _ in range(100)]
    assert losses[0]["loss"] == pytest.approx(math.log(trainer.model.cfg.vocab_size), rel=0.03)
    assert losses[-1]["loss"] < 0.05 and losses[-1]["mtp_loss"][0] < 0.2


def test_validation_is_the_mean_over_labels_whatever_the_micro_batch(start):
    trainer = start(document_mask=True, eval_rows=5)
    values = []
    for micro_batch in (1, 2, 5):
        trainer.config.micro_batch = micro_batch
        values.append(validation_loss(trainer.model, trainer.data.valid, trainer.config))
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-6)
    assert values[0] == pytest.approx(math.log(trainer.model.cfg.vocab_size), rel=0.03)


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16", "fp16"])
def test_low_precision_follows_fp32(start, precision):
    exact = [start().step()["loss"]]
    trainer = start(precision=precision)
    found = [trainer.step()["loss"] for _ in range(20)]
    assert found[0] == pytest.approx(exact[0], rel=5e-3)
    assert trainer.progress.skipped <= 2 and min(found) < found[0] - 0.3
    kinds = {m.dtype for m in trainer.optimizer.masters.values()}
    assert kinds == {torch.float32}
    assert all(gate.e_score_correction_bias.dtype == torch.float32 for gate in trainer.model.routers())
