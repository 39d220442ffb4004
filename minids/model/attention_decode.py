"""MLA for a few new tokens a row, with the small matrices multiplied into their neighbours beforehand.

Absorbed attention moves W_UK into the query and W_UV behind the sum, but still multiplies by them one after the other. For
one token on a CPU, or some drafts under verification, each of these products is so small that the call costs more than the
arithmetic. The matrices are fixed while a text is written, so they are *folded*, once a cache (g_q: the weight of the
query's norm, scale: the softmax's):

    [a ; c ; k^R] = [W_DQ ; W_DKV ; W_KR] x                            one product where three are written
    q_h = scale [W_UK,h^T W_UQ,h ; W_QR,h] diag(g_q) RMSNorm(a)        H (C + R) numbers, in the latent space already
    out = sum_h (W_O,h W_UV,h) (softmax(q_h . latent) c)               W_O and W_UV are one matrix

It is a trade: folded matrices are larger, W_UK^T W_UQ has H C rows for H N. In V3 it would triple the bytes of the query
(C = 512, N = 128), so `applies` folds only as long as the numbers read in addition cost less than the calls saved. In
float32 on the CPU only: in half precision the folded weights would be rounded once more than the model's own.

A fold belongs to a cache, whose latents were made with the same weights, and dies with it. Should a weight change before
that, the fold is made anew: every step asks (watch.py).

Shapes: B rows, T new tokens a row, D hidden, H heads, N/R/V head dims without/with RoPE/of values, C latent, Q query rank,
S cached tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minids.model.layers import normalise
from minids.model.linear import few_linear
from minids.model.watch import Watch

if TYPE_CHECKING:
    from minids.model.attention import MLA
    from minids.model.cache import Slots

EXTRA = 1 << 16  # numbers: what a core reads in about the time of the ten calls that a fold saves
WIDE = 8  # tokens from which the product wants the weight's transpose contiguous
FEW = 64  # tokens, in all rows, up to which calls and not arithmetic are most of the time, however large the fold


class Folded:
    """One layer's folded weights, each (outputs, inputs): ``down`` (Q + C + R, D), ``query`` (H (C + R), Q) and ``out``
    (D, H C). Without a low-rank query ``query`` is None and its rows are the first of ``down``."""

    def __init__(self, mla: MLA, wide: bool):
        self.wide, self.scale, self.watch = wide, mla.scale, Watch(mla.projections())
        cfg, heads = mla.cfg, mla.cfg.num_attention_heads
        w_uk, w_uv = mla.kv_b_proj.weight.unflatten(0, (heads, -1)).split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=1)
        project = mla.q_b_proj if cfg.q_lora_rank else mla.q_proj
        w_q, w_qr = project.weight.unflatten(0, (heads, -1)).split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=1)
        query = torch.cat([w_uk.transpose(1, 2) @ w_q, w_qr], dim=1).flatten(0, 1) * mla.scale
        first = query
        self.query = None
        if cfg.q_lora_rank:
            first, self.query = mla.q_a_proj.weight, self.laid_out(query * mla.q_a_layernorm.weight)
        self.down = self.laid_out(torch.cat([first, mla.kv_a_proj_with_mqa.weight]))
        w_o = mla.o_proj.weight.unflatten(1, (heads, -1)).transpose(0, 1)  # (H, D, V)
        self.out = self.laid_out((w_o @ w_uv).transpose(0, 1).flatten(1))
        self.sizes = [len(first), cfg.kv_lora_rank, cfg.qk_rope_head_dim]

    def laid_out(self, weight_FD: Tensor) -> Tensor:
        return weight_FD.t().contiguous().t() if self.wide else weight_FD.contiguous()

    def fresh(self, mla: MLA) -> bool:
        """Whether it was made from what ``mla`` holds now."""
        return mla.scale == self.scale and self.watch.unchanged(mla.projections())


def applies(mla: MLA, x_BTD: Tensor) -> bool:
    """Whether `attend_few` is the way: few tokens, or one in each of many rows, in float32 inference on the CPU, and
    matrices small enough."""
    b, t, _ = x_BTD.shape
    if (b * t > FEW and t > 1) or torch.is_grad_enabled() or not x_BTD.is_cpu or x_BTD.dtype != torch.float32:
        return False
    weight = mla.kv_b_proj.weight
    if weight.dtype != torch.float32 or weight.is_inference() or torch.is_autocast_enabled("cpu"):
        return False  # weights made in inference mode do not tell when they change
    more = more_numbers(mla)
    return more <= EXTRA and b * t * more <= FEW * EXTRA and mla.cfg.kv_lora_rank % 2 == 0  # even: see rotate_


def more_numbers(mla: MLA) -> int:
    """How many numbers a fold reads beyond those of the matrices that it replaces."""
    cfg = mla.cfg
    query = (cfg.kv_lora_rank - cfg.qk_nope_head_dim) * (cfg.q_lora_rank or cfg.hidden_size)
    out = (cfg.kv_lora_rank - cfg.v_head_dim) * cfg.hidden_size
    return cfg.num_attention_heads * (query + out) - mla.kv_b_proj.weight.numel()


def folded(mla: MLA, cache: Slots, layer: int, tokens: int) -> Folded:
    """The layer's fold for so many tokens, made at the first step that wants it."""
    key = layer, tokens > WIDE
    fold = cache.folded.get(key)
    if fold is None or not fold.fresh(mla):
        fold = cache.folded[key] = Folded(mla, tokens > WIDE)
    return fold


def rotate_(x_BThC: Tensor, first: int, table_BTj: Tensor) -> None:
    """RoPE in place on the numbers from ``first`` (even) on of each head, x being contiguous."""
    x_BThC.view(torch.complex64)[..., first // 2 :].mul_(table_BTj.unsqueeze(2))


def attend_few(mla: MLA, x_BTD: Tensor, rope: Tensor, mask: Tensor | None, cache: Slots, layer: int,
               positions: Tensor | None) -> Tensor:  # fmt: skip
    """What ``MLA.forward`` returns for a few tokens a row over a cache: (B, T, D)."""
    b, t, d = x_BTD.shape
    fold = folded(mla, cache, layer, b * t)
    low = few_linear(x_BTD.reshape(b * t, d), fold.down).view(b, t, -1)
    return few_linear(over_cache(mla, fold, low, rope, mask, cache, layer, positions), fold.out).view(b, t, d)


def over_cache(mla: MLA, fold: Folded, low: Tensor, rope: Tensor, mask: Tensor | None, cache: Slots, layer: int,
               positions: Tensor | None) -> Tensor:  # fmt: skip
    """From the product with ``fold.down``, (B, T, Q + C + R), to what ``fold.out`` multiplies, (B * T, H * C)."""
    (b, t, _), rank, heads = low.shape, mla.cfg.kv_lora_rank, mla.cfg.num_attention_heads
    # The heads' queries and the one key and value that they share, side by side: all are rotated at once.
    if fold.query is None:  # the product has them so
        joint = low.view(b, t, heads + 1, -1)
        c = joint[:, :, heads, :rank]
        c.copy_(mla.kv_a_layernorm(c))
    else:
        q, c, k_rope = low.split(fold.sizes, dim=-1)
        q = few_linear(normalise(q, mla.q_a_layernorm.eps_tensor), fold.query)
        joint = torch.cat([q, mla.kv_a_layernorm(c), k_rope], dim=-1).view(b, t, heads + 1, -1)
    rotate_(joint, rank, rope)
    latent = cache.write(layer, positions, joint[:, :, heads])
    scores = torch.bmm(joint[:, :, :heads].reshape(b, t * heads, -1), latent.transpose(1, 2))
    if mask is not None:
        scores.view(b, t, heads, -1).masked_fill_(~mask.transpose(1, 2), -torch.inf)  # (B, 1, T, S) -> (B, T, 1, S)
    for i in range(t - 1 if mask is None else 0):  # causal: the i-th does not see the t - 1 - i behind it
        scores.view(b, t, heads, -1)[:, i, :, i + 1 - t :] = -torch.inf
    return torch.bmm(scores.softmax(-1), latent[..., :rank]).view(b * t, -1)
