"""MTP modules over a cache: the same predictions as in training, for the newest tokens alone [V3 section 2.2].

The problem: depth k at position i reads token i+k and h^(k-1)_i. When tokens arrive a few at a time, that hidden state may
belong to an earlier call. Counted by the token j = i + k that completes an entry (cache.py), every depth takes the tokens
of the call itself, each beside the previous depth's output one token earlier:

    h^k[j] = Block_k( M_k [RMSNorm(Emb(t_j)) ; RMSNorm(h^(k-1)[j-1])] ),       it predicts token j + 1

Only the first token's left neighbour lies in the past: one vector a row and depth, the cache's ``carry``.

Shapes: B rows, T new tokens, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minids.model.block import Context
from minids.model.cache import Slots

if TYPE_CHECKING:
    from minids.model.transformer import ModelOutput, Transformer


def mtp_depth(model: Transformer, depth: int, cache: Slots, tokens_BT: Tensor, left_BTD: Tensor, start_B: Tensor, end: int,
              absorb: bool) -> tuple[Tensor, Tensor, object]:  # fmt: skip
    """One depth over the tokens in slots ``start[b]`` ... of each row, none at ``end`` or behind.

    left: h^(k-1) one token to the left of each. Returns (h^k (B, T, D) for the next depth, the same normed for the head,
    routing). Entries of slots below ``depth`` mean nothing: token j = k is the first that has a position.
    """
    module = model.mtp_modules[depth - 1]
    positions, rope, mask = cache.place_mtp(depth, start_B, tokens_BT.shape[1], end)
    context = Context(rope, mask, cache, positions, absorb)
    hidden, routing = module(left_BTD, model.model.embed_tokens(tokens_BT), context)
    normed = module.shared_head["norm"](hidden)
    return (normed if model.cfg.mtp_hidden_norm else hidden), normed, routing


def shift(carry_BD: Tensor, hidden_BTD: Tensor) -> Tensor:
    """Each token's left neighbour, (B, T + 1, D): the row's carry, then the states themselves."""
    return torch.cat([carry_BD.unsqueeze(1), hidden_BTD], dim=1)


def mtp_all(model: Transformer, tokens_BT: Tensor, hidden_BTD: Tensor, cache: Slots, start_B: Tensor, end: int,
            n_valid: Tensor | None, absorb: bool, out: ModelOutput) -> list[Tensor]:  # fmt: skip
    """All depths over the tokens that the main layers have just run, ``hidden`` being theirs: normed states, (B, T, D) a
    depth. ``Transformer.forward`` calls it; the cache's carries move on to each row's last valid token."""
    rows = torch.arange(len(tokens_BT), device=tokens_BT.device)
    found = []
    for depth in range(1, len(model.mtp_modules) + 1):
        left = shift(cache.carry[depth - 1], hidden_BTD)
        cache.carry[depth - 1] = left[:, -1] if n_valid is None else left[rows, n_valid]  # n_valid 0: stays
        hidden_BTD, normed, routing = mtp_depth(model, depth, cache, tokens_BT, left[:, :-1], start_B, end, absorb)
        found.append(normed)
        if routing is not None:
            out.routing.append(routing)
    return found
