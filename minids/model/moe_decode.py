"""The experts for the few tokens of a decoding step on the CPU: the same sum as `Experts`, paced by the weights' bytes.

    out_t = sum over the chosen i of g_t,i * Expert_i(x_t)

In training every expert multiplies hundreds of tokens; in decoding, one or two. Reading an expert's weights is then most
of the time, and what a grouped GEMM does around it the rest. So here the host sorts the choices, experts without a token
cost nothing, and each chosen expert is read once, in products written as W x^T with two columns or more. With one column
(an expert's only token, which therefore goes in twice) or as x W^T the product becomes a matrix-vector one, or one of few
rows; both read weights from memory at less than half the speed.

Shapes: N tokens, K chosen, M slots (N * K, and the doubles), E experts, D hidden, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.model.router import Routing

FEW = 4  # tokens an expert, on average; with more of them the grouped GEMM is as good


def applies(x_ND: Tensor, routing: Routing, n_experts: int) -> bool:
    """Whether `few_tokens` is the way: inference on the CPU with at most FEW tokens an expert."""
    return x_ND.is_cpu and not torch.is_grad_enabled() and routing.indices.numel() <= FEW * n_experts


def few_tokens(x_ND: Tensor, routing: Routing, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """sum_k g_k Expert_k(x): (N, D), with ``gate_up`` (E, 2F, D) and ``down`` (E, D, F) as in `Experts`."""
    experts, sizes, token_M, slot_NK = sort_choices(routing.indices.tolist())
    x_MD = x_ND.index_select(0, torch.tensor(token_M))
    gate_MF, up_MF = blocks_linear(x_MD, gate_up_EFD, experts, sizes).chunk(2, dim=-1)
    y_MD = blocks_linear(F.silu(gate_MF).mul_(up_MF), down_EDF, experts, sizes)
    weights_NK = routing.weights.to(y_MD.dtype)
    return F.embedding_bag(torch.tensor(slot_NK), y_MD, mode="sum", per_sample_weights=weights_NK)


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
            token_M.append(token_M[-1])
        sizes.append(max(len(choices), 2))
    return list(choices_of), sizes, token_M, slot_NK


def blocks_linear(x_MD: Tensor, weight_EFD: Tensor, experts: list[int], sizes: list[int]) -> Tensor:
    """Each block of ``sizes`` rows of x times its expert's weight, transposed: (M, D) -> (M, F)."""
    blocks = x_MD.t().split(sizes, dim=1)
    return torch.cat([torch.mm(weight_EFD[e], block).t() for e, block in zip(experts, blocks, strict=True)])
