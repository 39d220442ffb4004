"""Turns a model into one that trains in FP8, from outside: the same parameters under the same names (V3 section 3.3.1).

    FP8            every linear of attention, dense feed-forward, shared and routed experts, MTP modules' too: the
                   matrices that are FP8 in the published checkpoint
    as it was      embedding, head, gate, norms, the core of attention, eh_proj
    kept for backward, instead of every input   FP8 inputs; E5M6 for o_proj's; FP8 inputs of SwiGLU; norms and MLA's
                   up-projections recomputed

Layers are replaced, their parameters are not: an optimizer, a checkpoint or a hook on a parameter that was there before
sees no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minids.fp8.attention import Fp8MLA
from minids.fp8.feedforward import Fp8Experts, Fp8MLP
from minids.fp8.linear import Fp8Linear, SharedInput
from minids.fp8.recipe import Fp8Recipe
from minids.fp8.saved import mark_recomputable, source_of
from minids.model.attention import MLA
from minids.model.block import Block
from minids.model.layers import RMSNorm
from minids.model.linear import Linear
from minids.model.moe import MoE


def to_fp8(model: nn.Module, recipe: str | Fp8Recipe = "v3") -> nn.Module:
    """Makes every layer inside ``model`` compute in FP8; returns ``model`` itself.

    Args:
        model: a Transformer, a Block or any module with such parts, with float32 parameters.
        recipe: an `Fp8Recipe`, or the name of one.

    Raises:
        ValueError: no such recipe, the model is FP8 already, or has nothing to convert. TypeError: a parameter is not
        float32: FP8 training updates FP32 weights with FP32 gradients.
    """
    recipe = Fp8Recipe.named(recipe)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(f"to_fp8: got a {type(model).__name__}, expected a model with at least one Block")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise TypeError(f"to_fp8: {name} is {parameter.dtype}, expected float32, the weights that FP8 training updates")
    if any(isinstance(block.self_attn, Fp8MLA) for block in blocks):
        raise ValueError("to_fp8: the model computes in FP8 already")
    for block in blocks:
        _convert(block, recipe)
    return model


def _convert(block: Block, recipe: Fp8Recipe) -> None:
    block.self_attn = _attention(block.self_attn, recipe)
    if isinstance(block.mlp, MoE):
        block.mlp.experts = Fp8Experts.of(block.mlp.experts, recipe)
        if block.mlp.shared_experts is not None:
            block.mlp.shared_experts = Fp8MLP.of(block.mlp.shared_experts, recipe)
        block.mlp.register_forward_pre_hook(_tell_experts)
    else:
        block.mlp = Fp8MLP.of(block.mlp, recipe)
    for norm in block.modules():
        if isinstance(norm, RMSNorm) and recipe.recompute:
            norm.register_forward_hook(_tell_source)


def _attention(attention: MLA, recipe: Fp8Recipe) -> Fp8MLA:
    found = Fp8MLA.of(attention, recipe)
    for name, child in attention.named_children():
        if isinstance(child, Linear):
            setattr(found, name, Fp8Linear.of(child, recipe, wide_input=name == "o_proj"))
    shared = SharedInput()
    for name in ("q_a_proj" if attention.cfg.q_lora_rank else "q_proj", "kv_a_proj_with_mqa"):
        getattr(found, name).shared = shared
    return found


def _tell_source(norm: RMSNorm, args: tuple, out: Tensor | tuple[Tensor, Tensor]) -> None:
    """Forward hook: what the norm made can be made again, from its input or from the sum that it added up."""
    if torch.is_grad_enabled():
        source, normed = out if isinstance(out, tuple) else (args[0], out)
        mark_recomputable(normed, norm.forward, source)


def _tell_experts(moe: MoE, args: tuple) -> None:
    """Forward pre-hook: the experts see a flattened view of x, which knows nothing of its source."""
    moe.experts.source = source_of(args[0])
