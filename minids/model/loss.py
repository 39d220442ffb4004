"""The loss over a large vocabulary, without ever holding all logits.

The problem: V3's vocabulary has 129,280 entries. The float32 logits of one sequence of 4096 tokens are 2.1 GB, softmax
and gradient as much again each, for the main head and for every MTP depth. But cross entropy needs, of each token's
logits z = W h, only logsumexp(z) and z_label, and its gradient is known at once:

    loss = logsumexp(z) - z_label,     dz = softmax(z) - onehot(label),     dh = dz W,     dW = dz^T h

So a few tokens at a time: make their logits, take the loss, turn them into dz in place, multiply back, forget them. On
CUDA one kernel turns a chunk of logits into losses and dz (minids/kernels/cross_entropy.py).

Shapes: N tokens, D hidden, V vocabulary, c tokens a chunk.
"""

import torch
from torch import Tensor

from minids import kernels
from minids.kernels import uses_kernels
from minids.model.check import check_indices

IGNORE = -100  # a label that does not count, as in torch
CHUNK_ELEMENTS = 1 << 20  # logits held at a time: 4 MiB in float32, inside a cache; on CUDA 256 times as many


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses of all tokens whose label counts; the gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
        with_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        d_hidden = torch.empty_like(hidden_ND) if with_gradient else None
        d_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if with_gradient else None
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            h_cD, counts_c1 = hidden_ND[part], (labels_N[part] != IGNORE).unsqueeze(1)
            label_c1 = labels_N[part].clamp_min(0).unsqueeze(1)
            z_cV = (h_cD @ weight_VD.t()).float()
            p_cV = z_cV.softmax(-1)
            # logsumexp(z) = z_max - log(p_max), and p_max >= 1/V never underflows, as p_label may
            lse_c1 = z_cV.amax(-1, keepdim=True) - p_cV.amax(-1, keepdim=True).log()
            total += ((lse_c1 - z_cV.gather(1, label_c1)) * counts_c1).sum()
            if with_gradient:
                p_cV.scatter_add_(1, label_c1, -torch.ones_like(lse_c1)).mul_(counts_c1)
                dz_cV = p_cV.to(weight_VD.dtype)
                torch.mm(dz_cV, weight_VD, out=d_hidden[part])
                if dz_cV.dtype == torch.float32:
                    d_weight.addmm_(dz_cV.t(), h_cD)
                else:
                    d_weight += dz_cV.t() @ h_cD
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx, d_total: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), (d_weight * d_total).to(ctx.weight_dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight_VD: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(W h)[label], a float32 scalar; labels of -100 do not count.

    ``hidden`` (..., D) and ``weight`` (V, D) in any one float dtype (under autocast, its dtype), ``labels`` (...) int64.
    The same value and gradients as ``F.cross_entropy(hidden @ weight.T, labels, reduction="sum")``.
    """
    hidden_ND, labels_N = hidden.flatten(0, -2), labels.flatten()
    if len(hidden_ND) != len(labels_N):
        raise ValueError(f"labels of shape {tuple(labels.shape)}: allowed is {tuple(hidden.shape[:-1])}")
    check_indices("labels", labels_N, len(weight_VD), IGNORE)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    elements = CHUNK_ELEMENTS * (256 if hidden.is_cuda else 1)
    chunk = max(16, elements // weight_VD.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        if uses_kernels(hidden_ND) and hidden_ND.dtype in (torch.bfloat16, torch.float32):
            return kernels.linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk=chunk)
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats of ``logits`` (..., V) for ``labels`` (...) that are not -100, from logits at hand."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE)
