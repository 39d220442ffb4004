"""One new token in each of many rows: a layer of a small model with as few calls as it takes.

In a rollout hundreds of rows decode together. Their products are large enough to be products (no bands, no sorting of
choices as for a few tokens), but in a small model a layer has sixty calls around them, and these are most of the time.
So attention_decode.py's folded attention is joined with what stands before and behind it:

    g_1, g_2         the norms' scales go into the matrices that read the norms' outputs: W diag(g)
    [s ; a ; u]      the router, and gate and up of the dense or shared net, read the same input: one product
    x + W h          a residual is added by the product that makes its summand (addmm)

The routed experts run as in moe_decode.py, turned. It is the same function, but for rounding; float32 inference on the
CPU only, and only where both of those files would take the layer. A fold belongs to a cache and is made anew when a weight
has changed (watch.py).

Shapes: B rows, D hidden, H heads, E experts, K chosen, F width of the dense or shared net, C latent, R rope dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.model import attention_decode, moe_decode
from minids.model.attention_decode import Folded
from minids.model.layers import MLP, normalise
from minids.model.moe import Experts, MoE
from minids.model.router import Routing, count_load
from minids.model.watch import Watch

if TYPE_CHECKING:
    from minids.model.block import Block, Context

ROWS = 16  # from which a layer runs so; with fewer each product is better chosen by itself


def weights(block: Block) -> list[Tensor]:
    """All that a fold is made of."""
    found = [block.input_layernorm.weight, block.post_attention_layernorm.weight, *block.self_attn.projections()]
    mlp = block.mlp
    if block.is_moe:
        found += [mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj]
        mlp = mlp.shared_experts
    return found if mlp is None else [*found, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]


class FoldedBlock:
    """One layer's weights, joined: ``attention`` with the first norm's scale in its ``down``; ``first`` (E + 2F, D) and
    ``second`` (D, F) of what follows, ``sizes`` the parts of the first's output; ``experts`` turned, or None."""

    def __init__(self, block: Block):
        self.watch, self.scale = Watch(weights(block)), block.self_attn.scale
        self.attention = Folded(block.self_attn, wide=True)
        self.attention.down = self.laid_out(self.attention.down * block.input_layernorm.weight)
        scale_D, self.experts, first = block.post_attention_layernorm.weight, None, []
        mlp = block.mlp
        if block.is_moe:
            first = [mlp.gate.weight]
            self.experts = moe_decode.Turned(mlp.experts.gate_up_proj, mlp.experts.down_proj)
            by_input_EDf = self.experts.gate_up.unflatten(0, (len(mlp.gate.weight), -1))
            self.experts.gate_up = (by_input_EDf * scale_D.unsqueeze(-1)).flatten(0, 1)
            mlp = mlp.shared_experts
        self.second = None
        if mlp is not None:
            first += [mlp.gate_proj.weight, mlp.up_proj.weight]
            self.second = self.laid_out(mlp.down_proj.weight)
        self.first, self.sizes = self.laid_out(torch.cat(first) * scale_D), [len(weight) for weight in first]

    @staticmethod
    def laid_out(weight_FD: Tensor) -> Tensor:
        return weight_FD.t().contiguous().t()

    def fresh(self, block: Block) -> bool:
        """Whether it was made from what ``block`` holds now."""
        return self.scale == block.self_attn.scale and self.watch.unchanged(weights(block))


def applies(block: Block, x_BTD: Tensor, context: Context) -> bool:
    """Whether `layer` is the way for this pass."""
    b, t, _ = x_BTD.shape
    if t != 1 or b < ROWS or not context.absorb or context.cache is None or block.training or torch.is_grad_enabled():
        return False
    mlp = block.mlp
    if type(mlp) is MoE:
        experts = mlp.experts
        if type(experts) is not Experts or not moe_decode.small(b * mlp.gate.cfg.num_experts_per_tok, experts.down_proj):
            return False
    elif type(mlp) is not MLP or 2 * mlp.gate_proj.weight.numel() > moe_decode.LARGE:  # in FP8, or too much to copy
        return False
    return attention_decode.applies(block.self_attn, x_BTD) and not block.input_layernorm.weight.is_inference()


def folded(block: Block, context: Context) -> FoldedBlock:
    """The layer's fold, made at the first step that wants it."""
    key = block.index, "block"
    fold = context.cache.folded.get(key)
    if fold is None or not fold.fresh(block):
        fold = context.cache.folded[key] = FoldedBlock(block)
    return fold


def layer(block: Block, x_B1D: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
    """What ``Block.forward`` returns for one token a row over a cache."""
    fold, x_BD = folded(block, context), x_B1D[:, 0]
    low = F.linear(normalise(x_BD, block.input_layernorm.eps_tensor), fold.attention.down)
    out = attention_decode.over_cache(block.self_attn, fold.attention, low.unsqueeze(1), context.rope, context.mask,
                                      context.cache, block.index, context.positions)  # fmt: skip
    x_BD = torch.addmm(x_BD, out, fold.attention.out.t())
    normed_BD = normalise(x_BD, block.post_attention_layernorm.eps_tensor)
    parts, routing = F.linear(normed_BD, fold.first).split(fold.sizes, dim=1), None
    if fold.second is not None:
        x_BD = torch.addmm(x_BD, F.silu(parts[-2]).mul_(parts[-1]), fold.second.t())
    if fold.experts is not None:
        routing = route(block.mlp.gate, parts[0])
        x_BD = x_BD.add_(moe_decode.bags(normed_BD, routing, fold.experts))
    return x_BD.unsqueeze(1), routing


def route(gate, logits_BE: Tensor) -> Routing:
    """What ``Gate.forward`` makes of its logits in inference."""
    scores_BE = gate.activate(logits_BE)
    indices_BK = gate.choose(scores_BE)
    load_E = count_load(indices_BK, logits_BE.shape[1])
    return Routing(gate.gate_values(scores_BE, indices_BK), indices_BK, scores_BE, load_E, logits_BE)
