"""Mixture of experts: many small feed-forward nets, K of them a token, and one for all [V3 section 2.1.2, eq. 12].

    out_t = Shared(x_t) + sum over the chosen i of g_t,i * Expert_i(x_t),   Expert(x) = W_down (silu(W_gate x) * W_up x)

The problem is to run E differently sized little batches at the speed of one large product. The weights of all experts
are stacked; *dispatch* copies each token to K slots, sorted by expert, so that an expert's tokens lie side by side; one
grouped GEMM runs them all; *combine* sums each token's K slots. Dispatch and combine are each other's transpose: the
backward of one is the forward of the other. No token is dropped.

Where the GEMM library wants it, each expert's block is filled up to a multiple of some rows. Filling slots repeat a token
with gate value 0: they add nothing forward, and nothing to any gradient.

On CUDA in BF16 all of it is kernels (minids/kernels/experts.py, dispatch.py), and the host never waits for the device.

Shapes: N tokens, K chosen, M slots (N * K, and the filling), E experts, D hidden, F expert width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids import kernels
from minids.config import ModelConfig
from minids.kernels import uses_kernels
from minids.model import moe_decode
from minids.model.attention import LatentCache
from minids.model.layers import MLP, swiglu
from minids.model.router import Gate, Routing


@dataclass
class Dispatch:
    """Which slot holds what. A choice is one of the N * K (token, chosen expert) pairs, in that order."""

    choice_M: Tensor  # int64: the choice in each slot; N * K in filling slots
    token_M: Tensor  # int64: the token in each slot
    slot_NK: Tensor  # int64: the slot of each choice
    ends_E: Tensor  # int32: where each expert's slots end


def plan_dispatch(routing: Routing, multiple: int = 1, bound: bool = False) -> Dispatch:
    """Sorts the choices by expert, each expert's block filled up to a ``multiple`` of slots. ``bound``: as many slots as
    there can be at most, which the host knows without asking the device; those behind the last expert's hold no expert's
    row, and what a product leaves in them is not defined."""
    if uses_kernels(routing.indices) and (bound or multiple == 1) and routing.indices.numel():
        found = kernels.plan_slots(routing.indices.contiguous(), len(routing.load), multiple=multiple)
        return Dispatch(*found)
    (n, k), device = routing.indices.shape, routing.indices.device
    expert_of_choice = routing.indices.flatten()
    choice_M = expert_of_choice.argsort(stable=True)
    ends_E, slot_M = routing.load.cumsum(0), torch.arange(n * k, device=device)
    if multiple > 1:
        starts_E, blocks_E = ends_E - routing.load, (routing.load + multiple - 1) // multiple * multiple
        ends_E = blocks_E.cumsum(0)
        slot_M += (ends_E - blocks_E - starts_E).index_select(0, expert_of_choice.index_select(0, choice_M))
        filled = torch.full((int(ends_E[-1]),), n * k, device=device)
        choice_M = filled.index_copy_(0, slot_M, choice_M)
        slot_NK = torch.empty_like(expert_of_choice).index_copy_(0, choice_M[slot_M], slot_M)
    else:
        slot_NK = torch.empty_like(choice_M).index_copy_(0, choice_M, slot_M)
    token_M = choice_M.div(k, rounding_mode="floor").clamp_max_(n - 1)
    return Dispatch(choice_M, token_M, slot_NK.view(n, k), ends_E.to(torch.int32))


def sum_slots(y_MD: Tensor, slot_NK: Tensor) -> Tensor:
    """out[n] = sum over k of y[slot[n, k]], (N, D): an embedding bag is just that, in one pass over memory."""
    if uses_kernels(y_MD) and y_MD.dtype == torch.bfloat16 and not (torch.is_grad_enabled() and y_MD.requires_grad):
        return kernels.combine(y_MD, slot_NK)
    return F.embedding_bag(slot_NK, y_MD, mode="sum")


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return x_ND.index_select(0, plan.token_M)

    @staticmethod
    def backward(ctx, d_MD: Tensor):
        return sum_slots(d_MD, ctx.plan.slot_NK), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MD: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return sum_slots(y_MD, plan.slot_NK)

    @staticmethod
    def backward(ctx, d_ND: Tensor):
        return d_ND.index_select(0, ctx.plan.token_M), None


def grouped_linear(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Row block e of ``x`` (M, D), which ends before row ``ends[e]`` (int32), times ``weight[e]`` (F, D) transposed.
    Returns (M, F). One grouped GEMM where torch has one for these sizes, else a loop over experts."""
    element = 16 // x_MD.element_size()  # the grouped GEMM wants rows that start at multiples of 16 bytes
    aligned = weight_EFD.shape[1] % element == 0 and weight_EFD.shape[2] % element == 0
    if aligned and x_MD.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch._grouped_mm(x_MD, weight_EFD.transpose(1, 2), offs=ends_E)
    starts = [0, *ends_E.tolist()]
    blocks = [x_MD[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return torch.cat([F.linear(block, w) for block, w in zip(blocks, weight_EFD, strict=True)])


def gemm_multiple(x: Tensor) -> int:
    """oneDNN, which multiplies BF16 and FP16 on the CPU, compiles a kernel for every new number of rows; expert loads
    differ at every step, so rounding them up to a few sizes saves more than the filling costs."""
    return 32 if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and len(x) > 1024 else 1


class Experts(nn.Module):
    """All routed experts of a layer: ``gate_up_proj`` (E, 2F, D), gate rows above up rows, and ``down_proj`` (E, D, F).
    On disk they are ``experts.E.{gate,up,down}_proj``: checkpoint.py splits and stacks."""

    may_copy = True  # whether `copied_once` serves these; not where weights are quantised

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        e, d, f = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))
        self.copies: tuple[Tensor, Tensor] | None = None  # both in BF16, while `copied_once` lasts

    def forward(self, x_ND: Tensor, routing: Routing, cache: LatentCache | None = None, layer: int = 0) -> Tensor:
        """sum_k g_k Expert_k(x), (N, D). With a cache, weights may be kept in it as decoding layer ``layer`` wants them."""
        if self._fits_kernels(x_ND, routing):
            return self._run_kernels(x_ND, routing)
        gate_up_EFD, down_EDF, weights = self.gate_up_proj, self.down_proj, routing.weights.flatten()
        if torch.is_autocast_enabled(x_ND.device.type):
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, gate_up_EFD, down_EDF = x_ND.to(dtype), gate_up_EFD.to(dtype), down_EDF.to(dtype)
        turned = moe_decode.turned(gate_up_EFD, down_EDF, cache, layer, *routing.indices.shape)
        if turned is not None:
            return moe_decode.bags(x_ND, routing, turned)
        if moe_decode.applies(x_ND, routing, len(gate_up_EFD)):
            return moe_decode.few_tokens(x_ND, routing, gate_up_EFD, down_EDF)
        plan = plan_dispatch(routing, gemm_multiple(x_ND))
        if len(plan.token_M) > len(weights):
            weights = torch.cat([weights, weights.new_zeros(1)])  # the gate value of filling slots
        # It scales the narrow hidden row, down(g h) = g down(h): F numbers instead of D. As published, in x's dtype.
        weight_M1 = weights.index_select(0, plan.choice_M).to(x_ND.dtype).unsqueeze(-1)
        h_MF = swiglu(grouped_linear(_Dispatch.apply(x_ND, plan), gate_up_EFD, plan.ends_E), row_weight=weight_M1)
        return _Combine.apply(grouped_linear(h_MF, down_EDF, plan.ends_E), plan)


    def _fits_kernels(self, x_ND: Tensor, routing: Routing) -> bool:
        """Whether the products are in BF16, of sizes that the kernels take."""
        if not uses_kernels(x_ND) or routing.indices.numel() == 0:
            return False
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        return dtype == torch.bfloat16 and not any(size % 8 for size in self.down_proj.shape[1:])

    def _run_kernels(self, x_ND: Tensor, routing: Routing) -> Tensor:
        plan, weights, copies = plan_dispatch(routing), (self.gate_up_proj, self.down_proj), self.copies
        if copies is None and self.down_proj.dtype != torch.bfloat16:
            copies = self.copy_weights()
        return kernels.routed_experts(x_ND.to(torch.bfloat16), routing.weights.float(), *weights, plan.token_M,
                                      plan.slot_NK, plan.ends_E, plan.choice_M, copies=copies)  # fmt: skip

    def copy_weights(self) -> tuple[Tensor, Tensor]:
        """Both weights in BF16."""
        return self.gate_up_proj.detach().to(torch.bfloat16), self.down_proj.detach().to(torch.bfloat16)


@contextmanager
def copied_once(experts: Sequence[Experts]) -> Iterator[None]:
    """Inside, where nobody may write to the weights, experts that multiply in BF16 on kernels make one copy of float32
    weights for all forward passes: for the micro-batches of a step under autocast."""
    served = [layer for layer in experts if layer.may_copy and layer.down_proj.dtype != torch.bfloat16
              and uses_kernels(layer.down_proj)]  # fmt: skip
    for layer in served:
        layer.copies = layer.copy_weights()
    try:
        yield
    finally:
        for layer in served:
            layer.copies = None


class MoE(nn.Module):
    """The published ``mlp`` of a MoE layer: ``gate``, ``experts`` and ``shared_experts``."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        width = cfg.moe_intermediate_size * cfg.n_shared_experts
        self.shared_experts = MLP(cfg.hidden_size, width) if width else None

    def forward(self, x_BTD: Tensor, cache: LatentCache | None = None, layer: int = 0) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, -2)
        routing = self.gate(x_ND)
        out = self.experts(x_ND, routing, cache, layer).view_as(x_BTD)
        return (out if self.shared_experts is None else out + self.shared_experts(x_BTD)), routing
