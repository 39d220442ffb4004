"""Expert parallelism: every GPU keeps a slice of each layer's experts, and tokens come to them [V3 section 3.2].

    shard_experts(model, mesh)       a Transformer becomes one rank's part of it, in place

The problem: 256 experts a layer are 97% of V3's weights, and no GPU holds them. Here rank r of an expert group keeps
experts r E / EP to (r + 1) E / EP; a layer's forward sends its tokens' rows to the experts' ranks, runs the experts there
as on one GPU, by the same kernels, and brings the results back. Router, attention, norms and the shared expert stay whole
on every rank. The model is the same class with the same parameter names; only the experts' tensors are shorter.

Gradients. Let the loss be that of the global batch: a sum over ranks of parts, each weighed by the global count of labels.
Backward of the parts, all ranks at once, leaves on a rank

    of the whole weights     the gradient of its own tokens:             sum over all DP data ranks
    of its experts           the gradient of all the group's tokens:     sum over its DP / EP replicas alone

because rows came from the whole expert group, and so do their gradients. Both sums are plain sums, nothing is divided. Who
averages losses over ranks, and therefore divides the gradients of whole weights by DP, has to divide those of experts by
DP too, not by the DP / EP ranks that they are summed over: the factor EP that is so easily lost.

Shapes: N tokens here, R rows received, M choices that this rank's experts work on, K chosen, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minids.fp8.feedforward import Fp8Experts
from minids.model.attention import LatentCache
from minids.model.moe import Experts, MoE
from minids.model.router import Routing, count_load
from minids.model.transformer import Transformer
from minids.parallel.dispatch import FlatDispatch, Wire, sum_rows
from minids.parallel.mesh import Mesh
from minids.parallel.peers import Peers, Tally
from minids.parallel.two_hop import TwoHopDispatch
from minids.pipeline.stages import RankModel

ROADS = ("flat", "once", "two_hop")


Road = FlatDispatch | TwoHopDispatch


def build_road(mesh: Mesh, n_experts: int, kind: str = "two_hop", wire: Wire | None = None) -> Road:
    """How rows travel: "flat" (a row a choice), "once" (a row a GPU) or "two_hop" (a row a node, then a row a GPU)."""
    mesh.layout.check_experts(n_experts)
    if kind not in ROADS:
        raise ValueError(f"dispatch={kind!r}: allowed are {', '.join(ROADS)}")
    if kind == "two_hop":
        return TwoHopDispatch(mesh.peers["node"], mesh.peers["gpu"], n_experts, wire)
    return FlatDispatch(mesh.peers["ep"], n_experts, kind == "once", wire)


class _SumChoices(torch.autograd.Function):
    """out[r] = sum over the choices m of row r of y[m]; backward copies."""

    @staticmethod
    def forward(ctx, y_MD: Tensor, row_M: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(row_M)
        return sum_rows(y_MD, row_M, n)

    @staticmethod
    def backward(ctx, d_RD: Tensor):
        return d_RD.index_select(0, ctx.saved_tensors[0]), None, None


class _CopyRows(torch.autograd.Function):
    """x_M = x[row[m]]; backward sums, in FP32."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, row_M: Tensor) -> Tensor:
        ctx.save_for_backward(row_M)
        ctx.n = len(x_RD)
        return x_RD.index_select(0, row_M)

    @staticmethod
    def backward(ctx, d_MD: Tensor):
        return sum_rows(d_MD, ctx.saved_tensors[0], ctx.n), None


class _InStep(torch.autograd.Function):
    """x -> x, behind the last all-to-all of a layer. Where activations are recomputed, that begins when backward asks for
    the first saved tensor, and ends with the last one. A rank without rows saves none between its all-to-alls: it would
    begin and end elsewhere than the others. This tensor, of no numbers, is the last saved and first asked for on all."""

    @staticmethod
    def forward(ctx, x_ND: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND.new_empty(0))
        return x_ND.view_as(x_ND)

    @staticmethod
    def backward(ctx, d_ND: Tensor):
        _ = ctx.saved_tensors
        return d_ND


class _Sharded:
    """Before a kind of experts in the list of bases: rows come from the expert group, and go back to it."""

    held: range  # the experts of this rank
    road: Road

    def forward(self, x_ND: Tensor, routing: Routing, cache: LatentCache | None = None, layer: int = 0) -> Tensor:
        """sum_k g_k Expert_k(x), (N, D). All ranks of the expert group call it together, with tokens of their own. The
        cache is not used: what decoding prepares there counts on the same rows each time."""
        device, own = x_ND.device.type, x_ND.dtype
        if torch.is_autocast_enabled(device):  # the products would round it so: fewer bytes to send
            x_ND = x_ND.to(torch.get_autocast_dtype(device))
        arrived = self.road.send(x_ND, routing.weights.float(), routing.indices)
        y_RD = self._run(arrived.x_RD, arrived.gates_RK, arrived.experts_RK - self.held.start)
        out = _InStep.apply(arrived.back(y_RD))
        return out if torch.is_autocast_enabled(device) else out.to(own)

    def _run(self, x_RD: Tensor, gates_RK: Tensor, local_RK: Tensor) -> Tensor:
        """(R, D): each row's sum over those of its experts that are here."""
        mine_RK = (local_RK >= 0) & (local_RK < len(self.held))
        row_M, k_M = mine_RK.nonzero(as_tuple=True)
        if not len(row_M):
            return self._run_nothing(x_RD, gates_RK)
        expert_M1, gate_M1 = local_RK[row_M, k_M].unsqueeze(1), gates_RK[row_M, k_M].unsqueeze(1)
        routing = Routing(gate_M1, expert_M1, gate_M1.detach(), count_load(expert_M1, len(self.held)))
        self.source = None  # FP8 may keep what x was made from in its place; rows were made elsewhere
        if mine_RK.shape[1] == 1:  # a row for each choice
            return super().forward(x_RD, routing)
        y_MD = super().forward(_CopyRows.apply(x_RD, row_M), routing)
        return _SumChoices.apply(y_MD, row_M, len(x_RD))

    def _run_nothing(self, x_RD: Tensor, gates_RK: Tensor) -> Tensor:
        """No token wants this rank's experts: zeros, with a place in the graph, because the others' backward waits for this
        rank's part in theirs. The experts' gradients are zeros."""
        nothing = sum(p.flatten()[:1].sum() for p in (self.gate_up_proj, self.down_proj)) + gates_RK.sum() + x_RD.sum()
        return x_RD + (0.0 * nothing).to(x_RD.dtype)


class ShardedExperts(_Sharded, Experts):
    """A rank's experts: ``gate_up_proj`` (E / EP, 2F, D) and ``down_proj`` (E / EP, D, F)."""


class ShardedFp8Experts(_Sharded, Fp8Experts):
    """The same in FP8; with `Wire.v3()` the products read the very numbers that were sent."""


SHARDED = {Experts: ShardedExperts, Fp8Experts: ShardedFp8Experts}


def shard_experts(model: Transformer, mesh: Mesh, dispatch: str = "two_hop", wire: Wire | None = None) -> Transformer:
    """Leaves in each MoE layer of ``model`` only the experts of this rank, and makes tokens travel; returns ``model``.

    Args:
        model: the whole model, or with a pipeline a rank's stages of it (`minids.pipeline.stages.RankModel`), the same on
            all ranks of the expert group, with weights or on "meta"; in FP8 or not (`minids.fp8.to_fp8` first). Make the
            optimizer afterwards: the experts' parameters are new.
        dispatch: "flat", "once" or "two_hop"; see minids/parallel/dispatch.py. wire: what rows are on their way.

    Raises:
        ValueError: the experts do not divide over the group, or are sharded already.
    """
    n_experts = model.cfg.n_routed_experts
    mesh.layout.check_experts(n_experts)
    if mesh.layout.pp > 1 and not isinstance(model, RankModel):
        raise ValueError(f"pp={mesh.layout.pp}: allowed is 1 for a whole model")
    for moe in moe_layers(model):
        if type(moe.experts) not in SHARDED:
            allowed = ", ".join(kind.__name__ for kind in SHARDED)
            raise ValueError(f"experts are {type(moe.experts).__name__}: allowed are {allowed}")
    road = build_road(mesh, n_experts, dispatch, wire)
    for moe in moe_layers(model):
        moe.experts = _slice(moe.experts, mesh.experts(n_experts), road)
    return model


def _slice(whole: Experts, held: range, road: Road) -> Experts:
    kind = type(whole)
    part = SHARDED[kind].__new__(SHARDED[kind])
    nn.Module.__init__(part)
    for name, weight in (("gate_up_proj", whole.gate_up_proj), ("down_proj", whole.down_proj)):
        kept = weight.detach()[held.start : held.stop].clone()
        setattr(part, name, nn.Parameter(kept, requires_grad=weight.requires_grad))
    if kind is Fp8Experts:
        part.recipe, part.quantised = whole.recipe, tuple(type(one)() for one in whole.quantised)
    part.copies, part.source, part.held, part.road = None, None, held, road
    return part.train(whole.training)


def moe_layers(model: Transformer) -> list[MoE]:
    return [layer.mlp for layer in model.model.layers if layer.is_moe]


def is_expert(name: str) -> bool:
    """Whether a parameter is a routed expert's: its first dimension is spread over the expert group."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def tally_of(model: Transformer) -> Tally:
    """What this rank has sent since the model was sharded (or `Tally.clear`): one of all layers; an empty one if it has
    none with experts."""
    return next((moe.experts.road.tally for moe in moe_layers(model)), Tally())


@torch.no_grad()
def sum_gradients(named: Iterable[tuple[str, Tensor]], mesh: Mesh) -> None:
    """Sums ``grad`` of the tensors in place: of experts over their replicas, of all others over all data ranks. A tensor
    without a gradient here counts as zeros, since it may have one elsewhere."""
    for name, tensor in named:
        peers: Peers = mesh.peers["replica" if is_expert(name) else "data"]
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
        if peers.size > 1:
            tensor.grad = peers.all_reduce(tensor.grad.contiguous())
