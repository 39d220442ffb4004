"""``python -m minids count``: every parameter of a model counted twice, by formula and on the built model.

The formula is ``ModelConfig.count``. The model is built on torch's ``meta`` device, where tensors have shapes and no
memory, so 671 billion parameters take a second and no gigabyte. The two must agree, or the command fails.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from minids.config import ModelConfig
from minids.model.transformer import Transformer


@dataclass(frozen=True)
class CountConfig:
    """Count a model's parameters, FLOPs, cache and FP8 scales."""

    model: str
    """A preset (toy, small, v2_lite, v3) or the path of a config.json."""
    length: int = 4096
    """Context length in tokens for the FLOPs of attention."""
    json: bool = False
    """Print one JSON object instead of a table."""


def count_on_meta(cfg: ModelConfig) -> dict[str, int]:
    """Parameters (the router's bias included) of the model as built: of the main model and of its MTP modules."""
    with torch.device("meta"):
        state = Transformer(cfg).state_dict(keep_vars=True)
    unique = {id(tensor): (name, tensor.numel()) for name, tensor in state.items()}  # a tied head counts once
    found = {"main": 0, "mtp": 0}
    for name, elements in unique.values():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "-1"
        found["mtp" if int(layer) >= cfg.num_hidden_layers else "main"] += elements
    return found


def count(cfg: ModelConfig, length: int = 4096) -> dict[str, int]:
    """All figures of ``ModelConfig.count`` and ``flops_per_token`` at ``length``. Raises RuntimeError if the built model
    disagrees with the formula."""
    figures = {**cfg.count(), "flops_per_token": cfg.flops_per_token(length)}
    built = count_on_meta(cfg)
    wrong = {name: (figures[name], n) for name, n in built.items() if figures[name] != n}
    if wrong:
        raise RuntimeError(f"formula and built model disagree: {wrong}")
    return figures


ROWS = [
    ("main model", "main", "parameters"),
    ("  embedding", "embedding", ""),
    ("  a dense layer", "dense_layer", ""),
    ("  a MoE layer", "moe_layer", ""),
    ("  head", "head", ""),
    ("MTP modules, own parameters", "mtp", ""),
    ("on disk: with MTP's copies of embedding and head", "on_disk", ""),
    ("FP8 scales of 128 x 128 blocks", "fp8_scales", "float32 elements"),
    ("activated a token, embedding and head", "activated", "parameters"),
    ("activated a token, head only", "activated_without_embedding", ""),
    ("cache a token, BF16", "kv_bytes_per_token", "bytes"),
    ("training FLOPs a token, causal attention", "flops_per_token", "FLOP"),
]


def run_count(config: CountConfig) -> None:
    """Prints the figures; a preset's name or a file decides whose."""
    is_file = config.model.endswith(".json") or Path(config.model).is_file()
    cfg = ModelConfig.from_json(config.model) if is_file else ModelConfig.preset(config.model)
    figures = count(cfg, config.length)
    if config.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    layers = f"{figures['dense_layers']} dense + {figures['moe_layers']} MoE layers"
    print(f"{config.model}: {layers}, {config.length} tokens of context; formula and model built on meta agree")
    for label, key, unit in ROWS:
        print(f"{label:<50}{figures[key]:>24,} {unit}")
