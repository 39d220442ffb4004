"""The MoE layer of `minids.bench.gpu`, forward (see `gpu_cases`). Shapes: T tokens, E experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import kernels
from minids.bench.gpu_cases import (
    BF16,
    CHOSEN,
    EXPERTS,
    HIDDEN,
    TOKENS,
    WIDTH,
    Builders,
    Case,
    Limits,
    error,
    normal,
)  # fmt: skip
from minids.model.moe import plan_dispatch
from minids.model.router import Routing


def moe_layers(limits: Limits) -> Builders:
    """The routed experts forward, from tokens and their routing (planned before) to tokens."""

    def case(fp8: bool) -> Case:
        x = normal(TOKENS, HIDDEN)
        up, down = normal(EXPERTS, 2 * WIDTH, HIDDEN) / 85, normal(EXPERTS, HIDDEN, WIDTH) / 45
        scores = torch.rand(TOKENS, EXPERTS, device="cuda")
        weights, indices = scores.topk(CHOSEN)
        load = torch.bincount(indices.flatten(), minlength=EXPERTS)
        plan = plan_dispatch(Routing(weights, indices, scores, load), 128 if fp8 else 1)
        weight_M = torch.cat([weights.flatten(), weights.new_zeros(1)])[plan.choice_M]  # 0 in slots that fill up
        up_q, down_q = kernels.quantize_block(up), kernels.quantize_block(down)

        def ours() -> Tensor:
            if fp8:
                q, s = kernels.quantize_tile(x, column_major=True)  # once a token, then copied to its slots
                slots = q.view(torch.uint8).index_select(0, plan.token_M).view(q.dtype)
                s_slots = s.t().index_select(1, plan.token_M).t()
                both = kernels.grouped_fp8_gemm(slots, s_slots, *up_q, plan.ends_E)
                y = kernels.grouped_fp8_gemm(*kernels.swiglu_quantize(both, weight_M), *down_q, plan.ends_E)
                return kernels.combine(y, plan.slot_NK)
            return kernels.routed_experts(x, weights, up, down, plan.token_M, plan.slot_NK, plan.ends_E, plan.choice_M)

        def peer() -> Tensor:
            both = torch._grouped_mm(x.index_select(0, plan.token_M), up.transpose(1, 2), offs=plan.ends_E)
            gate, rest = both.chunk(2, -1)
            h = F.silu(gate) * rest * weight_M[:, None].to(BF16)
            y = torch._grouped_mm(h, down.transpose(1, 2), offs=plan.ends_E)
            return torch.zeros_like(x).index_add_(0, plan.token_M, y)

        work = 2.0 * TOKENS * CHOSEN * 3 * HIDDEN * WIDTH
        found = error(ours()[:8], exact_moe(x[:8], weights[:8], indices[:8], up, down))
        name = f"MoE forward {'FP8' if fp8 else 'BF16'}"
        candidates = {"minids": ours, "torch BF16": peer}
        shape = f"{TOKENS} x {HIDDEN}, {EXPERTS} of {WIDTH}, top {CHOSEN}"
        return Case(name, shape, "TFLOP/s", work, work / limits["fp8" if fp8 else "bf16"], candidates, found)

    return [lambda: case(False), lambda: case(True)]


def exact_moe(x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The routed experts' sum in FP32, token by token."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for n in range(len(x)):
        for weight, e in zip(weights[n], indices[n].tolist(), strict=True):
            gate, rest = (up[e].float() @ x[n].float()).chunk(2)
            out[n] += down[e].float() @ (F.silu(gate) * rest * weight)
    return out
