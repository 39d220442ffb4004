"""The experts for the few tokens of a decoding step on the CPU: the same sum as `Experts`, paced by the weights' bytes.

    out_t = sum over the chosen i of g_t,i * Expert_i(x_t)

In training every expert multiplies hundreds of tokens; in decoding, one or two. Reading an expert's weights is then most
of the time, and what a grouped GEMM does around it the rest. So here the host sorts the choices, experts without a token
cost nothing, and each chosen expert is read once, in products written as W x^T with two columns or more. With one column
(an expert's only token, which therefore goes in twice) or as x W^T the product becomes a matrix-vector one, or one of few
rows; both read weights from memory at less than half the speed. Up to SINGLY tokens hardly ever share an expert and need
no sorting: each takes the band products of linear.py by itself.

For a longer text or batch, the experts of a small model are also *turned*: their transposes are stored, once a cache, and
the product becomes a sum of rows with weights, y = sum_d x_d W^T[d], which is what an embedding bag computes. One call
then multiplies all the chosen experts of all tokens, and W_down's sums over F and over K are one sum. It needs no sorting
either, and so it also serves the many rows of a rollout while the experts are tiny.

Shapes: N tokens, K chosen, M slots (N * K, and the doubles), E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.model.linear import PARTS
from minids.model.router import Routing
from minids.model.watch import Watch

if TYPE_CHECKING:
    from minids.model.cache import LatentCache

SINGLY = 3  # tokens up to which each goes alone
FEW = 4  # tokens an expert, on average; with more of them the grouped GEMM is as good
PAYS = 512  # tokens to come, in all rows, from which turning the experts saves more time than it takes
PAYS_FEW = 128  # the same when several tokens run at once: then each call that is spared counts more
SMALL = 1 << 17  # multiplications of an expert's tokens by one of its matrices up to which calls are most of the time
LARGE = 1 << 22  # numbers of a layer's gate and up projections from which the memory for a second copy is not spent


def applies(x_ND: Tensor, routing: Routing, n_experts: int) -> bool:
    """Whether `few_tokens` is the way: inference on the CPU with at most FEW tokens an expert."""
    few = 0 < routing.indices.numel() <= FEW * n_experts
    return few and x_ND.is_cpu and not torch.is_grad_enabled()


def few_tokens(x_ND: Tensor, routing: Routing, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """sum_k g_k Expert_k(x): (N, D), with ``gate_up`` (E, 2F, D) and ``down`` (E, D, F) as in `Experts`."""
    divides = gate_up_EFD.shape[1] % PARTS == 0 and down_EDF.shape[1] % PARTS == 0
    indices = routing.indices.tolist()
    if len(x_ND) <= SINGLY and divides and x_ND.dtype == gate_up_EFD.dtype == torch.float32:
        parts = zip(x_ND.split(1), indices, routing.weights.unbind(), strict=True)
        rows = [one_token(x_1D, chosen, weights_K, gate_up_EFD, down_EDF) for x_1D, chosen, weights_K in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    experts, sizes, token_M, slot_NK = sort_choices(indices)
    x_MD = x_ND.index_select(0, torch.tensor(token_M))
    gate_FM, up_FM = blocks_linear(x_MD, gate_up_EFD, experts, sizes).chunk(2)
    h_MF = F.silu(gate_FM).mul_(up_FM).t().contiguous()
    y_MD = blocks_linear(h_MF, down_EDF, experts, sizes).t().contiguous()
    weights_NK = routing.weights.to(y_MD.dtype)
    return F.embedding_bag(torch.tensor(slot_NK), y_MD, mode="sum", per_sample_weights=weights_NK)


class Turned:
    """A layer's experts transposed: ``gate_up`` (E * D, 2F) and ``down`` (E * F, D), row d (f) of expert e at e D + d."""

    def __init__(self, gate_up_EFD: Tensor, down_EDF: Tensor):
        self.watch = Watch([gate_up_EFD, down_EDF])
        self.gate_up, self.down = (w.transpose(1, 2).contiguous().flatten(0, 1) for w in (gate_up_EFD, down_EDF))
        self.inputs_D, self.inputs_F = torch.arange(gate_up_EFD.shape[2]), torch.arange(down_EDF.shape[2])


def turned(gate_up_EFD: Tensor, down_EDF: Tensor, cache: LatentCache | None, layer: int, tokens: int = 1,
           chosen: int = 1) -> Turned | None:  # fmt: skip
    """The layer's turned experts where they serve: float32 inference on the CPU, a small layer, few tokens an expert, and a
    cache that has them or has room for PAYS tokens more. ``tokens``: how many this pass has, ``chosen`` experts each."""
    if cache is None or torch.is_grad_enabled() or not gate_up_EFD.is_cpu or gate_up_EFD.dtype != torch.float32:
        return None
    if not small(tokens * chosen, down_EDF) or gate_up_EFD.is_inference() or torch.is_autocast_enabled("cpu"):
        return None
    found = cache.turned.get(layer)
    if found is not None and found.watch.unchanged([gate_up_EFD, down_EDF]):
        return found
    to_come = cache.rows * (cache.capacity - cache.filled)
    if found is None and to_come < (PAYS if tokens == 1 else PAYS_FEW):
        return None
    cache.turned[layer] = Turned(gate_up_EFD, down_EDF)
    return cache.turned[layer]


def small(choices: int, down_EDF: Tensor) -> bool:
    """Whether turned experts serve so many choices of all tokens: a small layer, and few tokens an expert."""
    numbers, experts = down_EDF.numel(), len(down_EDF)
    return 2 * numbers <= LARGE and (choices <= FEW * experts or choices * numbers <= SMALL * experts**2)


def bags(x_ND: Tensor, routing: Routing, experts: Turned) -> Tensor:
    """`few_tokens` over turned experts."""
    (n, k), d, f = routing.indices.shape, len(experts.inputs_D), len(experts.inputs_F)
    expert_NK1 = routing.indices.unsqueeze(-1)
    rows_MD = torch.add(experts.inputs_D, expert_NK1, alpha=d).view(n * k, d)
    x_MD = x_ND.unsqueeze(1).expand(n, k, d).reshape(n * k, d)
    gate_MF, up_MF = F.embedding_bag(rows_MD, experts.gate_up, mode="sum", per_sample_weights=x_MD).split(f, dim=1)
    h_MF = F.silu(gate_MF).mul_(up_MF).mul_(routing.weights.view(n * k, 1))
    rows_NKF = torch.add(experts.inputs_F, expert_NK1, alpha=f).view(n, k * f)
    return F.embedding_bag(rows_NKF, experts.down, mode="sum", per_sample_weights=h_MF.view(n, k * f))


def one_token(x_1D: Tensor, experts: list[int], weights_K: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """`few_tokens` for one, as the band products of linear.py; down products add to one sum, (1, D)."""
    (e, f2, d), k, f = gate_up_EFD.shape, len(experts), down_EDF.shape[2]
    gate_up, down = gate_up_EFD.view(e, PARTS, f2 // PARTS, d), down_EDF.view(e, PARTS, d // PARTS, f)
    x_PD1 = x_1D.contiguous().as_strided((PARTS, d, 1), (0, 1, d))  # the same column for each band
    gate_KF, up_KF = torch.cat([torch.bmm(gate_up[i], x_PD1) for i in experts]).view(k, f2).split(f, dim=1)
    h_KF = F.silu(gate_KF).mul_(up_KF).mul_(weights_K.unsqueeze(1))
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
