"""Multi-token prediction: a second look ahead that sharpens training [V3 section 2.2, eq. 21-25].

The problem: next-token loss asks for one step only. V3 adds D small modules in a chain, keeping the causal order: depth k
reads what depth k-1 thinks at position i and the token i+k, and predicts token i+k+1 with the main model's own embedding
and head.

    h'_i = M_k [RMSNorm(Emb(t_i+k)) ; RMSNorm(h_i^(k-1))]        M_k: eh_proj, 2D -> D; embedding first, as published
    h^k  = Block(h'),    p_i^k = softmax(Head(RMSNorm(h_i^k)))
    L_MTP = 1/D sum_k L_k,    L_k = - 1/T sum_i log p_i^k[t_i+k+1]         the trainer weighs L_MTP with lambda

Every L_k is divided by the same T, the tokens of the main loss, although depth k has k positions fewer [eq. 24].
Simplification: none. Inference drops the modules or speculates with them.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.block import Block, Context
from minids.model.layers import RMSNorm
from minids.model.linear import Linear
from minids.model.loss import IGNORE, linear_cross_entropy
from minids.model.router import Routing


class MTPModule(Block):
    """Depth ``index - num_hidden_layers + 1``: on disk a layer of its own behind the main ones."""

    def __init__(self, cfg: ModelConfig, index: int):
        super().__init__(cfg, index)
        self.enorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = Linear(2 * cfg.hidden_size, cfg.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)})

    def forward(self, hidden_BTD: Tensor, embedded_BTD: Tensor, context: Context) -> tuple[Tensor, Routing]:
        """``hidden`` of the depth before at i, ``embedded`` token i+k -> this depth's hidden state, before its norm."""
        joined = torch.cat([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], dim=-1)
        return super().forward(self.eh_proj(joined), context)


def mtp_labels(labels_BT: Tensor, depth: int, document_ids: Tensor | None = None) -> Tensor:
    """Labels of depth k, (B, T - k): position i is asked for token i+k+1, which is ``labels[i + k]``.

    ``labels`` (B, T) are the main model's, token i+1 at i. With ``document_ids`` of the inputs, (B, T), or of inputs and
    last label, (B, T + 1), a label in another document than position i is -100; T ids say nothing of the last label,
    which then counts to the document of the last token.
    """
    t = labels_BT.shape[1]
    if not 1 <= depth < t:
        raise ValueError(f"depth={depth}: allowed is 1 to {t - 1} for rows of {t} tokens")
    shifted = labels_BT[:, depth:]
    if document_ids is None:
        return shifted
    if document_ids.shape[1] == t:
        document_ids = torch.cat([document_ids, document_ids[:, -1:]], dim=1)
    changes = (document_ids[:, 1:] != document_ids[:, :-1]).cumsum(1)  # (B, T): documents begun until the label at i
    begun_before = torch.cat([torch.zeros_like(changes[:, :1]), changes[:, :-1]], dim=1)
    crosses = changes[:, depth:] != begun_before[:, : t - depth]
    return shifted.masked_fill(crosses, IGNORE)


def mtp_loss(mtp_hidden: list[Tensor], weight_VD: Tensor, labels_BT: Tensor, document_ids: Tensor | None = None):
    """(mean over depths, [loss of each depth]), float32 scalars in nats, not yet multiplied by lambda.

    ``mtp_hidden``: entry k-1 (B, T - k, D), normed, ready for the head ``weight`` (V, D).
    """
    tokens = (labels_BT != IGNORE).sum().clamp_min(1)
    losses = [linear_cross_entropy(hidden, weight_VD, mtp_labels(labels_BT, depth, document_ids)) / tokens
              for depth, hidden in enumerate(mtp_hidden, start=1)]  # fmt: skip
    return torch.stack(losses).mean(), losses
