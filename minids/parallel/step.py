"""One optimizer step over data ranks whose experts are spread, equal to the step of one process [V3 sections 2.1.2, 3.2].

Every rank is given the same global batch and takes its share of the rows. What has to be global, so that the sum over ranks
is the gradient of the batch in one process:

    token losses       divided by the labels counted in the whole batch, not by the rank's own
    balance losses     a mean over all sequences: a rank's weighs as much as its share of the rows
    loads              summed over all ranks before the bias moves: every rank moves its bias alike
    gradients          summed, experts over their replicas and all else over all ranks (experts.py)
    clipping           by the norm of the whole gradient (zero.py)

Ranks take their micro-batches together, because tokens travel in every layer; so each has as many rows.

Simplification: a batch-wise balance loss, and a capacity, see one rank's micro-batch at a time.

Shapes: B rows, T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.fp8 import to_fp8
from minids.fp8.linear import quantised_once
from minids.model.auxiliary import NoisyTopK
from minids.model.balancer import Balancer, parse_all
from minids.model.load import LoadMeter
from minids.model.loss import IGNORE
from minids.model.moe import copied_once
from minids.model.transformer import Transformer
from minids.parallel.dispatch import Wire
from minids.parallel.experts import is_expert, shard_experts
from minids.parallel.mesh import Mesh
from minids.parallel.peers import Peers
from minids.parallel.zero import RankOptimizer, ZeroOptimizer
from minids.train.settings import TrainConfig
from minids.train.step import StepResult, micro_batch, split_rows

DTYPES = {"fp32": torch.float32, "bf16-autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURES = ("tokens", "asked", "received", "max_violation", "token_entropy", "nodes")  # a LoadMeter's, a number a layer
WIRES = {"exact": Wire(), "v3": Wire.v3()}


def check_batch(rows: int, ranks: int) -> None:
    """Raises ValueError if a global batch does not divide over the data ranks."""
    if rows % ranks:
        raise ValueError(f"a global batch of {rows} sequences on {ranks} data ranks: allowed are multiples of {ranks}, as "
                         f"in --recipe.batch {2 * ranks} --recipe.batch-start {ranks}")  # fmt: skip


class ExpertParallel:
    """This rank's part of the model, and the global batch's gradient in it.

    engine = ExpertParallel(cfg, config, mesh)           # after torch.manual_seed, the same on all ranks
    result = engine.compute_gradients(tokens, document_ids, mtp_lambda)           # on every rank, with the same batch
    moved = engine.step(lr, gamma, result)
    """

    group = None  # of all its ranks: the world

    def __init__(self, cfg: ModelConfig, config: TrainConfig, mesh: Mesh, dispatch: str = "two_hop",
                 wire: Wire | None = None, zero: bool = True, dtype: torch.dtype | None = None,
                 model: Transformer | None = None):  # fmt: skip
        """``model``: one that is sharded already; otherwise weights are drawn as one process would, all of them on every
        rank for a moment. On threads give one: torch's default dtype, which drawing sets, is the whole process's."""
        self.cfg, self.config, self.mesh, self.rank = cfg, config, mesh, mesh.rank
        self.device, self.data = torch.device(config.device), mesh.peers["data"]
        self.dtype = dtype or DTYPES[config.resolved_precision]
        check_balance(config, cfg)
        if model is None:
            model = shard_experts(self._draw(), mesh, dispatch, wire)
        self.model = model.train()
        self.balancer = Balancer.install(model, config.balance)
        kind = ZeroOptimizer if zero else RankOptimizer
        self.optimizer = kind(model, config.optim, cfg.num_hidden_layers, mesh=mesh)

    def _draw(self) -> Transformer:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                model = Transformer(self.cfg)
        finally:
            torch.set_default_dtype(before)
        return model if self.config.fp8 == "none" else to_fp8(model, self.config.fp8)

    def compute_gradients(self, tokens: np.ndarray | Tensor, document_ids: np.ndarray | Tensor,
                          mtp_lambda: float) -> StepResult:  # fmt: skip
        """Leave this rank's part of the gradient of a global batch (B, T + 1) in the optimizer. Returns losses and loads
        of the whole batch on every rank."""
        config, ranks = self.config, self.data.size
        inputs, labels, ids = split_rows(tokens, document_ids, config.document_mask, self.device)
        check_batch(len(inputs), ranks)
        rows, counted = len(inputs), (labels != IGNORE).sum().clamp_min(1)
        inputs, labels, ids = (part.chunk(ranks)[self.data.rank] for part in (inputs, labels, ids))
        losses = torch.zeros(3 + self.cfg.num_nextn_predict_layers, dtype=torch.float64, device=self.device)
        meter = LoadMeter(self.cfg)
        with quantised_once(self.model), copied_once(self.model.experts()):
            for start in range(0, len(inputs), config.micro_batch):
                part = slice(start, start + config.micro_batch)
                (total, loss, balance), depths, routings = micro_batch(
                    self.model, self.balancer, self.optimizer, config, inputs[part], labels[part], ids[part], counted,
                    mtp_lambda, len(inputs[part]) / rows)  # fmt: skip
                self.optimizer.accumulate()
                losses[: 3 + len(depths)] += torch.stack([torch.as_tensor(x, device=self.device).double()
                                                          for x in (total, loss, balance, *depths)])  # fmt: skip
                meter.add(routings)
        total, loss, balance, *depths = self.data.all_reduce(losses).tolist()
        return StepResult(total, loss, depths, balance, self._whole(meter))

    def _whole(self, meter: LoadMeter) -> LoadMeter:
        """The meter of all ranks: loads of the global batch, before the bias reads them."""
        found = LoadMeter(self.cfg, batches=meter.batches * self.data.size)
        if meter.sums:
            columns = [meter.sums["load"], *(meter.sums[name].unsqueeze(1) for name in MEASURES)]
            table = self.data.all_reduce(torch.cat([column.double() for column in columns], dim=1))
            e = self.cfg.n_routed_experts
            found.sums = {"load": table[:, :e].long()} | {name: table[:, e + i] for i, name in enumerate(MEASURES)}
        return found

    def step(self, lr: float, gamma: float, result: StepResult) -> bool:
        """Update weights and bias on all ranks, or on none if anything is not finite; whether they moved."""
        moved = self.optimizer.step(lr, apply=math.isfinite(result.total))
        if moved:
            self.balancer.update(result.loads, gamma)
        return moved

    @torch.no_grad()
    def gather(self, tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """On rank 0, on the CPU, the whole tensor for every name in ``like``, experts put together; None elsewhere. Names
        are a parameter's, or KIND/ before it. All ranks call it; the first replica's experts are taken."""
        found = {}
        for name in like:
            mine = tensors[name].detach()
            if is_expert(name) and mine.ndim:
                mine = experts_to_first(mine.to(self.device), self.mesh.peers["ep"])
            if self.rank == 0:
                found[name] = mine.to("cpu", copy=True)
        return found if self.rank == 0 else None

    def gather_gradients(self) -> dict[str, Tensor] | None:
        """On rank 0 the gradient of every parameter, summed over ranks; None elsewhere. All ranks call it, before the step;
        the optimizers keep what they have."""
        summed = {name: self.mesh.peers["replica" if is_expert(name) else "data"].all_reduce(
            self.optimizer.own_gradient(name).clone()) for name in self.optimizer.params}  # fmt: skip
        return self.gather(summed, summed)

    def gather_model(self) -> Transformer | None:
        """On rank 0 the whole model, on the CPU, which `minids.checkpoint.save` writes; None elsewhere. All call it."""
        state = self.model.state_dict()
        found = self.gather(state, state)
        if found is None:
            return None
        with torch.device("meta"):
            whole = Transformer(self.cfg).to(self.dtype)
        whole.load_state_dict(found, assign=True)
        if self.cfg.tie_word_embeddings:
            whole.lm_head.weight = whole.model.embed_tokens.weight
        return whole


def experts_to_first(mine: Tensor, peers: Peers) -> Tensor:
    """(E, ...) on the first of an expert group, whose ranks have (E / EP, ...) each; (0, ...) on the others."""
    to_first = [len(mine)] + [0] * (peers.size - 1)
    from_all = [len(mine) if peers.rank == 0 else 0] * peers.size
    return peers.all_to_all(mine, to_first, from_all)


def check_balance(config: TrainConfig, cfg: ModelConfig) -> None:
    """Raises ValueError for a strategy that cannot be spread."""
    if any(isinstance(strategy, NoisyTopK) for strategy in parse_all(config.balance, cfg)):
        raise ValueError("balance: noisy draws random numbers of its own on every rank: allowed are the others")
