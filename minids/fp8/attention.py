"""MLA as V3 trains it: the up-projections, and the norms before them, are computed again in backward (V3 section 3.2.3).

Attention's backward reads q, k and v: H (2 (N + R) + V) numbers a token, 65 thousand in V3. They are made from the
compressed query and the latent, Q + C + R = 2112 numbers, by two products. So only those are kept, and between
them and o_proj everything but attention itself runs again. (On a CPU attention too, whose written-out form has no part
that could be left out.)

The layer is `MLA`; this class only says where the part to be computed again begins and ends.

Shapes: B rows, T tokens, D hidden, H heads, N/R/V head dims, C latent, Q query rank.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minids.fp8.recipe import Fp8Recipe
from minids.model.attention import MLA, LatentCache

KEPT = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention")  # fmt: skip


class Fp8MLA(MLA):
    """An `MLA` whose children were replaced by FP8 layers."""

    @classmethod
    def of(cls, attention: MLA, recipe: str | Fp8Recipe = "v3") -> Fp8MLA:
        """On the very parameters of ``attention``."""
        found = cls.__new__(cls)
        super(MLA, found).__init__()
        found.cfg, found.scale, found.recipe = attention.cfg, attention.scale, Fp8Recipe.named(recipe)
        for name, child in attention.named_children():
            setattr(found, name, child)
        return found.train(attention.training)

    def core(self, low_BTq: Tensor, joint_BTc: Tensor, rope: Tensor, mask: Tensor | None, cache: LatentCache | None = None,
             layer: int = 0, positions: Tensor | None = None, absorb: bool = False) -> Tensor:  # fmt: skip
        """From the compressed query and latent to attention's output, (B, T, H * V)."""
        rest = (cache, layer, positions, absorb)
        if cache is not None or not self.recipe.recompute or not torch.is_grad_enabled():
            return super().core(low_BTq, joint_BTc, rope, mask, *rest)
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        extra = {"context_fn": contexts} if low_BTq.is_cuda else {}
        return checkpoint(super().core, low_BTq, joint_BTc, rope, mask, *rest, use_reentrant=False,
                          preserve_rng_state=False, **extra)  # fmt: skip


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    name = getattr(op, "__name__", str(op)).split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
