"""FP8 products with a simulated accumulator, fast enough to train with (V3 section 3.3.2, "increasing accumulation
precision").

minids/fp8/accumulate.py simulates a tensor core bit by bit, down to the alignment of the 32 products of one step, at
some 5 ns a product. Here is what a matrix product can do of it, the collecting of steps in a short register,

    acc = cut(acc + sum of 32 products)          cut: keep 14 leading bits, towards zero

which is a product of 32 columns and one AND over the accumulator. The 32 products are added exactly (up to FP32). So
errors are those of `accumulate.matmul(shared_alignment=False)`, V3's words, less the alignment among 32 products. They
are a lower bound of the chip's: there products are cut at the sum's last bit, and sums of one sign lose 15 to 25 times
as much (K from 512 to 4096). Sums that change sign lose alike.

With scales of tiles the partial sum of 128 products is scaled as it is promoted to FP32; a scale of a whole tensor
waits for the end.

Shapes: M rows, N columns, K summed, s stretches of K between promotions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minids.fp8.operands import Operand
from minids.fp8.recipe import Fp8Recipe

STEP = 32  # products that one instruction adds


def collect(a_MK: Tensor, b_KN: Tensor, bits: int) -> Tensor:
    """a b in an accumulator of ``bits`` significant bits that is cut every 32 products; (M, N) float32."""
    acc = torch.zeros(a_MK.shape[0], b_KN.shape[1], device=a_MK.device)
    mask = -(1 << (24 - bits))  # FP32 has 24 significant bits: clear the last ones
    for k in range(0, a_MK.shape[1], STEP):
        acc.addmm_(a_MK[:, k : k + STEP], b_KN[k : k + STEP])
        acc.view(torch.int32).bitwise_and_(mask)
    return acc


def promoted(a_MK: Tensor, a_scale_Ms: Tensor, b_KN: Tensor, b_scale_sN: Tensor, bits: int, stretch: int | None) -> Tensor:
    """The sum of scaled partial sums of ``stretch`` products each (None: one sum of all). s may be 1: one scale for all."""
    stretch = stretch or max(a_MK.shape[1], 1)
    total = torch.zeros(a_MK.shape[0], b_KN.shape[1], device=a_MK.device)
    for i, k in enumerate(range(0, a_MK.shape[1], stretch)):
        part = collect(a_MK[:, k : k + stretch], b_KN[k : k + stretch], bits)
        a_scale, b_scale = a_scale_Ms[:, min(i, a_scale_Ms.shape[1] - 1)], b_scale_sN[min(i, len(b_scale_sN) - 1)]
        total.addcmul_(part.mul_(a_scale.unsqueeze(1)), b_scale.expand_as(part))
    return total


def accumulated(a: Operand, b: Operand, recipe: Fp8Recipe, kind: str, ends: Tensor | None) -> Tensor:
    """Fprop a b^T, Dgrad a b or Wgrad a^T b of operands, expert by expert where ``ends`` is given."""
    with torch.autocast(a.q.device.type, enabled=False):
        if ends is None:
            return _one(a, b, recipe, kind)
        starts = [0, *ends.tolist()]
        parts = []
        for e, (i, j) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            other = _rows(b, i, j) if kind == "wgrad" else Operand(b.q[e], b.scale_inv[e], b.group, b.joined)
            parts.append(_one(_rows(a, i, j), other, recipe, kind))
        return torch.stack(parts) if kind == "wgrad" else torch.cat(parts)


def _one(a: Operand, b: Operand, recipe: Fp8Recipe, kind: str) -> Tensor:
    stretch = recipe.promote_every
    if kind == "wgrad":  # both are summed over their rows
        return promoted(a.q.float().t(), _scales(a, 0).t(), b.q.float(), _scales(b, 0), recipe.bits, stretch)
    axis = -1 if kind == "fprop" else -2
    if kind == "dgrad" and b.joined and b.q.shape[-2] % b.group[0]:
        raise ValueError(f"Fp8Recipe.bits = {recipe.bits} with gate and up of {b.q.shape[-2]} rows: must be a multiple of "
                         f"{b.group[0]}, or partial sums would hold numbers of both")  # fmt: skip
    b_MC, scales = (x.flatten(-3, -2) if b.joined else x for x in (b.q.float(), _scales(b, axis)))
    if kind == "fprop":
        b_MC, scales = b_MC.t(), scales.t()
    return promoted(a.q.float(), _scales(a, -1), b_MC, scales, recipe.bits, stretch)


def _rows(operand: Operand, start: int, end: int) -> Operand:
    """Rows from start to end, multiples of the group's height, or one group that is the whole tensor."""
    height = operand.group[0]
    if operand.scale_inv.shape[0] == 1 and height > 1:
        return Operand(operand.q[start:end], operand.scale_inv, (max(end - start, 1), operand.group[1]))
    return Operand(operand.q[start:end], operand.scale_inv[start // height : -(-end // height)], operand.group)


def _scales(operand: Operand, summed: int) -> Tensor:
    """The scales with an entry for each number of the axis that is not summed over."""
    kept = -1 if summed in (0, -2) else -2
    side = operand.group[kept]
    return operand.scale_inv.repeat_interleave(side, kept).narrow(kept, 0, operand.q.shape[kept])
