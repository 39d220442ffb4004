"""The three FP8 products of a layer, by two engines: simulated on any device, real on FP8 tensor cores.

    Fprop   y  = x  W^T        Dgrad   dx = dy W        Wgrad   dW = dy^T x        (FP32 out: the weight gradient)

Stacked experts have the same three, a product for each expert's block of rows: y_e = x_e W_e^T, and so on. ``ends`` says
where the blocks end; each is filled up to a multiple of 128 rows, so that a 128 x 1 group lies in one block.

The simulated engine dequantises both operands and multiplies them in FP32 on the CPU, in BF16 on CUDA: there exactly
what FP8 stores if the scale is a power of two (E4M3 has 4 significant bits, BF16 8), and rounded to 8 bits else. With
``recipe.bits`` the sum itself is simulated too (minids/fp8/tensor_core.py), with scales applied where V3's kernel does.

The real engine hands q and scales to minids.kernels, or, for one scale a tensor, to torch's own FP8 product with "fast
accumulation", which is the tensor core's sum without promotion.

Shapes: M rows (tokens, or slots of experts), N outputs, K inputs, E experts.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from minids.fp8.operands import Kept12, Operand, join, keep_12_bits, quantize
from minids.fp8.recipe import MX_BLOCK, Fp8Recipe
from minids.model.layers import swiglu_backward, swiglu_forward
from minids.model.moe import Dispatch, sum_slots

SLOTS = 128  # an expert's block of rows is a multiple of this


@cache
def engine_for(recipe: Fp8Recipe, device: torch.device, width: int = 0) -> Simulated:
    """The engine that computes ``recipe`` on ``device``, for joined weights of ``width`` rows each. RuntimeError: the
    recipe asks for the real one, which cannot."""
    if not recipe.is_real(device):
        return Simulated(recipe)
    from minids.fp8 import real

    if recipe.scaling == "tensor":
        return real.RealTensor(recipe)
    if width % recipe.block == 0:
        return real.RealBlocks(recipe)
    if recipe.engine == "real":
        raise RuntimeError(f"Fp8Recipe.engine = 'real' with a feed-forward of width {width}: must be a multiple of 128")
    return Simulated(recipe)


class Simulated:
    """Quantise, dequantise, multiply. An operand keeps the layout of its tensor in all three products."""

    bound = False  # experts' slots end where the last expert's do

    def __init__(self, recipe: Fp8Recipe):
        self.recipe = recipe
        self.side = MX_BLOCK if recipe.scaling == "mx" else recipe.block

    def rows(self, x_MC: Tensor, exact: bool = False) -> Operand:
        """An operand for a sum over its columns, 1 x 128. exact: a power of two for a scale, whatever the recipe."""
        group = tuple(x_MC.shape[-2:]) if self.recipe.scaling == "tensor" else (1, self.side)
        return quantize(x_MC, group, "ue8m0" if exact else self.recipe.scale)

    def columns(self, x_MC: Tensor, exact: bool = False) -> Operand:
        """An operand for a sum over its rows, 128 x 1."""
        group = tuple(x_MC.shape[-2:]) if self.recipe.scaling == "tensor" else (self.side, 1)
        return quantize(x_MC, group, "ue8m0" if exact else self.recipe.scale)

    def both(self, x_MC: Tensor, exact: bool = False) -> tuple[Operand, Operand]:
        """`rows` and `columns`."""
        rows = self.rows(x_MC, exact)
        return rows, (rows if self.recipe.scaling == "tensor" else self.columns(x_MC, exact))

    def kept_input(self, x_MC: Tensor, rows: Operand) -> Operand:
        """What is kept of an input for Wgrad: its operand for Fprop; in MX, where another grouping would lose more, the
        other one."""
        return self.columns(x_MC) if self.recipe.scaling == "mx" else rows

    def columns_again(self, kept: Operand | Kept12, exact: bool = False) -> Operand:
        """The operand for Wgrad from what was kept: dequantised, and quantised 128 x 1."""
        if isinstance(kept, Operand) and self.recipe.scaling != "block":
            return kept
        return self.columns(kept.dequantize(), exact)

    def wide(self, x_MC: Tensor) -> tuple[Operand, Kept12]:
        """The operand of o_proj's input for Fprop, and what is kept of it."""
        return self.rows(x_MC, exact=True), keep_12_bits(x_MC, (1, self.side))

    def slots(self, rows: Operand, plan: Dispatch) -> Operand:
        """The rows of tokens in the order of the experts; zeros in slots that fill up a block."""
        found, choices = rows.gather(plan.token_M), plan.slot_NK.numel()
        if len(plan.choice_M) > choices:
            found.q.view(torch.uint8).masked_fill_((plan.choice_M >= choices).unsqueeze(1), 0)
        return found

    def slot_columns(self, rows: Operand, plan: Dispatch) -> Operand:
        """An operand for Wgrad from the FP8 rows that the experts receive."""
        slots = self.slots(rows, plan)
        return slots if self.recipe.scaling == "tensor" else self.columns(slots.dequantize())

    def combine(self, y_MD: Tensor, plan: Dispatch) -> Tensor:
        """Each token's sum over its slots, (N, D)."""
        return sum_slots(y_MD, plan.slot_NK)

    def gated(self, z_MF: Tensor, weight_M1: Tensor | None) -> tuple[Operand, Operand]:
        """The operand of h = silu(z_gate) z_up g for Fprop, and what is kept of z."""
        return self.rows(swiglu_forward(z_MF, None, weight_M1)), self.rows(z_MF)

    def gated_backward(self, dh_MF: Tensor, z: Operand, weight_M1: Tensor | None) -> tuple:
        """From dh: dz as operands for Dgrad and for Wgrad, h again for Wgrad, and the gradient of g or None."""
        z_MF = z.dequantize(dh_MF.dtype)
        h = self.columns(swiglu_forward(z_MF, None, weight_M1))
        dz, _, d_weight = swiglu_backward(dh_MF, z_MF, None, weight_M1)
        return *self.both(dz), h, d_weight

    def weight(self, w: Tensor) -> tuple[Operand, Operand]:
        """(..., N, K) -> the operands for Fprop and for Dgrad: one and the same, but for MX."""
        if self.recipe.scaling == "mx":
            return self.rows(w), self.columns(w)
        group = tuple(w.shape[-2:]) if self.recipe.scaling == "tensor" else (self.side, self.side)
        found = quantize(w, group, self.recipe.scale)
        return found, found

    def joined_weight(self, gate: Tensor, up: Tensor | None) -> tuple[Operand, Operand]:
        """Gate and up (F, K) as one weight of 2F rows, or (..., 2F, K) that holds both. Blocks start anew at ``up``, as in
        the published tensors; a scale a tensor is one for both, which are summed over together."""
        if self.recipe.scaling == "tensor":
            return self.weight(gate if up is None else torch.cat([gate, up]))
        if up is None:
            fprop, dgrad = self.weight(gate.unflatten(-2, (2, -1)))
            return fprop._replace(joined=True), dgrad._replace(joined=True)
        first, second = self.weight(gate), self.weight(up)
        fprop = join(first[0], second[0])
        return fprop, fprop if first[0] is first[1] else join(first[1], second[1])

    def fprop(self, x: Operand, w: Operand, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        """x W^T, (M, N)."""
        if self.recipe.bits:
            return self._accumulated(x, w, dtype, ends, "fprop")
        return multiply(_wide(x), _wide(w).transpose(-1, -2), ends).to(dtype)

    def dgrad(self, dy: Operand, w: Operand, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
        """dy W, (M, K)."""
        if self.recipe.bits:
            return self._accumulated(dy, w, dtype, ends, "dgrad")
        return multiply(_wide(dy), _wide(w), ends).to(dtype)

    def wgrad(self, dy: Operand, x: Operand, ends: Tensor | None = None) -> Tensor:
        """dy^T x, (N, K) or (E, N, K), float32."""
        if self.recipe.bits:
            return self._accumulated(dy, x, torch.float32, ends, "wgrad")
        return multiply(_wide(dy).t(), _wide(x), ends).float()

    def _accumulated(self, a: Operand, b: Operand, dtype: torch.dtype, ends: Tensor | None, kind: str) -> Tensor:
        from minids.fp8.tensor_core import accumulated

        return accumulated(a, b, self.recipe, kind, ends).to(dtype)


def _wide(operand: Operand) -> Tensor:
    """What the operand stands for; stacked weights (E, 2, F, K) as (E, 2F, K), (2, F, K) of one layer as (2F, K)."""
    wide = operand.dequantize(torch.bfloat16 if operand.q.is_cuda else torch.float32)
    return wide.flatten(-3, -2) if operand.joined else wide


def multiply(a: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    """a b, out of autocast's reach; with ``ends`` (E,) int32 a product for each block: of rows of a (M, K) with b[e] of
    (E, K, N), or of columns of a (N, M) with rows of b (M, K)."""
    with torch.autocast(a.device.type, enabled=False):
        if ends is None:
            return a @ b
        element = 16 // a.element_size()  # the grouped GEMM wants rows that start at multiples of 16 bytes
        if not any(size % element for size in (*a.shape[-2:], *b.shape[-2:])):
            return torch._grouped_mm(a, b, offs=ends)
        starts = [0, *ends.tolist()]
        blocks = list(zip(starts[:-1], starts[1:], strict=True))
        if b.ndim == 2:
            return torch.stack([a[:, i:j] @ b[i:j] for i, j in blocks])
        return torch.cat([a[i:j] @ w for (i, j), w in zip(blocks, b, strict=True)])
