"""The model cut into pipeline stages, from outside: the same classes, the same parameter names.

Stage s of S holds a run of main layers; the first also the embedding, the last also the final norm, the head, all MTP
modules and the losses. What travels between stages is the hidden state (B, T, D) and nothing else: tokens, labels and
document ids are read by every rank, and each stage makes its own rotation table and mask.

    stage 0              embed_tokens, layers 0 ... a-1
    stage s              layers ...
    stage S-1            layers ... L-1, norm, lm_head, MTP modules (with embed_tokens again), loss

Why MTP lives with the last stage: it reads the hidden state behind the last layer and shares the head. It also reads the
embedding of the next token, so the embedding is needed at both ends. Where first and last stage share a rank (DualPipe,
and every V) both use one tensor [V3 sections 3.2 and 3.4: shallowest and deepest layers on the same rank]; elsewhere it is
there twice, and runtime.py sums the two gradients.

Every stage has losses of its own: the balance losses of its routers. They are added to the graph without touching the
hidden state, h = h + 0 * L with dh/dL = 1, so that the one backward pass through h carries them too.

A stage's state dict is a part of the checkpoint. Layers that live elsewhere leave an empty place, so that numbers stay.
Expert parallelism takes a rank's stages as it takes a whole model (minids/parallel/experts.py). FSDP2 is still to come:
`fully_shard` the layers of each Stage and the Stage itself before the optimizer is made (runtime.py has the line); the
list of actions has UNSHARD, RESHARD and REDUCE_GRAD in place already.

Shapes: B rows, T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minids.config import ModelConfig
from minids.model.balancer import Balancer
from minids.model.load import LoadMeter
from minids.model.loss import IGNORE, linear_cross_entropy
from minids.model.mtp import mtp_loss
from minids.model.transformer import ModelOutput, Transformer
from minids.train.settings import TrainConfig
from minids.train.step import autocast


@dataclass(frozen=True)
class Piece:
    """Which part of the model stage ``stage`` of ``stages`` holds."""

    stage: int
    stages: int
    layers: range  # main layers

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def layer_indices(self, cfg: ModelConfig) -> list[int]:
        """Main layers, and in the last stage the MTP modules."""
        mtp = range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers)
        return [*self.layers, *(mtp if self.is_last else ())]

    def has_embedding(self, cfg: ModelConfig) -> bool:
        return self.is_first or (self.is_last and bool(cfg.num_nextn_predict_layers or cfg.tie_word_embeddings))

    def holds(self, name: str, cfg: ModelConfig) -> bool:
        """Whether the parameter ``name`` (published) is used by this stage."""
        if name.startswith("model.layers."):
            return int(name.split(".")[2]) in self.layer_indices(cfg)
        return self.has_embedding(cfg) if name.startswith("model.embed_tokens.") else self.is_last


def split_layers(cfg: ModelConfig, stages: int, counts: Sequence[int] = ()) -> list[Piece]:
    """The pieces of all stages: equally many layers each, or ``counts``, one number a stage.

    Raises ValueError for layers that do not divide, and for counts that do not add up.
    """
    layers = cfg.num_hidden_layers
    if not counts:
        if layers % stages:
            raise ValueError(
                f"num_hidden_layers={layers} does not divide into {stages} stages: allowed is a multiple of {stages}, or a "
                f"split of your own, --pipeline-layers with {stages} numbers that sum to {layers}")  # fmt: skip
        counts = [layers // stages] * stages
    inner = counts[1:-1]
    if len(counts) != stages or sum(counts) != layers or min(counts) < 0 or (inner and min(inner) < 1):
        raise ValueError(
            f"pipeline_layers={tuple(counts)}: allowed are {stages} numbers that sum to num_hidden_layers={layers}, at "
            "least 1 each; 0 in the first (embedding alone) and in the last (head and MTP alone)")  # fmt: skip
    ends = [sum(counts[: s + 1]) for s in range(stages)]
    return [Piece(s, stages, range(ends[s] - counts[s], ends[s])) for s in range(stages)]


class Elsewhere(nn.Module):
    """The place of a module that another rank holds; it has no parameters."""

    is_moe = False


def keep(module: Transformer, pieces: Sequence[Piece], source: Transformer) -> None:
    """Fill ``module`` with those parts of ``source`` that ``pieces`` hold, and Elsewhere for the rest."""
    cfg = source.cfg
    kept = {i for piece in pieces for i in piece.layer_indices(cfg)}
    last = any(piece.is_last for piece in pieces)
    trunk = nn.Module()
    trunk.embed_tokens = source.model.embed_tokens if any(p.has_embedding(cfg) for p in pieces) else Elsewhere()
    trunk.layers = nn.ModuleList(layer if i in kept else Elsewhere() for i, layer in enumerate(source.model.layers))
    trunk.norm = source.model.norm if last else Elsewhere()
    module.cfg, module.model, module.lm_head = cfg, trunk, source.lm_head if last else Elsewhere()


class RankModel(Transformer):
    """All that one rank holds: the union of its stages, a Transformer with empty places."""

    def __init__(self, source: Transformer, pieces: Sequence[Piece]):
        nn.Module.__init__(self)
        keep(self, pieces, source)

    def moe_layers(self) -> list[int]:
        """Places of this rank's routers among all MoE layers of the model, in the order of ``routers()``."""
        cfg = self.cfg
        moe = [i for i in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers) if cfg.is_moe_layer(i)]
        return [moe.index(i) for i, layer in enumerate(self.model.layers) if layer.is_moe]


class _SameDraws(TorchDispatchMode):
    """While a model is built without storage: draw random numbers all the same, into scratch memory on ``device``, so that
    the generator ends where building the real model would leave it."""

    RANDOM = {torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default}

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.RANDOM:
            func(torch.empty(args[0].shape, dtype=args[0].dtype, device=self.device), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def model_on_meta(cfg: ModelConfig, dtype: torch.dtype) -> Transformer:
    """The whole model without storage: its names, shapes and dtypes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return Transformer(cfg)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def build_rank_model(cfg: ModelConfig, pieces: Sequence[Piece], device: torch.device, dtype: torch.dtype) -> RankModel:
    """The rank's part with the weights that ``Transformer(cfg)`` would draw from the same state of the global generator.

    Memory: the rank's own parameters and the largest tensor of the others, which are drawn and dropped.
    """
    with _SameDraws(device):
        whole = model_on_meta(cfg, dtype)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    model = RankModel(whole, pieces).to_empty(device=device)
    if cfg.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.model.embed_tokens.weight  # storage given out parameter by parameter has parted them
    own = dict(model.named_parameters())
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            if name in own:
                own[name].fill_(1.0)
        else:
            target = own[name] if name in own else torch.empty(shape, dtype=dtype, device=device)
            target.normal_(0.0, cfg.initializer_range)
    for gate in model.routers():
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.zero_()
    return model


@dataclass
class MicroBatch:
    """What every stage reads of one micro-batch."""

    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, -100 where none counts
    document_ids: Tensor  # (B, T + 1) int64
    label_share: Tensor  # (), its counted labels in those of the global batch
    row_share: float  # its rows in those of the global batch


class _AddLoss(torch.autograd.Function):
    """hidden, loss -> hidden. Backward hands the loss the gradient 1, as if it were added to the last stage's."""

    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.mark_dirty(hidden)  # the same tensor, not a view: torch's runtime detaches outputs in place
        return hidden

    @staticmethod
    def backward(ctx, d_hidden: Tensor):
        (loss,) = ctx.saved_tensors
        return d_hidden, torch.ones_like(loss)


class Stage(Transformer):
    """One stage for one direction. ``begin`` hands it the micro-batches of a step; the runtime sets ``current`` before each
    forward. It adds up its losses and loads; gradients go into the parameters, which it shares with its RankModel."""

    def __init__(self, model: RankModel, piece: Piece, config: TrainConfig, balancer: Balancer):
        nn.Module.__init__(self)
        keep(self, [piece], model)
        self.piece, self.config, self.balancer = piece, config, balancer
        self.current = 0
        # torch's weight backward frees the graph behind each use of a parameter, and cannot when one use of the embedding
        # lies behind another: a chain of two MTP modules, or one and a tied head. And it would run each block again for
        # every one of its weights, where activations are recomputed. Such a stage runs all its backward as I.
        uses = self.cfg.num_nextn_predict_layers + self.cfg.tie_word_embeddings
        self.splits = not (config.recompute or (piece.is_last and uses > 1))
        self.begin([], 0.0, 1.0)

    def begin(self, feed: list[MicroBatch], mtp_lambda: float, scale: float) -> None:
        """A new step: its micro-batches in this direction, the weight of MTP, the loss scale."""
        self.feed, self.mtp_lambda, self.scale = feed, mtp_lambda, scale
        self.loss_sum, self.balance_sum, self.mtp_sums = 0.0, 0.0, []
        self.meter = LoadMeter(self.cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) in the first stage, else hidden (B, T, D) -> hidden, or in the last stage the scaled loss ()."""
        batch, config, out = self.feed[self.current], self.config, ModelOutput()
        with autocast(config.resolved_precision, config.device):
            context = self._context(batch.tokens, batch.document_ids if config.document_mask else None, None, None)
            if self.piece.is_first:
                x = self.model.embed_tokens(x)
            for i in self.piece.layers:
                x = self._run(self.model.layers[i], (x, context), out, config.recompute)
            loss = self._token_losses(x, batch, context, out) if self.piece.is_last else 0.0
        balance = self.balancer.loss(out.routing, len(batch.tokens)) * batch.row_share
        self.balance_sum += balance.detach() if isinstance(balance, Tensor) else balance
        if out.routing:
            self.meter.add(out.routing)
        if self.piece.is_last:
            return self.scale * (loss + balance)
        return _AddLoss.apply(x, self.scale * balance) if isinstance(balance, Tensor) else x

    def _token_losses(self, x: Tensor, batch: MicroBatch, context, out: ModelOutput) -> Tensor:
        """Next-token and MTP loss of the micro-batch, weighed by its labels as in minids.train.step."""
        hidden, weight = self.model.norm(x), self.lm_head.weight
        counted = (batch.labels != IGNORE).sum().clamp_min(1)
        loss = batch.label_share * (linear_cross_entropy(hidden, weight, batch.labels) / counted)
        self.loss_sum += loss.detach()
        before = hidden if self.cfg.mtp_hidden_norm else x
        if mtp_hidden := self._mtp(batch.tokens, before, context, out, self.config.recompute):
            mean, losses = mtp_loss(mtp_hidden, weight, batch.labels, batch.document_ids)
            self.mtp_sums.append([batch.label_share * one.detach() for one in losses])
            loss = loss + self.mtp_lambda * batch.label_share * mean
        return loss
