"""The real engine: the products of a recipe on FP8 tensor cores (Hopper and later).

`RealBlocks` is V3's: q and scales of tiles and blocks go to minids.kernels, whose GEMM promotes and scales every 128
products. Its q and scales are those of `Simulated`, bit for bit; sums differ in the order of FP32 additions.

`RealTensor` has one scale a tensor and no promotion: torch's FP8 product with `use_fast_accum`, whose sum stays in the
tensor core from beginning to end. cuBLAS and CUTLASS apply the scales behind it.

FP8 tensor cores want the summed index adjacent in memory in both factors, so Dgrad turns the weight's bytes around, and
Wgrad quantises transposed copies.

Shapes: M rows, N outputs, K inputs, C columns, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.fp8.operands import Kept12, Operand
from minids.fp8.products import Simulated
from minids.kernels import (
    fp8_gemm,
    grouped_fp8_gemm,
    grouped_fp8_wgrad,
    quantize_block,
    quantize_tile,
    quantize_tile_t,
)


class Columns(NamedTuple):
    """An operand for Wgrad, quantised 128 x 1 where it is multiplied."""

    x: Tensor  # (M, C)
    scale: str


class RealBlocks(Simulated):
    """Tiles and blocks by minids.kernels."""

    def rows(self, x_MC: Tensor, exact: bool = False) -> Operand:
        return Operand(*quantize_tile(x_MC.contiguous(), scale=self._scale(exact)), (1, 128))

    def columns(self, x_MC: Tensor, exact: bool = False) -> Columns:
        return Columns(x_MC.contiguous(), self._scale(exact))

    def columns_again(self, kept: Operand | Kept12, exact: bool = False) -> Columns:
        """BF16 holds what was dequantised where its scales are powers of two; else FP32 does."""
        powers = isinstance(kept, Kept12) or self.recipe.scale == "ue8m0"
        return self.columns(kept.dequantize(torch.bfloat16 if powers else torch.float32), exact)

    def slot_columns(self, slots: Operand) -> Columns:
        return self.columns(slots.dequantize(torch.bfloat16))  # dispatched with powers of two

    def weight(self, w: Tensor) -> tuple[Operand, Operand]:
        found = Operand(*quantize_block(w.contiguous(), scale=self.recipe.scale), (128, 128))
        return found, found

    def joined_weight(self, gate: Tensor, up: Tensor | None) -> tuple[Operand, Operand]:
        """Blocks start anew at ``up`` by themselves: engines are chosen so that F is a multiple of 128."""
        if up is None:
            return self.weight(gate)
        (first, _), (second, _) = self.weight(gate), self.weight(up)
        q = torch.cat([first.q.view(torch.uint8), second.q.view(torch.uint8)]).view(torch.float8_e4m3fn)
        found = Operand(q, torch.cat([first.scale_inv, second.scale_inv]), first.group)
        return found, found

    def fprop(self, x: Operand, w: Operand, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        if ends is None:
            return fp8_gemm(x.q, x.scale_inv, w.q, w.scale_inv, out_dtype=dtype)
        return grouped_fp8_gemm(x.q, x.scale_inv, w.q, w.scale_inv, ends, out_dtype=dtype)

    def dgrad(self, dy: Operand, w: Operand, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        turned = Operand(turn(w.q), w.scale_inv.transpose(-1, -2).contiguous(), w.group)
        return self.fprop(dy, turned, dtype, ends)

    def wgrad(self, dy: Columns, x: Columns, ends: Tensor | None = None) -> Tensor:
        if ends is not None:
            return grouped_fp8_wgrad(dy.x, x.x, ends, scale=self.recipe.scale)
        factors = (*quantize_tile_t(dy.x, scale=dy.scale), *quantize_tile_t(x.x, scale=x.scale))
        return fp8_gemm(*factors, out_dtype=torch.float32)

    def _scale(self, exact: bool) -> str:
        return "ue8m0" if exact else self.recipe.scale


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
