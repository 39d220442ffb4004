"""Kernels: each operation a file with its PyTorch reference, its Triton kernel and the choice between them (V3 3.3, 3.5).

`backend` says how the choice is made. Triton is optional.
"""

from minids.kernels.activation import swiglu, swiglu_quantize
from minids.kernels.block import dequantize_block, quantize_block
from minids.kernels.cross_entropy import cross_entropy_, linear_cross_entropy
from minids.kernels.dispatch import plan_slots
from minids.kernels.gemm_fp8 import fp8_gemm
from minids.kernels.grouped import grouped_gemm, grouped_wgrad
from minids.kernels.grouped_fp8 import grouped_fp8_gemm, grouped_fp8_wgrad
from minids.kernels.latent_attention import mla_decode
from minids.kernels.quantize import quantize_tile, quantize_tile_both, quantize_tile_t
from minids.kernels.rmsnorm import rms_norm
from minids.kernels.routing import router
from minids.kernels.slots import combine

__all__ = [
    "combine", "cross_entropy_", "dequantize_block", "fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_wgrad", "grouped_gemm",
    "grouped_wgrad", "linear_cross_entropy", "mla_decode", "plan_slots", "quantize_block", "quantize_tile",
    "quantize_tile_both", "quantize_tile_t", "rms_norm", "router", "swiglu", "swiglu_quantize",
]  # fmt: skip
