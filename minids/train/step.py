"""The gradient of one global batch, in as many forward passes as memory allows.

Over micro-batches m with n_m counted labels, of n in all, and r_m of r rows:

    loss = sum_m  n_m / n * (LM_m + lambda * MTP_m)  +  r_m / r * balance_m

so that the gradient is that of the whole batch in one pass, whatever the split: the token losses are means over
labels, and masked labels spread unevenly; the sequence-wise balance loss is a mean over sequences (a batch-wise one sees
a micro-batch at a time, and so does a capacity). The load of an expert is a count and simply adds up; the bias update of
the global batch reads the sum.

Document masks are a switch. V3 pre-trains without: attention, positions and the next-token label run across documents
in a packed row. MTP labels never cross a document's end in either mode. With the mask on, attention and positions stay
inside a document, and the one label that crosses (the bos after an eos) is not counted.

Simplifications: one process. Ranks would all-reduce `loads`, the label count and the gradients here.

Shapes: B rows, T tokens a row, L MoE layers, E experts.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), sections 2.1.2 (load of the whole batch), 2.2 and 4.1.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minids.data import PackedRows
from minids.fp8.linear import quantised_once
from minids.model.balancer import Balancer
from minids.model.load import LoadMeter
from minids.model.loss import IGNORE
from minids.model.moe import copied_once
from minids.model.transformer import Transformer
from minids.train.graph import Recorder
from minids.train.optim import Optimizer
from minids.train.settings import TrainConfig


@dataclass
class StepResult:
    """Losses of one global batch in nats a token, before the update."""

    total: float  # what was differentiated: decides whether the step counts
    loss: float  # next token
    mtp_losses: list[float]  # one a depth, not multiplied by lambda
    balance_loss: float  # sum over strategies and MoE layers, times alpha
    meter: LoadMeter  # of the whole batch, a micro-batch at a time

    @property
    def loads(self) -> Tensor:
        """(L, E) int64, tokens each expert received in the whole batch."""
        return self.meter.load


def split_rows(tokens: np.ndarray | Tensor, document_ids: np.ndarray | Tensor, document_mask: bool,
               device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, T + 1) -> inputs (B, T), labels (B, T), document ids (B, T + 1), int64 on `device`.

    With `document_mask` the labels that lie in another document than their input are -100.
    """
    tokens, ids = (torch.as_tensor(x).to(device) for x in (tokens, document_ids))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if document_mask:
        labels = labels.masked_fill(ids[:, 1:] != ids[:, :-1], IGNORE)
    return inputs, labels, ids


def autocast(precision: str, device: str) -> AbstractContextManager:
    """BF16 products for bf16-autocast, nothing for the others."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16-autocast")


def micro_batch(model: Transformer, balancer: Balancer, optimizer: Optimizer, config: TrainConfig, inputs: Tensor,
                labels: Tensor, ids: Tensor, counted: Tensor, mtp_lambda: float | Tensor, of_rows: float | Tensor):
    """Forward and backward of some rows, which are the share `of_rows` of the batch, whose `counted` labels count.
    Returns what this adds to the batch's losses, detached (total, next token, balance, one a depth), and the routings."""
    with autocast(config.resolved_precision, config.device):
        out = model(inputs, labels=labels, document_ids=ids, document_mask=config.document_mask,
                    recompute=config.recompute)
    share = (labels != IGNORE).sum() / counted
    balance = balancer.loss(out.routing, len(inputs)) * of_rows
    loss = share * out.loss + balance
    if out.mtp_losses:
        loss = loss + mtp_lambda * share * out.mtp_loss
    (optimizer.scale * loss).backward()
    balance = balance.detach() if isinstance(balance, Tensor) else balance
    losses = (loss.detach(), (share * out.loss).detach(), balance)
    return losses, [share * x.detach() for x in out.mtp_losses], [routing.detached() for routing in out.routing]


def compute_gradients(model: Transformer, optimizer: Optimizer, tokens: np.ndarray | Tensor,
                      document_ids: np.ndarray | Tensor, mtp_lambda: float, config: TrainConfig,
                      balancer: Balancer | None = None, recorder: Recorder | None = None) -> StepResult:
    """Leave the gradient of a global batch (B, T + 1) in `optimizer` (times its loss scale); returns the losses.

    `balancer`: the strategies installed in the model; None is what V3 does. `recorder`: runs micro-batches as CUDA graphs.
    """
    model.train()
    balancer = balancer or Balancer.install(model)
    inputs, labels, ids = split_rows(tokens, document_ids, config.document_mask, config.device)
    rows, counted = len(inputs), (labels != IGNORE).sum().clamp_min(1)
    sums, mtp_sums, meter = [0.0, 0.0, 0.0], [], LoadMeter(model.cfg)
    run = partial(micro_batch, model, balancer, optimizer, config)
    with contextlib.ExitStack() as once:
        if recorder is not None:  # makes weights of lower precision inside
            adds = rows > config.micro_batch and optimizer.owns_gradients
            run = recorder.begin(run, list(optimizer.params.values()), adds)
        else:
            once.enter_context(quantised_once(model))
            if config.resolved_precision == "bf16-autocast":
                once.enter_context(copied_once(model.experts()))
        for start in range(0, rows, config.micro_batch):
            part = slice(start, start + config.micro_batch)
            of_rows = len(inputs[part]) / rows
            losses, depths, routings = run(inputs[part], labels[part], ids[part], counted, mtp_lambda, of_rows)
            optimizer.accumulate()
            sums = [a + b for a, b in zip(sums, losses, strict=True)]
            mtp_sums = [a + b for a, b in zip(mtp_sums or [0.0] * len(depths), depths, strict=True)]
            meter.add(routings)
    total, loss, balance = map(float, sums)
    return StepResult(total, loss, [float(x) for x in mtp_sums], balance, meter)


@torch.no_grad()
def validation_loss(model: Transformer, rows: PackedRows, config: TrainConfig, meter: LoadMeter | None = None) -> float:
    """Mean next-token loss (nats a token) over the first `eval_rows` rows in the validation order, or all of fewer.
    `meter` counts the routing of each forward pass."""
    model.eval()
    count = min(config.eval_rows, rows.n_rows)
    total, counted = 0.0, 0
    for start in range(0, count, config.micro_batch):
        tokens, ids = rows.batch(start, min(config.micro_batch, count - start))
        inputs, labels, ids = split_rows(tokens, ids, config.document_mask, config.device)
        with autocast(config.resolved_precision, config.device):
            out = model(inputs, labels=labels, document_ids=ids, document_mask=config.document_mask, mtp=False)
        if meter is not None:
            meter.add(out.routing)
        n = int((labels != IGNORE).sum())
        total, counted = total + float(out.loss) * n, counted + n
    return total / max(counted, 1)
