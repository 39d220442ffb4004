"""Eight-bit floating point, the number format V3 is trained in and published in (V3 section 3.3)."""

from minids.fp8.convert import to_fp8
from minids.fp8.formats import E4M3, E5M2, E5M6, FORMATS, Format, decode, encode, round_to
from minids.fp8.linear import Fp8Linear
from minids.fp8.quantize import (
    BLOCK,
    E4M3_MAX,
    dequantize,
    fake_quantize,
    quantize_block,
    quantize_row,
    quantize_tensor,
    quantize_tile,
)
from minids.fp8.recipe import Fp8Recipe

__all__ = [
    "BLOCK",
    "E4M3",
    "E4M3_MAX",
    "E5M2",
    "E5M6",
    "FORMATS",
    "Format",
    "Fp8Linear",
    "Fp8Recipe",
    "decode",
    "dequantize",
    "encode",
    "fake_quantize",
    "quantize_block",
    "quantize_row",
    "quantize_tensor",
    "quantize_tile",
    "round_to",
    "to_fp8",
]
