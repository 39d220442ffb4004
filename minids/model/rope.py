"""Rotary positions and YaRN [V3 section 4.3; YaRN: arXiv 2309.00071].

The problem: attention scores do not see order. RoPE turns pair j of a query at position t by the angle t * theta_j, and
keys alike, so that a score depends on the distance between them alone. Seen as complex numbers z_j = x_2j + i x_2j+1:

    RoPE(x, t)_j = z_j * exp(i t theta_j),     theta_j = rope_theta ^ (-2j / R)

The pairs are neighbours, (x0, x1), (x2, x3), ...: the layout of the published checkpoints. Code that pairs the first
half with the second gives other scores on the same weights.

A model trained at length L meets angles it has never seen beyond L. YaRN stretches by a factor s only the pairs that
turn slowly: pairs turning more than beta_fast times within L stay, pairs turning less than beta_slow times are
slowed s-fold, a linear ramp in between. Because a longer context flattens the softmax, scores are also multiplied by
mscale^2 with mscale = 0.1 * mscale_all_dim * ln(s) + 1.

Shapes: B batch, T tokens, H heads, R rope dims (R/2 pairs).
"""

import math

import torch
from torch import Tensor

from minids.config import ModelConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1, or 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_ramp(cfg: ModelConfig) -> Tensor:
    """How far each pair is stretched: 0 keeps its frequency, 1 divides it by the factor. Shape (R/2,), float32."""
    s, dim = cfg.rope_scaling, cfg.qk_rope_head_dim

    def pair_turning(times: float) -> float:  # the (real-valued) pair index that turns so often within L
        length = s["original_max_position_embeddings"]
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low, high = pair_turning(s.get("beta_fast", 32)), pair_turning(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width is a step
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)


def rope_frequencies(cfg: ModelConfig) -> Tensor:
    """theta_j in radians a token, YaRN applied. Shape (R/2,), float32, on the CPU."""
    pairs = torch.arange(0, cfg.qk_rope_head_dim, 2, dtype=torch.float32, device="cpu") / cfg.qk_rope_head_dim
    theta = 1.0 / cfg.rope_theta**pairs
    if cfg.rope_scaling is None:
        return theta
    ramp = yarn_ramp(cfg)
    return theta / cfg.rope_scaling["factor"] * ramp + theta * (1 - ramp)


def frequencies_on(cfg: ModelConfig, device: torch.device) -> Tensor:
    """`rope_frequencies` on ``device``. On CUDA they are remembered: a copy from the host at every pass would wait for the
    device, and cannot be part of a CUDA graph."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return rope_frequencies(cfg).to(device)
    scaling = None if cfg.rope_scaling is None else tuple(sorted(cfg.rope_scaling.items()))
    key = (cfg.qk_rope_head_dim, cfg.rope_theta, scaling, device)
    if key not in _ON_DEVICE:
        with torch.inference_mode(False):
            _ON_DEVICE[key] = rope_frequencies(cfg).to(device)
    return _ON_DEVICE[key]


_ON_DEVICE: dict[tuple, Tensor] = {}  # constants, by what they are made from


def rope_attention_factor(cfg: ModelConfig) -> float:
    """What the rotated parts are multiplied by; 1 for V2 and V3, whose mscale equals their mscale_all_dim."""
    s = cfg.rope_scaling
    if s is None:
        return 1.0
    if s.get("attention_factor") is not None:
        return s["attention_factor"]
    if s.get("mscale") and s.get("mscale_all_dim"):
        return yarn_mscale(s["factor"], s["mscale"]) / yarn_mscale(s["factor"], s["mscale_all_dim"])
    return yarn_mscale(s["factor"], 1.0)


def rope_table(cfg: ModelConfig, positions: Tensor) -> Tensor:
    """exp(i t theta_j) for ``positions`` (B, T), as complex64 (B, T, R/2). Angles are float32, as published."""
    angles = positions.unsqueeze(-1).float() * frequencies_on(cfg, positions.device)
    return torch.polar(torch.full_like(angles, rope_attention_factor(cfg)), angles)


def apply_rope(x_BTHR: Tensor, table_BTj: Tensor) -> Tensor:
    """Turns ``x`` (B, T, H, R) by ``rope_table``'s angles, computed in float32, returned in x's dtype."""
    # Always copied: a view that begins at an odd element (odd kv_lora_rank, one token) cannot be read as complex.
    x = x_BTHR.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table_BTj.unsqueeze(-2)).flatten(-2).to(x_BTHR.dtype)


def softmax_scale(cfg: ModelConfig) -> float:
    """1 / sqrt(N + R), times mscale^2 under YaRN: 0.1352 for V3."""
    scale = cfg.qk_head_dim**-0.5
    s = cfg.rope_scaling
    if s is not None and s.get("mscale_all_dim"):
        scale *= yarn_mscale(s["factor"], s["mscale_all_dim"]) ** 2
    return scale
