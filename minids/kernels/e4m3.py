"""Scales and E4M3 numbers: what every kernel that quantises shares, bit for bit its reference (V3 section 3.3.2).

    s = amax / 448, or the next power of two        q = round_to_E4M3(x / s)

Both divisions are true ones, rounded as IEEE says. A division a number would keep the device from its memory's speed; the
kernels multiply by a reciprocal and add what is missing (Markstein): three operations, the same bits.

A tile of zeros gets s = 1. A tile with a NaN or an infinity becomes NaN, scale and all: the loss will tell, and nothing has
to be read back from the device to find out.
"""

import torch
from torch import Tensor

from minids.kernels.backend import E4M3_MAX, jit, tl

SCALES = ("fp32", "ue8m0")
# The smallest amax whose scale is a normal FP32 number; below it amax / 448 would lose bits or become 0.
SMALLEST_AMAX = E4M3_MAX * torch.finfo(torch.float32).tiny
SMALLEST = tl.constexpr(SMALLEST_AMAX)
# `quantize_gluon` writes 1 / scale as high + low; high is this much too small, more than a reciprocal is ever off.
RECIPROCAL_SHRUNK = 1 - 2.0**-21


def scale_of(amax: Tensor, scale: str = "fp32") -> Tensor:
    """The scale of tiles whose largest magnitudes are amax: amax / 448, or the next power of two; 1 for zero, NaN for
    what is not finite."""
    # Divided by a tensor: CUDA turns a division by a Python number into a product with its rounded reciprocal.
    scale_inv = amax.clamp(min=SMALLEST_AMAX) / torch.full_like(amax, E4M3_MAX)
    if scale == "ue8m0":
        bits = scale_inv.view(torch.int32)
        scale_inv = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # mantissa 0: stays; else the next exponent
    scale_inv = torch.where(amax == 0, 1.0, scale_inv)
    return torch.where(amax < torch.inf, scale_inv, torch.nan)


# ---- Triton ----


@jit
def e4m3_scale(amax_bits, UE8M0: tl.constexpr):
    """The scale of tiles from the bits of their largest magnitudes: as integers NaN > infinity > every number."""
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), SMALLEST)
    scale = amax * (1 / 448)
    scale = tl.fma(tl.fma(scale, -448.0, amax), 1 / 448, scale)  # amax / 448, correctly rounded: see to_e4m3
    if UE8M0:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    scale = tl.where(amax_bits == 0, 1.0, scale)
    return tl.where(amax_bits >= 0x7F800000, float("nan"), scale)


@jit
def magnitude_bits(x):
    """|x| as an integer that orders like it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def to_e4m3(x, scale):
    """round_to_E4M3(x / scale). scale has x's shape or broadcasts to it.

    The quotient is rounded as a true division rounds it, without a division a number: x times 1 / scale is off by a few
    units in the last place; a fused multiply-add finds what is missing, and a second one adds it (Markstein). Tiles so
    small that the remainder would be subnormal are lifted by 2^64 first. The conversion saturates.
    """
    lift = tl.where(scale < 1e-20, -18446744073709551616.0, -1.0)  # negative: the order of signs keeps -0 as it is
    scale *= -lift
    inverse = -1.0 / scale
    scale, inverse = tl.broadcast_to(scale, x.shape), tl.broadcast_to(inverse, x.shape)
    x *= lift
    quotient = x * inverse
    return tl.fma(tl.fma(quotient, scale, x), inverse, quotient).to(tl.float8e4nv)
