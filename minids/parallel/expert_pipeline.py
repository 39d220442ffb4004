"""Pipelines side by side that share their experts: V3's layout whole, PP x EP x ZeRO-1 [V3 section 3.2].

The problem: V3 needs both. 61 layers go over 16 pipeline ranks, a layer's experts over 64 GPUs, and each weight is there
for 128 data ranks. Here nothing is new, three parts are put together. A rank has two coordinates (mesh.py):

    pipeline     ranks of one data coordinate    a row of a schedule each; hidden states travel between them
    stage        ranks of one pp coordinate      the same layers, each for the rows of its own pipeline; tokens travel to
                                                 experts within an expert group of them

Each pipeline takes its share of the global batch's rows and runs the schedule as minids/pipeline/runtime.py does; inside of
a stage the experts are those of experts.py. Sums go over all ranks that hold the same weight:

    weight                    ranks of a pipeline that hold it         times
    of a routed expert        its stage's; in DualPipe the mirror      the replicas of its experts
    of any other kind         rank's too; embedding: both ends         all data ranks

and by this one rule gradients are added up, and the optimizer's state is cut (ZeRO-1): DualPipe's two copies of a stage
keep one set of masters and moments between them, as planner.py counts. Every number of it lies on one rank of the world,
so the norm that clips is the root of the sum over all ranks, each parameter counted once. Loads are summed over all data
ranks, stages and both directions before the bias moves.

Why nothing waits in a circle. A chunk now has all-to-alls, which the ranks of an expert group must enter in one order, and
a rank of DualPipe has two chunks under way, of two directions. But the ranks of an expert group stand at the same place of
their pipelines, which run one schedule with equally many micro-batches: they execute the same list of actions, and inside
of an action the same layers in the same order, since the all-to-alls of a micro-batch hang on one chain, forward and
backward (a W has none, but in the first stage, where it is the whole backward). A rank whose experts nobody wants calls
all the same. And the lists of one pipeline, with the messages between its stages, are parts of one common sequence
(lower.py). Put in it, for each action, the calls that it makes: all that any rank of the world waits for is then a part of
one sequence. A rank can be late, but the one that is furthest behind waits for nobody.

Simplifications: a rank draws its stages' experts whole for a moment, and keeps its own; a checkpoint is gathered on rank 0;
the two halves of an overlapped pair run one after the other (torch_engine.py). With --fp8 routed experts' gradients differ
from those of one process by FP8's rounding, since the 128 tokens that share a scale are others; nothing else does.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minids.parallel.dispatch import Wire
from minids.parallel.experts import is_expert, shard_experts
from minids.parallel.mesh import Mesh
from minids.parallel.peers import Peers, ProcessPeers
from minids.parallel.step import check_balance, check_batch, experts_to_first
from minids.parallel.zero import ZeroOptimizer
from minids.pipeline.runtime import Pipeline, Placement
from minids.pipeline.stages import RankModel, model_on_meta
from minids.train.optim import FULL, OptimConfig
from minids.train.settings import TrainConfig

Held = dict[tuple[tuple[int, ...], bool], Peers]


def connect_holders(placement: Placement, mesh: Mesh, names: Iterable[str]) -> Held:
    """My peers for parameters that several ranks of a pipeline hold: (those ranks, whether experts) -> all ranks of the
    world that hold the same. Groups are made by all ranks in the same order, as torch asks."""
    found: Held = {}
    for holders, spread in sorted({(placement.holders(name), is_expert(name)) for name in names}):
        if len(holders) > 1:
            at = mesh.layout.grid[list(holders)].flatten(2)  # (holders, replicas, ranks of an expert group)
            for ranks in (at.permute(2, 0, 1).flatten(1) if spread else at.flatten().unsqueeze(0)).tolist():
                group = dist.new_group(ranks)
                if mesh.rank in ranks:
                    found[holders, spread] = ProcessPeers(group)
    return found


class StageOptimizer(ZeroOptimizer):
    """ZeRO-1 by stage: the state of a weight is cut over all ranks of the world that hold it."""

    def __init__(self, model: nn.Module, config: OptimConfig, layers: int, *, mesh: Mesh, placement: Placement, held: Held):
        self.placement, self.held = placement, held
        super().__init__(model, config, layers, mesh=mesh)

    def peers_of(self, name: str) -> Peers:
        return self.held.get((self.placement.holders(name), is_expert(name))) or super().peers_of(name)


class ExpertPipeline(Pipeline):
    """This rank's stages of its pipeline, with its share of their experts, and the global batch's gradient in them.

    engine = ExpertPipeline(placement, config, mesh)     # after torch.manual_seed, the same on all ranks
    result = engine.compute_gradients(tokens, document_ids, mtp_lambda)           # on every rank, with the same batch
    moved = engine.step(lr, gamma, result)
    """

    def __init__(self, placement: Placement, config: TrainConfig, mesh: Mesh, dispatch: str = "two_hop",
                 wire: Wire | None = None, overlap: Callable | None = None, dtype: torch.dtype | None = None):  # fmt: skip
        """``placement``: planned for ``mesh.layout.pp`` ranks; ``dispatch``, ``wire``: as in `shard_experts`."""
        if placement.schedule.ranks != mesh.layout.pp:
            raise ValueError(f"pp={mesh.layout.pp}: allowed is {placement.schedule.ranks}, the ranks of the schedule")
        check_balance(config, placement.cfg)
        self.mesh, self.dispatch, self.wire, self.pipelines = mesh, dispatch, wire, mesh.layout.dp
        super().__init__(placement, config, torch.device(config.device), mesh.peers["pp"].group, overlap, dtype)

    def _build(self) -> RankModel:
        return shard_experts(super()._build(), self.mesh, self.dispatch, self.wire)

    def _optimizer(self) -> StageOptimizer:
        names = [name for name, _ in model_on_meta(self.cfg, self.dtype).named_parameters()]
        return StageOptimizer(self.model, self.config.optim, self.cfg.num_hidden_layers, mesh=self.mesh,
                              placement=self.placement, held=connect_holders(self.placement, self.mesh, names))  # fmt: skip

    def _own_rows(self, batch: Tensor) -> Tensor:
        check_batch(len(batch), self.pipelines)
        return batch.chunk(self.pipelines)[self.mesh.peers["data"].rank]

    def _sum_everywhere(self, tensor: Tensor) -> None:
        self.mesh.peers["world"].all_reduce(tensor)

    def _sum_shared(self) -> None:
        """Nothing: the optimizer adds up while it cuts."""

    def gather_gradients(self) -> dict[str, Tensor] | None:
        """On rank 0 the gradient of every parameter, float32 (or the model's dtype); None elsewhere. All ranks call it,
        before the step; the optimizers keep what they have."""
        found, like = self.optimizer, self.dtype if self.dtype in FULL else torch.float32
        summed = {name: found.peers_of(name).all_reduce(found.own_gradient(name).clone()) for name in found.params}
        return self.gather(summed, dict(model_on_meta(self.cfg, like).named_parameters()))

    @torch.no_grad()
    def gather(self, tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """As `Pipeline.gather`: experts are put together within their expert group, and what the first pipeline has then
        goes to rank 0."""
        found: dict[str, Tensor] = {}
        for name, wanted in like.items():
            mine = tensors.get(name)
            if is_expert(name) and wanted.ndim and self.rank == self.placement.holders(name.split("/")[-1])[0]:
                mine = experts_to_first(mine.detach().to(self.device), self.mesh.peers["ep"])
            if self.mesh.peers["data"].rank == 0:
                found |= super().gather({name: mine}, {name: wanted}) or {}
        return found if self.mesh.rank == 0 else None
