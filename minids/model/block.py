"""One transformer layer: attention and feed-forward, each behind a norm and around a residual [V3 figure 2].

    h = x + MLA(RMSNorm(x)),     y = h + FFN(RMSNorm(h)),     FFN dense in the first layers, MoE in all others

``Context`` carries what all layers of one forward pass share, so that a layer is a function of (x, context) wherever it
runs: in the model, in a pipeline stage, under activation recomputation.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model import block_decode
from minids.model.attention import MLA, LatentCache
from minids.model.layers import MLP, RMSNorm
from minids.model.moe import MoE
from minids.model.router import Routing


@dataclass
class Context:
    """Shared by the layers of one pass. Shapes: B rows, T tokens, S visible slots, R rope dims."""

    rope: Tensor  # (B or 1, T, R/2) complex64
    mask: Tensor | None = None  # (B or 1, 1, T, S) bool; None is causal
    cache: LatentCache | None = None
    positions: Tensor | None = None  # (B, T) int64, where a ragged cache is written
    absorb: bool = False

    def first(self, length: int) -> "Context":
        """The same for the first ``length`` tokens of each row; an MTP module sees fewer than the main model."""
        mask = None if self.mask is None else self.mask[:, :, :length, :length]
        return Context(self.rope[:, :length], mask, absorb=self.absorb)


class Block(nn.Module):
    """Layer ``index`` of the model; names are the published checkpoint's."""

    def __init__(self, cfg: ModelConfig, index: int):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.is_moe = cfg.is_moe_layer(index)
        self.mlp = MoE(cfg) if self.is_moe else MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x_BTD: Tensor, context: Context, delta_BTD: Tensor | None = None, unsummed: bool = False
                ) -> tuple[Tensor | tuple[Tensor, Tensor], Routing | None]:  # fmt: skip
        """(B, T, D) -> (B, T, D) and where its tokens went. With ``unsummed`` the two terms of the output instead of their
        sum, which the next layer takes as x and ``delta``: its norm adds them up in a pass that it makes anyway."""
        if not unsummed and block_decode.applies(self, x_BTD, context):
            return block_decode.layer(self, x_BTD, context)
        x_BTD, normed = self.input_layernorm(x_BTD, delta_BTD, residual=True)
        attended = self.self_attn(normed, context.rope, context.mask, context.cache, self.index, context.positions,
                                  context.absorb)  # fmt: skip
        x_BTD, normed = self.post_attention_layernorm(x_BTD, attended, residual=True)
        out, routing = self.mlp(normed, context.cache, self.index) if self.is_moe else (self.mlp(normed), None)
        return (x_BTD, out) if unsummed else x_BTD + out, routing
