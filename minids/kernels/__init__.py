"""Kernels: each operation a file with its PyTorch reference, its Triton kernel and the choice between them (V3 3.3, 3.5).

`backend` says how the choice is made. Triton is optional, and takes half a second to import: so a file is loaded when the
first of its names is asked for.
"""

import os
from importlib import import_module

from torch import Tensor

FILES = {
    "activation": ("swiglu", "swiglu_quantize"),
    "adamw": ("adamw_",),
    "block": ("dequantize_block", "quantize_block"),
    "cross_entropy": ("cross_entropy_", "linear_cross_entropy"),
    "dispatch": ("plan_slots",),
    "experts": ("routed_experts",),
    "gate": ("gate_logits",),
    "gemm_fp8": ("fp8_gemm",),
    "grouped": ("grouped_gemm", "grouped_wgrad"),
    "grouped_fp8": ("grouped_fp8_gemm", "grouped_fp8_wgrad"),
    "latent_attention": ("mla_decode",),
    "quantize": ("quantize_tile", "quantize_tile_both", "quantize_tile_t"),
    "rmsnorm": ("rms_norm", "rms_norm_residual"),
    "rope": ("rope_heads",),
    "routing": ("router",),
    "slots": ("combine",),
}
FILE_OF = {name: file for file, names in FILES.items() for name in names}
__all__ = ["uses_kernels", *FILE_OF]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def uses_kernels(x: Tensor) -> bool:
    """Whether a layer of the model that got x runs kernels. On the CPU outside Triton's interpreter never, whatever
    MINIDS_KERNELS says: there the model has ways of its own."""
    if x.is_cpu and not INTERPRETED:
        return False
    from minids.kernels.backend import choose

    return choose(None, x) == "triton"


def __getattr__(name: str):
    if name not in FILE_OF:
        raise AttributeError(f"module 'minids.kernels' has no attribute {name!r}; it offers {', '.join(__all__)}")
    found = getattr(import_module(f"{__name__}.{FILE_OF[name]}"), name)
    globals()[name] = found
    return found
