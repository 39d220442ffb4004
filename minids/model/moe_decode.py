"""The experts for the few tokens of a decoding step on the CPU: the same sum as `Experts`, paced by the weights' bytes.

    out_t = sum over the chosen i of g_t,i * Expert_i(x_t)

In training every expert multiplies hundreds of tokens; in decoding, one or two. Reading an expert's weights is then most
of the time, and what a grouped GEMM does around it the rest. So here the host sorts the choices, experts without a token
cost nothing, and each chosen expert is read once, in products written as W x^T with two columns or more. With one column
(an expert's only token, which therefore goes in twice) or as x W^T the product becomes a matrix-vector one, or one of few
rows; both read weights from memory at less than half the speed. A single token, which needs no sorting, takes the band
products of linear.py instead.

Shapes: N tokens, K chosen, M slots (N * K, and the doubles), E experts, D hidden, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.model.linear import PARTS
from minids.model.router import Routing

FEW = 4  # tokens an expert, on average; with more of them the grouped GEMM is as good


def applies(x_ND: Tensor, routing: Routing, n_experts: int) -> bool:
    """Whether `few_tokens` is the way: inference on the CPU with at most FEW tokens an expert."""
    return x_ND.is_cpu and not torch.is_grad_enabled() and routing.indices.numel() <= FEW * n_experts


def few_tokens(x_ND: Tensor, routing: Routing, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """sum_k g_k Expert_k(x): (N, D), with ``gate_up`` (E, 2F, D) and ``down`` (E, D, F) as in `Experts`."""
    divides = gate_up_EFD.shape[1] % PARTS == 0 and down_EDF.shape[1] % PARTS == 0
    if len(x_ND) == 1 and divides and x_ND.dtype == gate_up_EFD.dtype == torch.float32:
        return one_token(x_ND, routing, gate_up_EFD, down_EDF)
    experts, sizes, token_M, slot_NK = sort_choices(routing.indices.tolist())
    x_MD = x_ND.index_select(0, torch.tensor(token_M))
    gate_FM, up_FM = blocks_linear(x_MD, gate_up_EFD, experts, sizes).chunk(2)
    h_MF = F.silu(gate_FM).mul_(up_FM).t().contiguous()
    y_MD = blocks_linear(h_MF, down_EDF, experts, sizes).t().contiguous()
    weights_NK = routing.weights.to(y_MD.dtype)
    return F.embedding_bag(torch.tensor(slot_NK), y_MD, mode="sum", per_sample_weights=weights_NK)


def one_token(x_1D: Tensor, routing: Routing, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """`few_tokens` for one, as the band products of linear.py; down products add to one sum, (1, D)."""
    (e, f2, d), k, f = gate_up_EFD.shape, routing.indices.shape[1], down_EDF.shape[2]
    experts = routing.indices.tolist()[0]
    gate_up, down = gate_up_EFD.view(e, PARTS, f2 // PARTS, d), down_EDF.view(e, PARTS, d // PARTS, f)
    x_PD1 = x_1D.contiguous().as_strided((PARTS, d, 1), (0, 1, d))  # the same column for each band
    gate_KF, up_KF = torch.cat([torch.bmm(gate_up[i], x_PD1) for i in experts]).view(k, f2).split(f, dim=1)
    h_KF = F.silu(gate_KF).mul_(up_KF).mul_(routing.weights.view(k, 1))
    columns = h_KF.as_strided((k, PARTS, f, 1), (f, 0, 1, f)).unbind()
    y_PD1 = torch.bmm(down[experts[0]], columns[0])
    for i, h_PF1 in zip(experts[1:], columns[1:], strict=True):
        y_PD1.baddbmm_(down[i], h_PF1)
    return y_PD1.view(1, d)


def sort_choices(indices: list[list[int]]) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """From each token's K experts: the experts hit, the slots each has, the token in each slot, the slot of each choice."""
    choices_of: dict[int, list[tuple[int, int]]] = {}  # expert -> its (token, choice)
    for token, row in enumerate(indices):
        for choice, expert in enumerate(row):
            choices_of.setdefault(expert, []).append((token, choice))
    slot_NK, token_M, sizes = [[0] * len(row) for row in indices], [], []
    for choices in choices_of.values():
        for token, choice in choices:
            slot_NK[token][choice] = len(token_M)
            token_M.append(token)
        if len(choices) == 1:
            token_M.append(token)
        sizes.append(max(len(choices), 2))
    return list(choices_of), sizes, token_M, slot_NK


def blocks_linear(x_MD: Tensor, weight_EFD: Tensor, experts: list[int], sizes: list[int]) -> Tensor:
    """Each block of ``sizes`` rows of x times its expert's weight: (M, D) -> the result's transpose, (F, M). Column
    blocks of one result spare the joining of many; a block of x wants each row contiguous."""
    out_FM, weights = x_MD.new_empty(weight_EFD.shape[1], len(x_MD)), weight_EFD.unbind()
    for e, x_Dm, out_Fm in zip(experts, x_MD.t().split(sizes, dim=1), out_FM.split(sizes, dim=1), strict=True):
        torch.mm(weights[e], x_Dm, out=out_Fm)
    return out_FM
