"""Mixture of experts: many small feed-forward nets, K of them a token, and one for all [V3 section 2.1.2, eq. 12].

    out_t = Shared(x_t) + sum over the chosen i of g_t,i * Expert_i(x_t),   Expert(x) = W_down (silu(W_gate x) * W_up x)

The problem is to run E differently sized little batches at the speed of one large product. The weights of all experts
are stacked; tokens are sorted by expert (*dispatch*), so that each expert's tokens lie side by side, one grouped GEMM
runs them all, and the results return to their tokens (*combine*). No token is dropped.

Shapes: N tokens, K chosen, M = N * K rows after dispatch, E experts, D hidden, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.layers import MLP
from minids.model.router import Gate, Routing


def grouped_linear(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Row block e of ``x`` (M, D), which ends before row ``ends[e]`` (int32), times ``weight[e]`` (F, D) transposed.
    Returns (M, F). One grouped GEMM where torch has one for these sizes, else a loop over experts."""
    if torch.is_autocast_enabled(x_MD.device.type):
        dtype = torch.get_autocast_dtype(x_MD.device.type)
        x_MD, weight_EFD = x_MD.to(dtype), weight_EFD.to(dtype)
    element = 16 // x_MD.element_size()  # the grouped GEMM wants rows that start at multiples of 16 bytes
    aligned = weight_EFD.shape[1] % element == 0 and weight_EFD.shape[2] % element == 0
    if aligned and x_MD.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch._grouped_mm(x_MD, weight_EFD.transpose(1, 2), offs=ends_E)
    starts = [0, *ends_E.tolist()]
    blocks = [x_MD[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return torch.cat([F.linear(block, w) for block, w in zip(blocks, weight_EFD, strict=True)])


class Experts(nn.Module):
    """All routed experts of a layer: ``gate_up_proj`` (E, 2F, D), gate rows above up rows, and ``down_proj`` (E, D, F).
    On disk they are ``experts.E.{gate,up,down}_proj``: checkpoint.py splits and stacks."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        e, d, f = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """sum_k g_k Expert_k(x), (N, D)."""
        n, k = routing.indices.shape
        order_M = routing.indices.flatten().argsort(stable=True)  # dispatched row -> (token, choice), by expert
        token_M = order_M.div(k, rounding_mode="floor")
        ends_E = routing.load.cumsum(0).to(torch.int32)
        gate_MF, up_MF = grouped_linear(x_ND.index_select(0, token_M), self.gate_up_proj, ends_E).chunk(2, dim=-1)
        # The gate value scales the narrow hidden row: down(g * h) = g * down(h), on F numbers instead of D.
        weight_M1 = routing.weights.flatten().index_select(0, order_M).unsqueeze(-1)
        h_MF = (F.silu(gate_MF) * up_MF * weight_M1).to(gate_MF.dtype)
        y_MD = grouped_linear(h_MF, self.down_proj, ends_E)
        return y_MD.index_select(0, order_M.argsort()).unflatten(0, (n, k)).sum(1)


class MoE(nn.Module):
    """The published ``mlp`` of a MoE layer: ``gate``, ``experts`` and ``shared_experts``."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        width = cfg.moe_intermediate_size * cfg.n_shared_experts
        self.shared_experts = MLP(cfg.hidden_size, width) if width else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, -2)
        routing = self.gate(x_ND)
        out = self.experts(x_ND, routing).view_as(x_BTD)
        return (out if self.shared_experts is None else out + self.shared_experts(x_BTD)), routing
