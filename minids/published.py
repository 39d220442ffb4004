"""What a published checkpoint consists of: the name, shape and dtype of every tensor, and its place in our model.

A state dict of our model is the published format with three differences, all of them settled here:

    in the model                                                                            on disk
    experts.gate_up_proj (E, 2F, D), gate rows first, and experts.down_proj (E, D, F)       experts.E.{gate,up,down}_proj
    an MTP layer uses the main model's embedding and head                                   embed_tokens, shared_head.head
    BF16 or FP32 linears                                                                    weight E4M3, weight_scale_inv

In FP8 checkpoints every attention, dense, expert and shared linear is quantised in 128 x 128 blocks, the MTP layer's
too; norms, embeddings, heads, gate.weight and eh_proj are BF16. e_score_correction_bias is FP32 in all checkpoints.

Saving writes this list and loading demands it, so that the two cannot drift apart.

Shapes: E experts, F expert width, D hidden, L main layers, k MTP depth (0, 1, ...).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from minids.config import ModelConfig
from minids.fp8.quantize import scale_shape
from minids.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint, and the part of the state dict it is: `state[source][part]`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    part: tuple = ()

    @property
    def is_scale(self) -> bool:
        return self.name.endswith("_scale_inv")

    @property
    def is_copy(self) -> bool:
        """An MTP layer's own embedding or head: a second copy of the main model's."""
        return not self.is_scale and not self.part and self.name != self.source

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan(cfg: ModelConfig, fp8: bool = True, dtype: torch.dtype = torch.bfloat16) -> list[Entry]:
    """Every tensor of the published checkpoint of a config; needs no weights (V3: 91,991 entries, seconds).

    Args:
        cfg: the model.
        fp8: linears in E4M3, each followed by its scales, as V3 is published.
        dtype: of everything else but the bias, which is float32.
    """
    with torch.device("meta"):
        model = Transformer(cfg)
    return entries_of(model, fp8, dtype)


def entries_of(model: Transformer, fp8: bool, dtype: torch.dtype) -> list[Entry]:
    """`plan` for a model that is there; the two agree in everything but the work of building one."""
    entries = []
    for name, shape, source, part in _published_tensors(model):
        if fp8 and _is_fp8(name):
            entries.append(Entry(name, shape, torch.float8_e4m3fn, source, part))
            entries.append(Entry(f"{name}_scale_inv", scale_shape(shape), torch.float32, source, part))
        else:
            exact = name.endswith("e_score_correction_bias")
            entries.append(Entry(name, shape, torch.float32 if exact else dtype, source, part))
    return entries


def _is_fp8(name: str) -> bool:
    return name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight")


def _published_tensors(model: Transformer) -> Iterator[tuple[str, tuple[int, ...], str, tuple]]:
    """(published name, shape, key of the state dict, part of it) of every tensor, experts split, MTP copies added."""
    cfg, state = model.cfg, model.state_dict()
    head = "model.embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"
    for key, tensor in state.items():
        shape = tuple(tensor.shape)
        if key.endswith(".gate.noise_weight"):  # of noisy top-k in training; the trainer keeps it
            continue
        if key.endswith(".experts.gate_up_proj"):
            width, stem = shape[1] // 2, key.removesuffix("gate_up_proj")
            for e in range(shape[0]):
                yield f"{stem}{e}.gate_proj.weight", (width, shape[2]), key, (e, slice(0, width))
                yield f"{stem}{e}.up_proj.weight", (width, shape[2]), key, (e, slice(width, None))
        elif key.endswith(".experts.down_proj"):
            for e in range(shape[0]):
                yield f"{key.removesuffix('down_proj')}{e}.down_proj.weight", shape[1:], key, (e,)
        elif key != "lm_head.weight" or not cfg.tie_word_embeddings:  # a tied head is not stored
            yield key, shape, key, ()
    for k in range(cfg.num_nextn_predict_layers):
        layer = f"model.layers.{cfg.num_hidden_layers + k}"
        for copy, key in (("embed_tokens", "model.embed_tokens.weight"), ("shared_head.head", head)):
            yield f"{layer}.{copy}.weight", tuple(state[key].shape), key, ()
