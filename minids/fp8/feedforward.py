"""SwiGLU feed-forward nets in FP8, dense and of stacked experts, that keep FP8 numbers only (V3 sections 3.3.2, 3.3.3).

    z = x [W_gate; W_up]^T        h = silu(z_gate) z_up g        y = h W_down^T        (g: an expert's gate value, or 1)

Kept for backward: x, in FP8; z, in FP8; g. Not h: it is computed again from the kept z, which is why V3 keeps z at all.
So backward differentiates SwiGLU at the rounded z, while forward went on with the exact one.

Experts: x is quantised once a token, with powers of two for scales, then dispatched, one byte a number; the gradient of y
likewise, on its way into the experts' backward. What they send back, y and dx, is summed over a token's experts in BF16
or FP32. Slots that only fill up an expert's block are zero in every sum over tokens.

Simplification: one process. x is kept once a token and dispatched again in backward; under expert parallelism each rank
would keep the rows that it received.

Shapes: N tokens, M slots (M = N, dense), D hidden, F width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minids.fp8.linear import Quantised, check_input, compute_dtype, input_columns
from minids.fp8.operands import Operand
from minids.fp8.products import SLOTS, Simulated, engine_for
from minids.fp8.recipe import Fp8Recipe
from minids.fp8.saved import Again, Source, restore, save, source_of
from minids.model.attention import LatentCache
from minids.model.layers import MLP
from minids.model.moe import Dispatch, Experts, plan_dispatch
from minids.model.router import Routing


class _Fp8FeedForward(torch.autograd.Function):
    """With ``plan`` None: gate, up (F, D), down (D, F). Else gate (E, 2F, D) holds both, down (E, D, F). ``quantised``:
    the operands of both products' weights, for Fprop and Dgrad."""

    @staticmethod
    def forward(ctx, x_ND, gate, up, down, weight_M1, quantised, engine: Simulated, plan: Dispatch | None,
                source: Source | None):  # fmt: skip
        dtype, routed = compute_dtype(x_ND), plan is not None
        ends = plan.ends_E if routed else None
        (up_fprop, up_dgrad), (down_fprop, down_dgrad) = quantised
        x = engine.rows(x_ND, exact=routed)
        z_MF = engine.fprop(engine.slots(x, plan) if routed else x, up_fprop, dtype, ends)
        h, z = engine.gated(z_MF, weight_M1)
        y_MD = engine.fprop(h, down_fprop, dtype, ends)
        ctx.engine, ctx.plan, ctx.dtype, ctx.joined = engine, plan, dtype, up is None
        ctx.again, ctx.x_dtype = source.again if source else None, x_ND.dtype
        kept = source.read() if source else x if routed else engine.kept_input(x_ND, x)  # slots' columns are of rows
        save(ctx, kept, up_dgrad, z, down_dgrad, weight_M1)
        return engine.combine(y_MD, plan) if routed else y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        engine, plan = ctx.engine, ctx.plan
        kept, w_up, z, w_down, weight_M1 = restore(ctx)
        ends = plan.ends_E if plan is not None else None
        dy_rows, dy_columns = output_gradient(engine, dy, plan)
        dh = engine.dgrad(dy_rows, w_down, ctx.dtype, ends)
        dz_rows, dz_columns, h_columns, d_weight = engine.gated_backward(dh, z, weight_M1)
        d_down = engine.wgrad(dy_columns, h_columns, ends)
        d_up = engine.wgrad(dz_columns, input_slots(engine, kept, ctx.again, plan), ends)
        dx = engine.dgrad(dz_rows, w_up, ctx.dtype, ends)
        dx = (dx if plan is None else engine.combine(dx, plan)).to(ctx.x_dtype)
        d_gate, d_up = (d_up, None) if ctx.joined else d_up.chunk(2)
        return dx, d_gate, d_up, d_down, d_weight, None, None, None, None


def output_gradient(engine: Simulated, dy: Tensor, plan: Dispatch | None) -> tuple[Operand, Operand]:
    """The gradient of y as operands for Dgrad and Wgrad; dispatched to the slots in FP8."""
    if plan is None:
        return engine.both(dy)
    rows = engine.rows(dy, exact=True)
    return engine.slots(rows, plan), engine.slot_columns(rows, plan)


def input_slots(engine: Simulated, kept, again: Again | None, plan: Dispatch | None) -> Operand:
    """The input for Wgrad, from what was kept of it."""
    if plan is None:
        return input_columns(engine, kept, again)
    if again is not None:
        kept = engine.rows(again(kept).flatten(0, -2), exact=True)
    return engine.slot_columns(kept, plan)


class Fp8MLP(MLP):
    """The dense layers' and shared experts' feed-forward, on the very weights of an `MLP`."""

    @classmethod
    def of(cls, mlp: MLP, recipe: str | Fp8Recipe = "v3") -> Fp8MLP:
        found = cls.__new__(cls)
        super(MLP, found).__init__()
        found.gate_proj, found.up_proj, found.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        found.recipe, found.quantised = Fp8Recipe.named(recipe), (Quantised(), Quantised())
        return found.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        check_input(x, gate.shape[1])
        engine = engine_for(self.recipe, x.device, len(gate))
        source = source_of(x) if self.recipe.recompute else None
        quantised = self.quantised[0](engine.joined_weight, gate, up), self.quantised[1](engine.weight, down)
        y = _Fp8FeedForward.apply(x.reshape(-1, x.shape[-1]), gate, up, down, None, quantised, engine, None, source)
        return y.view(x.shape)


class Fp8Experts(Experts):
    """All routed experts of a layer, on the very weights of an `Experts`."""

    may_copy = False

    @classmethod
    def of(cls, experts: Experts, recipe: str | Fp8Recipe = "v3") -> Fp8Experts:
        found = cls.__new__(cls)
        super(Experts, found).__init__()
        found.gate_up_proj, found.down_proj = experts.gate_up_proj, experts.down_proj
        found.recipe, found.source, found.copies = Fp8Recipe.named(recipe), None, None
        found.quantised = (Quantised(), Quantised())
        return found.train(experts.training)

    def forward(self, x_ND: Tensor, routing: Routing, cache: LatentCache | None = None, layer: int = 0) -> Tensor:
        """sum_k g_k Expert_k(x), (N, D). Decoding with a cache computes as the plain experts do."""
        if cache is not None:
            return super().forward(x_ND, routing, cache, layer)
        check_input(x_ND, self.gate_up_proj.shape[2])
        source, self.source = self.source, None
        engine = engine_for(self.recipe, x_ND.device, self.gate_up_proj.shape[1] // 2)
        plan = plan_dispatch(routing, SLOTS, bound=engine.bound)
        weights = routing.weights.flatten()
        if len(plan.token_M) > len(weights):
            weights = torch.cat([weights, weights.new_zeros(1)])  # the gate value of filling slots
        weight_M1 = weights.index_select(0, plan.choice_M).to(compute_dtype(x_ND)).unsqueeze(-1)
        up, down = self.gate_up_proj, self.down_proj
        quantised = self.quantised[0](engine.joined_weight, up, None), self.quantised[1](engine.weight, down)
        return _Fp8FeedForward.apply(x_ND, up, None, down, weight_M1, quantised, engine, plan, source)
