"""The MX formats, beside V3's for comparison: blocks of 32 numbers along K with an E8M0 scale (OCP MX specification 1.0).

The problem: on Hopper V3 applies the scales of its 1 x 128 tiles by hand, on the CUDA cores. V3 3.5.2 asks for tensor
cores that take the scales themselves; Blackwell's do, for MX. A block of 32 numbers V_i has one power of two X and 32
elements P_i of a small format whose largest binade is 2^emax (8 for E4M3, 15 for E5M2, 2 for E2M3 and E2M1, 4 for E3M2):

    X = 2^(floor(log2 max |V_i|) - emax)        P_i = round(V_i / X), saturated        V_i ~ X P_i

    name      element   bits of an element   bits a number, with 1/32 of the scale
    mxfp8     e4m3      8                    8.25      (or e5m2)
    mxfp6     e2m3      6                    6.25      (or e3m2)
    mxfp4     e2m1      4                    4.25

The exponent is the FLOOR, so max |V_i| / X lies anywhere in [2^emax, 2^(emax + 1)), and what exceeds the element's largest
number saturates: in E4M3 everything from 448 to 512, an error of up to 12.5% of the largest number of the block. V3's
power of two is rounded UP instead (quantize.py): nothing saturates, at the price of half a binade of range in the mean.

A scale is E8M0, 2^-127 to 2^127. We keep it a normal FP32 number, 2^-126 at least, and give a block of zeros the scale
1, as in quantize.py; the specification leaves both to us. Non-finite input is refused.

Shapes: T rows, K columns, k = ceil(K / 32); leading dimensions pass through.
"""

from torch import Tensor

from minids.fp8.formats import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, Format, round_to
from minids.fp8.quantize import Quantized, _from_groups, _scaled_groups, _to_groups, scale_shape

MX_BLOCK = 32
MX_ELEMENTS = {fmt.name: fmt for fmt in (E4M3, E5M2, E2M3, E3M2, E2M1)}


def quantize_mx(x: Tensor, fmt: str | Format = "e4m3", block: int = MX_BLOCK) -> Quantized:
    """One E8M0 scale for each `block` numbers along the last dimension.

    Args:
        x: (..., T, K), floating point, finite.
        fmt: "e4m3", "e5m2", "e2m3", "e3m2" or "e2m1".
        block: 32 in the specification.

    Returns:
        q (..., T, K) float32 holding numbers of the element format, and scale_inv (..., T, k) float32 powers of two.
        `encode(q, fmt)` and `encode(scale_inv, "e8m0")` are the bits.

    Raises:
        TypeError, ValueError: as quantize_tile; fmt is no MX element.
    """
    fmt = _mx_element(fmt)
    if block < 1:
        raise ValueError(f"block: got {block}, expected a positive number of columns")
    groups, scale_inv = _scaled_groups("x", x, (1, block), fmt, "mx")
    return _from_groups(round_to(groups, fmt), x.shape), scale_inv[..., 0, :, 0]


def dequantize_mx(q: Tensor, scale_inv: Tensor, block: int = MX_BLOCK) -> Tensor:
    """q (..., T, K) float32 times its scales (..., T, k), exactly. ValueError: the scales do not fit."""
    expected = scale_shape(q.shape, (1, block))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(f"scale_inv: got shape {tuple(scale_inv.shape)}, expected {expected} for blocks of {block}")
    return _from_groups(_to_groups(q, 1, block) * scale_inv[..., :, None, :, None], q.shape)


def mx_bits(fmt: str | Format = "e4m3", block: int = MX_BLOCK) -> float:
    """Bits a number takes, its share of the scale included."""
    return _mx_element(fmt).bits + E8M0.bits / block


def _mx_element(fmt: str | Format) -> Format:
    name = fmt.name if isinstance(fmt, Format) else fmt
    if name not in MX_ELEMENTS:
        raise ValueError(f"fmt: got {name!r}, expected an MX element format: {', '.join(MX_ELEMENTS)}")
    return MX_ELEMENTS[name]
