"""The linear layer of V3's training: forward, input gradient and weight gradient in FP8 (V3 section 3.3, figure 6).

    y = x W^T           x quantised 1 x 128 along its inputs, W 128 x 128
    dx = dy W           dy quantised 1 x 128 along the outputs, the same W
    dW = dy^T x         dy and x quantised 128 x 1 along the tokens, FP32 out

The weight itself stays FP32: it is what the optimizer updates, and its gradient is FP32 too. Of the input only its FP8
numbers are kept (minids/fp8/saved.py); the weight gradient dequantises them and quantises them again, along the tokens.

The weight is quantised once a step, whatever the number of micro-batches (`quantised_once`); backward needs its FP8
numbers too, a byte each.

Shapes: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minids.fp8.operands import Operand
from minids.fp8.products import Simulated, engine_for
from minids.fp8.recipe import Fp8Recipe
from minids.fp8.saved import Again, Source, restore, save, source_of
from minids.model.linear import Linear


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, quantised: tuple[Operand, Operand], engine: Simulated, wide_input: bool,
                given: Operand | None, source: Source | None) -> Tensor:  # fmt: skip
        x_MK, (w_fprop, w_dgrad) = x.reshape(-1, x.shape[-1]), quantised
        if wide_input:
            x_operand, kept = engine.wide(x_MK)
        else:
            x_operand = engine.rows(x_MK) if given is None else given
            kept = source.read() if source else engine.kept_input(x_MK, x_operand)
        y = engine.fprop(x_operand, w_fprop, compute_dtype(x))
        ctx.engine, ctx.wide_input, ctx.shape, ctx.dtype = engine, wide_input, x.shape, x.dtype
        ctx.again = source.again if source else None
        save(ctx, kept, w_dgrad)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        engine, (kept, weight) = ctx.engine, restore(ctx)
        dy_rows, dy_columns = engine.both(dy.reshape(-1, dy.shape[-1]))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = engine.dgrad(dy_rows, weight, ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = engine.wgrad(dy_columns, input_columns(engine, kept, ctx.again, ctx.wide_input))
        return dx, dw, None, None, None, None, None


def input_columns(engine: Simulated, kept, again: Again | None, exact: bool = False) -> Operand:
    """The input of a layer, quantised along its tokens, from what was kept of it."""
    if again is None:
        return engine.columns_again(kept, exact)

    def columns(x: Tensor) -> Operand:
        x_MK = x.reshape(-1, x.shape[-1])
        return engine.columns_again(engine.kept_input(x_MK, engine.rows(x_MK)), exact)

    return again(kept, columns, (engine, exact))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product's result: autocast's where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Fp8Linear(Linear):
    """x W^T with ``weight`` (N, K) float32, computed in FP8: (..., K) -> (..., N).

    Args:
        in_features, out_features: K and N.
        recipe: an `Fp8Recipe` or the name of one.
        wide_input: keep the input in E5M6 with power-of-two scales, as V3 does for o_proj.

    The forward pass raises ValueError for an input of another width or without tokens and TypeError for one that is not
    floating point. NaN and infinity pass through as NaN, so that the loss says so and the trainer skips the step.
    """

    def __init__(self, in_features: int, out_features: int, recipe: str | Fp8Recipe = "v3", wide_input: bool = False):
        super().__init__(in_features, out_features)
        self.recipe, self.wide_input = Fp8Recipe.named(recipe), wide_input
        self.shared, self.quantised = None, (Quantised(),)

    @classmethod
    def of(cls, linear: Linear, recipe: str | Fp8Recipe = "v3", wide_input: bool = False) -> Fp8Linear:
        """The FP8 layer on the very weight of ``linear``."""
        with torch.device("meta"):
            found = cls(linear.in_features, linear.out_features, recipe, wide_input)
        found.weight = linear.weight
        return found.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features)
        engine = engine_for(self.recipe, x.device)
        given = self.shared.rows(engine, x) if self.shared is not None and torch.is_grad_enabled() else None
        source = source_of(x) if self.recipe.recompute and not self.wide_input else None
        quantised = self.quantised[0](engine.weight, self.weight)
        return _Fp8Linear.apply(x, self.weight, quantised, engine, self.wide_input, given, source)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}" + (", wide_input=True" if self.wide_input else "")


class Quantised:
    """Makes the FP8 numbers of a layer's weights: at every call, or once while `quantised_once` lasts."""

    def __init__(self):
        self.kept, self.made = False, None

    def __call__(self, make: Callable, *weights: Tensor | None) -> Any:
        """What ``make`` makes of the weights."""
        if self.made is not None:
            return self.made
        with torch.no_grad():
            made = make(*weights)
        self.made = made if self.kept else None
        return made


@contextmanager
def quantised_once(model: nn.Module) -> Iterator[None]:
    """Inside, where nobody may write to the weights, each layer quantises its weights once, for all micro-batches of a
    step. (That they have changed could not be found out: torch counts the writes to a tensor, but its fused AdamW does
    not.)"""
    found = [q for module in model.modules() for q in getattr(module, "quantised", ())]
    for q in found:
        q.kept = True
    try:
        yield
    finally:
        for q in found:
            q.kept, q.made = False, None


class SharedInput:
    """Layers that read one tensor (q_a_proj and kv_a_proj_with_mqa) quantise it once and keep one copy of it."""

    def __init__(self):
        self.last: tuple[weakref.ref, int, Operand] | None = None

    def rows(self, engine: Simulated, x: Tensor) -> Operand:
        """The operand of x for Fprop: that of the last call, if x is its very tensor, unchanged."""
        if self.last is not None and self.last[0]() is x and self.last[1] == x._version:
            found, self.last = self.last[2], None
            return found
        found = engine.rows(x.detach().reshape(-1, x.shape[-1]))
        self.last = (weakref.ref(x), x._version, found)
        return found


def check_input(x: Tensor, features: int) -> None:
    """Raises unless x is a floating-point (..., features) with at least one row."""
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise TypeError(f"x: got dtype {x.dtype}, expected a floating-point tensor of 16 bits or more")
    if x.ndim < 1 or x.shape[-1] != features or x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {features}) with at least one row")
