"""The real engine: the products of a recipe on FP8 tensor cores (Hopper and later).

`RealBlocks` is V3's: q and scales of tiles and blocks go to minids.kernels, whose GEMM promotes and scales every 128
products. Its q and scales are those of `Simulated`, bit for bit; sums differ in the order of FP32 additions.

`RealTensor` has one scale a tensor and no promotion: torch's FP8 product with `use_fast_accum`, whose sum stays in the
tensor core from beginning to end. cuBLAS and CUTLASS apply the scales behind it.

FP8 tensor cores want the summed index adjacent in memory in both factors: so Dgrad has a transposed copy of the weight,
and Wgrad transposes of both (minids/fp8/turned.py, minids/fp8/gated.py).

Shapes: M rows, N outputs, K inputs, C columns, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.fp8 import gated, turned
from minids.fp8.operands import Kept12, Operand
from minids.fp8.products import Simulated
from minids.fp8.turned import Turned
from minids.kernels import combine, fp8_gemm, grouped_fp8_gemm, quantize_tile, quantize_tile_both, quantize_tile_t
from minids.kernels.backend import choose
from minids.kernels.grouped_fp8 import _grouped_fp8_wgrad, wgrad_reference
from minids.model.moe import Dispatch


class RealBlocks(Simulated):
    """Tiles and blocks by minids.kernels. Scales are column-major, as GEMMs read them. Nothing here mixes blocks of 128
    slots, so there may be slots behind the last expert's, which spares the host to ask how many there are."""

    bound = True

    def rows(self, x_MC: Tensor, exact: bool = False) -> Operand:
        return Operand(*quantize_tile(unit_stride(x_MC), scale=self._scale(exact), column_major=True), (1, 128))

    def columns(self, x_MC: Tensor, exact: bool = False) -> Turned:
        return Turned(*quantize_tile_t(unit_stride(x_MC), scale=self._scale(exact), column_major=True))

    def both(self, x_MC: Tensor, exact: bool = False) -> tuple[Operand, Turned]:
        if x_MC.shape[1] % 128:
            return super().both(x_MC, exact)  # two passes are the quicker ones there
        found = quantize_tile_both(unit_stride(x_MC), scale=self._scale(exact), column_major=True)
        return Operand(*found[:2], (1, 128)), Turned(*found[2:])

    def columns_again(self, kept: Operand | Kept12, exact: bool = False) -> Turned:
        return turned.wide_columns(kept) if isinstance(kept, Kept12) else turned.columns(kept, self._scale(exact))

    def wide(self, x_MC: Tensor) -> tuple[Operand, Kept12]:
        return turned.keep_wide(x_MC)

    def slots(self, rows: Operand, plan: Dispatch) -> Operand:
        return turned.slots(rows, plan)

    def slot_columns(self, rows: Operand, plan: Dispatch) -> Turned:
        return turned.columns(rows, self.recipe.scale, plan)

    def combine(self, y_MD: Tensor, plan: Dispatch) -> Tensor:
        return combine(y_MD, plan.slot_NK) if y_MD.dtype == torch.bfloat16 else super().combine(y_MD, plan)

    def gated(self, z_MF: Tensor, weight_M1: Tensor | None) -> tuple[Operand, Operand]:
        return gated.gated(z_MF, weight_M1, self.recipe.scale)

    def gated_backward(self, dh_MF: Tensor, z: Operand, weight_M1: Tensor | None) -> tuple:
        return gated.gated_backward(dh_MF, z, weight_M1, self.recipe.scale)

    def weight(self, w: Tensor) -> tuple[Operand, Operand]:
        return turned.weight_both(w, self.recipe.scale)

    def joined_weight(self, gate: Tensor, up: Tensor | None) -> tuple[Operand, Operand]:
        """Blocks start anew at ``up`` by themselves: engines are chosen so that F is a multiple of 128."""
        return self.weight(gate if up is None else torch.cat([gate.detach(), up.detach()]))

    def fprop(self, x: Operand, w: Operand, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        if ends is None:
            return fp8_gemm(x.q, x.scale_inv, w.q, w.scale_inv, out_dtype=dtype)
        return grouped_fp8_gemm(x.q, x.scale_inv, w.q, w.scale_inv, ends, out_dtype=dtype)

    def dgrad(self, dy: Operand, w: Operand, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        return self.fprop(dy, w, dtype, ends)  # w was turned when it was quantised

    def wgrad(self, dy: Turned, x: Turned, ends: Tensor | None = None) -> Tensor:
        if ends is not None:
            product = wgrad_reference if choose(None, ends) == "torch" else _grouped_fp8_wgrad
            return product(*dy, *x, ends)
        return fp8_gemm(*dy, *x, out_dtype=torch.float32)

    def _scale(self, exact: bool) -> str:
        return "ue8m0" if exact else self.recipe.scale


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class RealTensor(Simulated):
    """One scale a tensor (a weight of stacked experts: one an expert), fast accumulation."""

    def fprop(self, x: Operand, w: Operand, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        return scaled(x.q, x.scale_inv, w.q.transpose(-1, -2), w.scale_inv, dtype, ends)

    def dgrad(self, dy: Operand, w: Operand, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        return scaled(dy.q, dy.scale_inv, turn(w.q).transpose(-1, -2), w.scale_inv, dtype, ends)

    def wgrad(self, dy: Operand, x: Operand, ends: Tensor | None = None) -> Tensor:
        if ends is None:
            return scaled(turn(dy.q), dy.scale_inv, turn(x.q).t(), x.scale_inv, torch.float32)
        found = scaled(turn(dy.q), dy.scale_inv, turn(x.q).t(), x.scale_inv, torch.bfloat16, ends).float()
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return found.masked_fill_((ends == starts)[:, None, None], 0.0)  # experts without tokens


def scaled(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype,
           ends: Tensor | None = None) -> Tensor:  # fmt: skip
    """a b times their scales: a row-major, b column-major; with ``ends`` a product for each block, as in `multiply`."""
    if ends is None:
        a, b = filled(a), filled(b.t()).t()
        return torch._scaled_mm(a, b, scale_a=a_scale.reshape(()), scale_b=b_scale.reshape(()), out_dtype=dtype,
                                use_fast_accum=True)  # fmt: skip
    experts = len(ends)
    a_rows, b_columns = (len(a), (experts, b.shape[-1])) if b.ndim == 3 else (experts * len(a), (experts * b.shape[1],))
    b_scale = b_scale.reshape(-1, 1).expand(b_columns) if b.ndim == 3 else b_scale.reshape(1).expand(b_columns)
    found = torch._scaled_grouped_mm(a, b, a_scale.reshape(1).expand(a_rows).contiguous(), b_scale.contiguous(), offs=ends,
                                     out_dtype=torch.bfloat16, use_fast_accum=True)  # fmt: skip
    return found.to(dtype)


def filled(q: Tensor) -> Tensor:
    """(rows, K) with zeros behind K, up to the multiple of 16 that torch's product asks for: they add nothing."""
    missing = -q.shape[-1] % 16
    return F.pad(q.view(torch.uint8), (0, missing)).view(torch.float8_e4m3fn) if missing else q


def turn(q: Tensor) -> Tensor:
    """The transpose of the last two dimensions, copied."""
    return q.view(torch.uint8).transpose(-1, -2).contiguous().view(torch.float8_e4m3fn)
