"""Eight-bit floating point, the number format V3 is trained in and published in (V3 section 3.3)."""

from minids.fp8.quantize import BLOCK, E4M3_MAX, dequantize, quantize_block

__all__ = ["BLOCK", "E4M3_MAX", "dequantize", "quantize_block"]
