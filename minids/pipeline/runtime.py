"""One optimizer step of a model spread over ranks, equal to the step of one process.

    gradients    run the schedule's list of actions on this rank's stages (torch_engine.py)
                 sum the gradients of tensors that several ranks hold
    losses       main + lambda MTP + balance, summed over micro-batches, stages, both directions
    loads        tokens each expert received in the global batch, the same way; the bias update reads them
    clipping     norm over all ranks, each parameter counted once

Who holds what twice. DualPipe keeps every stage on two mirror ranks, r for direction 0 and PP-1-r for direction 1: each
sees half of the micro-batches, so they add their gradients and then step alike. In the other schedules only the embedding
may be there twice, at both ends (stages.py). Both cases are one rule here: parameters whose stages lie on several ranks are
summed over those ranks.

The weight of a micro-batch is that of minids.train.step, by counted labels and rows of the whole global batch; so any
schedule, and any split, gives the gradient of the whole batch. Only the order of sums differs: gradients agree to 3e-16 in
float64 and 2e-7 in float32. Over many float32 steps the runs still part, because routing is a choice: a last bit decides a
tie between two experts differently, and that token's loss jumps.

One pipeline is not all: minids/parallel/expert_pipeline.py lays many side by side, whose ranks of one stage share the
experts of its layers and the batch. It is a subclass: there the rows, the sums and the gathering are not one pipeline's.

Shapes: B rows, T tokens, L MoE layers, E experts.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
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
from minids.pipeline.action import Schedule
from minids.pipeline.messages import transfer
from minids.pipeline.schedules import build_schedule, check_request, fewest_micro_batches
from minids.pipeline.stages import MicroBatch, Piece, RankModel, Stage, build_rank_model, model_on_meta, split_layers
from minids.pipeline.torch_engine import DirectedStage, Engine
from minids.train.optim import OptimConfig, Optimizer
from minids.train.settings import TrainConfig
from minids.train.step import StepResult, split_rows

DTYPES = {"fp32": torch.float32, "bf16-autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURES = ("tokens", "asked", "received", "max_violation", "token_entropy", "nodes")  # a LoadMeter's, a number a layer


@dataclass(frozen=True)
class Placement:
    """Which rank runs which stage, checked; the same for every number of micro-batches."""

    schedule: Schedule  # with the fewest micro-batches
    pieces: list[Piece]
    cfg: ModelConfig

    @classmethod
    def plan(cls, config: TrainConfig, cfg: ModelConfig, ranks: int) -> "Placement":
        """Raises ValueError for whatever cannot work on ``ranks`` ranks, before anything starts."""
        name, chunks = config.pipeline, config.pipeline_chunks
        if ranks < 2 or ranks % 2:
            raise ValueError(f"--pipeline {name} on WORLD_SIZE={ranks} processes: allowed is an even number of at least 2, "
                             "as in torchrun --nproc-per-node 4 -m minids train --pipeline ...")  # fmt: skip
        schedule = build_schedule(name, ranks=ranks, micro_batches=fewest_micro_batches(name, ranks), chunks=chunks)
        if any(isinstance(strategy, NoisyTopK) for strategy in parse_all(config.balance, cfg)):
            raise ValueError("balance: noisy has weights of its own, which a pipeline does not gather: allowed are the "
                             "others")  # fmt: skip
        return cls(schedule.validate(), split_layers(cfg, schedule.stages, config.pipeline_layers), cfg)

    def holders(self, name: str) -> tuple[int, ...]:
        """Ranks that hold the tensor ``name``, in ascending order; the first is its owner."""
        ranks = {rank for (_, s), rank in self.schedule.rank_of.items() if self.pieces[s].holds(name, self.cfg)}
        return tuple(sorted(ranks))

    def pieces_of(self, rank: int) -> list[Piece]:
        return [self.pieces[s] for _, s in self.schedule.stages_of(rank)]


def choose_micro_batches(config: TrainConfig, ranks: int, rows: int) -> int:
    """In how many micro-batches a global batch of ``rows`` sequences is cut: as few as possible of at most
    ``config.micro_batch`` rows, but two a rank at least, since fewer leave mostly bubble.

    Raises ValueError if the batch cannot be cut so.
    """
    name = config.pipeline
    fewest = max(2 * ranks, fewest_micro_batches(name, ranks), -(-rows // config.micro_batch))
    for count in range(fewest, rows + 1):
        if rows % count == 0:
            try:
                check_request(name, ranks, count, config.pipeline_chunks)
            except ValueError:
                continue
            return count
    raise ValueError(
        f"a global batch of {rows} sequences cannot be cut into micro-batches of equal size for {name} on {ranks} ranks: "
        f"allowed is a multiple of {2 * ranks}, as in --recipe.batch {4 * ranks} --recipe.batch-start {2 * ranks}"
        f" (micro_batch={config.micro_batch} sequences at most)")  # fmt: skip


class PipelineOptimizer(Optimizer):
    """AdamW over this rank's parameters; gradients are clipped by the norm over all ranks."""

    def __init__(self, model: Transformer, config: OptimConfig, layers: int, owned: set[str], group):
        super().__init__(model, config, layers)
        self.owned, self.group = owned, group

    def total_norm(self) -> Tensor:
        """Every parameter counts once: with the rank that owns it."""
        grads = [m.grad for name, m in self.masters.items() if name in self.owned and m.grad is not None]
        device = next(iter(self.masters.values())).device
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        square = norm.to(device, torch.float64).square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt().float()


class Pipeline:
    """This rank's part of the model, and the global batch's gradient in it.

    pipeline = Pipeline(placement, config, device)       # after torch.manual_seed and init_process_group
    result = pipeline.compute_gradients(tokens, document_ids, mtp_lambda)         # on every rank, with the same batch
    moved = pipeline.step(lr, gamma, result)
    """

    pipelines = 1  # side by side, each with a part of the batch

    def __init__(self, placement: Placement, config: TrainConfig, device: torch.device, group=None, overlap=None,
                 dtype: torch.dtype | None = None):  # fmt: skip
        self.placement, self.config, self.device, self.group, self.overlap = placement, config, device, group, overlap
        self.rank, self.cfg = dist.get_rank(group), placement.cfg
        self.dtype = dtype or DTYPES[config.resolved_precision]
        self.model = self._build().train()
        self.balancer = Balancer.install(self.model, config.balance)
        own = placement.schedule.stages_of(self.rank)
        self.stages = {(d, s): Stage(self.model, placement.pieces[s], config, self.balancer) for d, s in own}
        # Here FSDP2 will go: fully_shard(each layer), fully_shard(each Stage); experts ignored where they are spread.
        self.optimizer = self._optimizer()
        self._engines: dict[tuple[int, int, int], Engine] = {}

    def _build(self) -> RankModel:
        """This rank's stages, with the weights that one process would draw."""
        config, pieces = self.config, self.placement.pieces_of(self.rank)
        model = build_rank_model(self.cfg, pieces, self.device, self.dtype)
        if config.fp8 != "none" and any(piece.layer_indices(self.cfg) for piece in pieces):
            to_fp8(model, config.fp8)
        return model

    def _optimizer(self) -> Optimizer:
        names = [name for name, _ in self.model.named_parameters()]
        owned = {name for name in names if self.placement.holders(name)[0] == self.rank}
        self.shared = self._shared_groups()
        return PipelineOptimizer(self.model, self.config.optim, self.cfg.num_hidden_layers, owned, self.group)

    def _shared_groups(self) -> list[tuple[dist.ProcessGroup, list[str]]]:
        """A process group, with the names in it, for every set of ranks that hold parameters together. Groups are made by
        all ranks in the same order, as torch asks."""
        by_ranks: dict[tuple[int, ...], list[str]] = {}
        for name, _ in model_on_meta(self.cfg, self.dtype).named_parameters():
            holders = self.placement.holders(name)
            if len(holders) > 1:
                by_ranks.setdefault(holders, []).append(name)
        world = self.group or dist.group.WORLD
        found = []
        for ranks, members in sorted(by_ranks.items()):
            group = dist.new_group([dist.get_global_rank(world, rank) for rank in ranks])
            if self.rank in ranks:
                found.append((group, members))
        return found

    def engine(self, micro_batches: int, rows: int, length: int) -> Engine:
        """The executable schedule for so many micro-batches of ``rows`` x ``length`` tokens; made once."""
        key = (micro_batches, rows, length)
        if key not in self._engines:
            config, plan = self.config, self.placement.schedule
            schedule = build_schedule(plan.name, ranks=plan.ranks, micro_batches=micro_batches,
                                      chunks=config.pipeline_chunks)  # fmt: skip
            # The residual stream has the weights' dtype; autocast leaves it as it is.
            hidden = torch.empty(rows, length, self.cfg.hidden_size, dtype=self.dtype, device="meta")
            tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
            loss, count = torch.empty((), device="meta"), plan.directions * plan.stages
            stages = [
                DirectedStage(
                    stage, d * plan.stages + s, plan.stages, count, self.device,
                    tokens if stage.piece.is_first else hidden.requires_grad_(),
                    loss.requires_grad_() if stage.piece.is_last else hidden.requires_grad_(), self.group,
                    self.optimizer.accumulate)
                for (d, s), stage in self.stages.items()]  # fmt: skip
            self._engines[key] = Engine(schedule, stages, self.overlap)
        return self._engines[key]

    def compute_gradients(self, tokens: np.ndarray | Tensor, document_ids: np.ndarray | Tensor, mtp_lambda: float,
                          micro_batches: int | None = None) -> StepResult:  # fmt: skip
        """Leave the gradient of a global batch (B, T + 1) in the optimizers of all ranks (times their loss scale). Returns
        losses and loads of the whole batch on every rank. All ranks are given the same batch."""
        inputs, labels, ids = split_rows(tokens, document_ids, self.config.document_mask, self.device)
        rows, counted = len(inputs), (labels != IGNORE).sum().clamp_min(1)
        inputs, labels, ids = map(self._own_rows, (inputs, labels, ids))
        inputs = inputs.contiguous()  # stages are promised dense rows, and torch 2.11 holds us to it
        count = micro_batches or choose_micro_batches(self.config, self.placement.schedule.ranks, len(inputs))
        if len(inputs) % count:
            raise ValueError(f"micro_batches={count}: allowed is a divisor of the batch's {len(inputs)} rows")
        size = len(inputs) // count
        engine = self.engine(count, size, inputs.shape[1])
        cut = [MicroBatch(inputs[a : a + size], labels[a : a + size], ids[a : a + size],
                          (labels[a : a + size] != IGNORE).sum() / counted, size / rows)
               for a in range(0, len(inputs), size)]  # fmt: skip
        numbers = engine.numbers
        for (direction, _), stage in self.stages.items():
            feed = [cut[m] for m, (d, _) in sorted(numbers.items()) if d == direction]
            stage.begin(feed, mtp_lambda, self.optimizer.scale)
        low = self.model.experts() if self.config.resolved_precision == "bf16-autocast" else []
        with copied_once(low), quantised_once(self.model):
            engine.run()
        self._sum_shared()
        return self._collect(mtp_lambda, count)

    def step(self, lr: float, gamma: float, result: StepResult) -> bool:
        """Clip, update weights, move the bias of this rank's routers; False if a gradient or the loss was not finite."""
        moved = self.optimizer.step(lr, apply=bool(np.isfinite(result.total)))
        own = self.model.moe_layers()
        if moved and own:
            self.balancer.update(result.loads[own], gamma)
        return moved

    def _own_rows(self, batch: Tensor) -> Tensor:
        """The part of a global batch that this pipeline works on: here all of it."""
        return batch

    def _sum_everywhere(self, tensor: Tensor) -> None:
        """The sum over all ranks of the run, in place."""
        dist.all_reduce(tensor, group=self.group)

    @torch.no_grad()
    def _sum_shared(self) -> None:
        """Add up the gradients of parameters that several ranks hold: mirror ranks, and the embedding's two ends."""
        for group, names in self.shared:
            works = []
            for name in names:
                master = self.optimizer.masters[name]
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                master.grad = master.grad.contiguous()  # W leaves products as they came; NCCL adds dense tensors alone
                works.append(dist.all_reduce(master.grad, group=group, async_op=True))
            for work in works:
                work.wait()

    def _collect(self, mtp_lambda: float, micro_batches: int) -> StepResult:
        """Losses and loads of the global batch, summed over stages, directions and ranks; the same on every rank."""
        depth, e = self.cfg.num_nextn_predict_layers, self.cfg.n_routed_experts
        places = [i for i in range(self.cfg.num_hidden_layers + depth) if self.cfg.is_moe_layer(i)]
        losses = torch.zeros(2 + depth, dtype=torch.float64, device=self.device)
        table = torch.zeros(len(places), e + len(MEASURES), dtype=torch.float64, device=self.device)
        for stage in self.stages.values():
            losses[0] += stage.loss_sum
            losses[1] += stage.balance_sum
            for row in stage.mtp_sums:
                for k, one in enumerate(row):
                    losses[2 + k] += one
            if sums := stage.meter.sums:
                own = [places.index(i) for i in stage.piece.layer_indices(self.cfg) if self.cfg.is_moe_layer(i)]
                table[own] += torch.cat([sums["load"], *(sums[name].unsqueeze(1) for name in MEASURES)], dim=1)
        self._sum_everywhere(losses)
        self._sum_everywhere(table)
        meter = LoadMeter(self.cfg, batches=micro_batches * self.pipelines)
        if places:
            meter.sums = {"load": table[:, :e].long()} | {name: table[:, e + i] for i, name in enumerate(MEASURES)}
        loss, balance, *mtp = losses.tolist()
        total = loss + balance + (mtp_lambda * sum(mtp) / depth if depth else 0.0)
        return StepResult(total=total, loss=loss, mtp_losses=mtp, balance_loss=balance, meter=meter)

    def gather_model(self) -> Transformer | None:
        """On rank 0 the whole model, on the CPU; None elsewhere. All ranks call it."""
        whole = model_on_meta(self.cfg, self.dtype)
        found = self.gather(self.model.state_dict(), whole.state_dict())
        if found is None:
            return None
        whole.load_state_dict(found, assign=True)
        if self.cfg.tie_word_embeddings:
            whole.lm_head.weight = whole.model.embed_tokens.weight
        return whole

    def gather_gradients(self) -> dict[str, Tensor] | None:
        """On rank 0 the gradient of every parameter, float32 (or the model's dtype); None elsewhere. All ranks call it."""
        masters = self.optimizer.masters
        whole = model_on_meta(self.cfg, next(iter(masters.values())).dtype)
        return self.gather({name: master.grad for name, master in masters.items()}, dict(whole.named_parameters()))

    @torch.no_grad()
    def gather(self, tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Every tensor named in ``like``, which has its shape and dtype, from the rank that owns it to rank 0, on the CPU;
        None elsewhere. Names are a parameter's, or KIND/ before it. All ranks call it."""
        world, found = self.group or dist.group.WORLD, {}
        for name, wanted in like.items():
            owner = self.placement.holders(name.split("/")[-1])[0]
            if self.rank == owner == 0:
                found[name] = tensors[name].detach().to("cpu", copy=True)
            elif self.rank == owner:
                transfer(dist.isend, tensors[name].detach().to(self.device), dist.get_global_rank(world, 0), self.group)
            elif self.rank == 0:
                value = torch.empty(wanted.shape, dtype=wanted.dtype, device=self.device)
                transfer(dist.irecv, value, dist.get_global_rank(world, owner), self.group)
                found[name] = value.cpu()
        return found if self.rank == 0 else None
