"""The whole model: embedding, layers, norm, head, and the MTP modules behind [V3 section 2].

One class serves training, prefill, decoding, pipeline stages and checkpoints. Its parameter names are the published
checkpoint's; an MTP module is layer ``num_hidden_layers + k``.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minids.config import ModelConfig
from minids.kernels import uses_kernels
from minids.model.attention import causal_mask
from minids.model.block import Block, Context
from minids.model.cache import LatentCache
from minids.model.check import check_indices
from minids.model.layers import RMSNorm
from minids.model.linear import Linear
from minids.model.loss import IGNORE, linear_cross_entropy
from minids.model.moe import Experts
from minids.model.mtp import MTPModule, mtp_loss
from minids.model.mtp_cached import mtp_all
from minids.model.rope import rope_table
from minids.model.router import Gate, Routing


@dataclass
class ModelOutput:
    """What a pass returns. Without labels the logits; with labels the losses instead, whose logits are never all held."""

    logits: Tensor | None = None  # (B, T, V), or (B, 1, V) with last_only
    # Depth k: (B, T - k, V), position i predicts token i+k+1. With a cache (B, T, V): token j predicts token j+1, position
    # i = j - k; tokens before a row's k-th have no such position, and their entries mean nothing.
    mtp_logits: list[Tensor] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)  # one a MoE layer, MTP modules last
    hidden: Tensor | None = None  # (B, T, D) after the final norm
    mtp_input: Tensor | None = None  # (B, T, D) h^0 as MTP reads it: ``hidden``, or before the norm without mtp_hidden_norm
    loss: Tensor | None = None  # mean next-token loss in nats
    mtp_loss: Tensor | None = None  # mean over depths, not multiplied by lambda
    mtp_losses: list[Tensor] = field(default_factory=list)  # one a depth

    def loads(self) -> Tensor:
        """(MoE layers, E) int64: tokens each expert received in this pass."""
        return torch.stack([routing.load for routing in self.routing])


class Trunk(nn.Module):
    """The published ``model.*``: embedding, layers (MTP modules last), final norm."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        main = [Block(cfg, i) for i in range(cfg.num_hidden_layers)]
        mtp = [MTPModule(cfg, cfg.num_hidden_layers + k) for k in range(cfg.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(main + mtp)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Transformer(nn.Module):
    """DeepSeek-V3 of any size. Device and dtype come from torch's own contexts (``with torch.device("meta")``).

    Weights are drawn from N(0, initializer_range^2), norms are 1 [V3 4.2]; seed with ``torch.manual_seed``.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.model = Trunk(cfg)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew from the global generator, in the order of ``named_parameters``."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.device.type != "meta":
                parameter.normal_(0.0, self.cfg.initializer_range)

    @property
    def main_layers(self) -> list[Block]:
        return list(self.model.layers[: self.cfg.num_hidden_layers])

    @property
    def mtp_modules(self) -> list[MTPModule]:
        return list(self.model.layers[self.cfg.num_hidden_layers :])

    def routers(self) -> list[Gate]:
        """The gates, in the order of ``ModelOutput.routing``."""
        return [layer.mlp.gate for layer in self.model.layers if layer.is_moe]

    def experts(self) -> list[Experts]:
        """The stacked experts, in the same order."""
        return [layer.mlp.experts for layer in self.model.layers if layer.is_moe]

    def forward(self, tokens: Tensor, *, labels: Tensor | None = None, document_ids: Tensor | None = None,
                document_mask: bool = True, cache: LatentCache | None = None, n_valid: Tensor | None = None,
                last_only: bool = False, mtp: bool | None = None, absorb: bool | None = None,
                recompute: bool = False) -> ModelOutput:  # fmt: skip
        """One pass over ``tokens`` (B, T) int64.

        labels: (B, T) int64, token i+1 at position i, -100 where none counts; losses are returned instead of logits.
        document_ids: (B, T) or (B, T + 1) int64 for rows packed from several documents, a run of equal ids each.
            Attention and positions stay inside a document unless ``document_mask`` is False (V3 pre-trains so); MTP
            labels never leave it.
        cache: the tokens continue each row of it. n_valid (B,): how many tokens of each row are real, the rest being
            padding on the right. last_only: logits of each row's last real token only.
        mtp: run the MTP modules; by default when there is no cache. With one, it must have been made with ``mtp=True``,
            and every earlier call on it must have run them too.
        absorb: absorbed attention; by default when a cache holds tokens already.
        recompute: keep only each layer's input for backward and run the layer again there.
        Raises ValueError for shapes, dtypes and lengths that do not fit.
        """
        self._check(tokens, labels, document_ids, cache, n_valid, mtp)
        context = self._context(tokens, document_ids if document_mask else None, cache, absorb)
        out = ModelOutput()
        x, delta = self.model.embed_tokens(tokens), None
        unsummed = cache is None and uses_kernels(x)
        for layer in self.main_layers:
            x = self._run(layer, (x, context, delta, unsummed), out, recompute)
            x, delta = x if unsummed else (x, None)
        x, out.hidden = self.model.norm(x, delta, residual=True) if unsummed else (x, self.model.norm(x))
        out.mtp_input = out.hidden if self.cfg.mtp_hidden_norm else x
        mtp_hidden = []
        if cache is None and mtp is not False:
            mtp_hidden = self._mtp(tokens, out.mtp_input, context, out, recompute)
        elif cache is not None:
            start, end = cache.lengths, cache.filled + tokens.shape[1]
            cache.advance(tokens.shape[1], n_valid)
            if mtp:
                mtp_hidden = mtp_all(self, tokens, out.mtp_input, cache, start, end, n_valid, context.absorb, out)
        if labels is None:
            out.logits = self.lm_head(_last(out.hidden, n_valid) if last_only else out.hidden)
            out.mtp_logits = [self.lm_head(_last(hidden, n_valid) if last_only else hidden) for hidden in mtp_hidden]
        else:
            total = linear_cross_entropy(out.hidden, self.lm_head.weight, labels)
            out.loss = total / (labels != IGNORE).sum().clamp_min(1)
            if mtp_hidden:
                out.mtp_loss, out.mtp_losses = mtp_loss(mtp_hidden, self.lm_head.weight, labels, document_ids)
        return out

    def _mtp(self, tokens: Tensor, hidden: Tensor, context: Context, out: ModelOutput, recompute: bool) -> list[Tensor]:
        """Normed hidden states of each depth, (B, T - k, D); depth k drops the last k positions, which have no token
        i+k to read. Rows shorter than a depth end the chain."""
        found = []
        for depth, module in enumerate(self.mtp_modules[: tokens.shape[1] - 1], start=1):
            length = tokens.shape[1] - depth
            embedded = self.model.embed_tokens(tokens[:, depth:])
            hidden = self._run(module, (hidden[:, :length], embedded, context.first(length)), out, recompute)
            normed = module.shared_head["norm"](hidden)
            hidden = normed if self.cfg.mtp_hidden_norm else hidden
            found.append(normed)
        return found

    def _run(self, layer: Block, inputs: tuple, out: ModelOutput, recompute: bool) -> Tensor:
        if recompute and torch.is_grad_enabled():
            x, routing = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            x, routing = layer(*inputs)
        if routing is not None:
            out.routing.append(routing)
        return x

    def _context(self, tokens: Tensor, document_ids: Tensor | None, cache: LatentCache | None,
                 absorb: bool | None) -> Context:  # fmt: skip
        """Positions, rotation table and mask that all layers share."""
        t, device = tokens.shape[1], tokens.device
        if cache is not None:
            positions, table, mask = cache.place(t)
            return Context(table, mask, cache, positions, cache.filled > 0 if absorb is None else absorb)
        positions, mask = torch.arange(t, device=device).unsqueeze(0), None
        if document_ids is not None:
            positions, mask = document_positions(document_ids[:, :t])
        return Context(rope_table(self.cfg, positions), mask, absorb=bool(absorb))

    def _check(self, tokens, labels, document_ids, cache, n_valid, mtp) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[1] == 0:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} and {tokens.dtype}: allowed is (B, T) int64, T > 0")
        b, t = tokens.shape
        if t > self.cfg.max_position_embeddings:
            raise ValueError(f"rows of {t} tokens: allowed are max_position_embeddings="
                             f"{self.cfg.max_position_embeddings}")  # fmt: skip
        check_indices("tokens", tokens, self.cfg.vocab_size)
        if labels is not None:
            if labels.shape != tokens.shape or labels.dtype != torch.int64:
                raise ValueError(f"labels of shape {tuple(labels.shape)} and {labels.dtype}:"
                                 f" allowed is {(b, t)} int64, as tokens")  # fmt: skip
            check_indices("labels", labels, self.cfg.vocab_size, IGNORE)
        if document_ids is not None and tuple(document_ids.shape) not in ((b, t), (b, t + 1)):
            raise ValueError(f"document_ids of shape {tuple(document_ids.shape)}: allowed is {(b, t)} or {(b, t + 1)}")
        if cache is not None and (cache.rows != b or document_ids is not None or labels is not None):
            raise ValueError(f"a cache of {cache.rows} rows with tokens of {b} rows, labels or document_ids:"
                             " allowed is as many rows, and neither labels nor document_ids")  # fmt: skip
        if cache is not None and mtp and not cache.depths:
            raise ValueError("mtp=True with a cache made without the MTP layers: allowed is LatentCache(..., mtp=True)")
        if n_valid is not None and (cache is None or tuple(n_valid.shape) != (b,)):
            raise ValueError(f"n_valid of shape {tuple(n_valid.shape)}: allowed is {(b,)}, together with a cache")
        if n_valid is not None:
            check_indices("n_valid", n_valid, t + 1)


def document_positions(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """From ids (B, T) of packed documents: positions (B, T) that start at 0 in each run of equal ids, and the bool mask
    (B, 1, T, T) that keeps attention causal and inside the run."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    positions = index - torch.where(starts, index, 0).cummax(1).values
    run = starts.cumsum(1)
    same = run.unsqueeze(2) == run.unsqueeze(1)
    return positions, (same & causal_mask(len(index), len(index), index.device)).unsqueeze(1)


def _last(hidden_BTD: Tensor, n_valid: Tensor | None) -> Tensor:
    """(B, 1, D): each row's last real token."""
    if n_valid is None:
        return hidden_BTD[:, -1:]
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), n_valid - 1].unsqueeze(1)
