"""Absorbed attention of a few new tokens on CUDA: the cache is read where it lies, page by page, by `kernels.mla_decode`.

The problem: written with torch, a step copies every row's pages into one block, masks scores of the longest row for all,
and reads the latent twice. The kernel follows the page table, stops at each row's own length and reads once. It knows one
token a row; a draft under verification is a row of its own that sees one slot more than the token before it.

Both caches are pages of 64 slots to it: the paged one as it is, `LatentCache` as rows of consecutive pages. Not for MTP
layers, whose first slots hold nothing, nor in training, prefill, pages of another size or any dtype but BF16: there the
torch way is taken.

Shapes: B rows, T new tokens a row, H heads, N/R/V head dims without/with RoPE/of values, C latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minids import kernels
from minids.kernels import uses_kernels
from minids.model.cache import PAGE

if TYPE_CHECKING:
    from minids.model.attention import MLA
    from minids.model.cache import Slots

FEW = 8  # tokens a row: each reads the whole row, and more of them are better served by one product


def applies(mla: MLA, cache: Slots, latent_BTc: Tensor) -> bool:
    """Whether `attend` is the way for the tokens placed last."""
    if torch.is_grad_enabled() or not 0 < cache.placed <= FEW or not uses_kernels(latent_BTc):
        return False
    pages, sizes = cache.pages(0), (mla.cfg.kv_lora_rank, mla.cfg.qk_rope_head_dim)
    if pages is None or pages.dtype != torch.bfloat16 or pages.shape[1] != PAGE:
        return False
    return all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def attend(mla: MLA, q_nope: Tensor, q_rope: Tensor, cache: Slots, layer: int) -> Tensor:
    """`MLA.absorbed` over what is stored in the cache: q^N (B, T, H, N) and q^R (B, T, H, R) -> (B, T, H * V)."""
    b, t, heads, _ = q_nope.shape
    w_uk, w_uv = mla.up_weights()
    q_latent = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk).transpose(0, 1)
    q = torch.cat([q_latent, q_rope.flatten(0, 1)], dim=-1).to(torch.bfloat16)
    table, seen = cache.page_list()
    rank = mla.cfg.kv_lora_rank
    out = kernels.mla_decode(q, cache.pages(layer), table, seen, rank=rank, scale=mla.scale)
    return torch.bmm(out.to(q_nope.dtype).transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1).reshape(b, t, -1)
