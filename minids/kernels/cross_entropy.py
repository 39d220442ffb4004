"""Cross entropy over a large vocabulary, loss and gradient in one pass over the logits (V3's has 129,280 words).

    loss[t] = logsumexp(z[t]) - z[t, label]            d loss[t] / d z[t, v] = softmax(z[t])[v] - [v = label]

The problem: 4,096 tokens have half a gigabyte of BF16 logits, and softmax, gradient and their FP32 copies several times
that. `linear_cross_entropy` never has them all: it multiplies a chunk of tokens by the head, overwrites the chunk's logits
by their gradient, multiplies that on to the gradients of hidden state and head, and goes on. Loss and gradients are
complete when forward ends; backward only scales them.

The kernel: one program a token reads its row twice: once for maximum and sum of exponentials, as they change from block to
block (the running sum is scaled when the maximum moves), once more, from cache, to write the gradient in place.

Floors of the kernel for T tokens: 4 T V bytes in BF16; about 10 T V operations, two of them exponentials, below that.
Floor of `linear_cross_entropy`: 6 T V D operations at the tensor core's rate.

Shapes: T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from minids.kernels.backend import check, check_shape, choose, jit, tl

IGNORE = -100
DTYPES = (torch.bfloat16, torch.float32)


def cross_entropy_(logits: Tensor, labels: Tensor, *, backend: str | None = None) -> Tensor:
    """Losses of the rows; logits are overwritten by the gradient of their sum.

    Args:
        logits: (T, V) BF16 or FP32, contiguous; changed in place. labels: (T,) int64 in [0, V), or -100: loss and gradient
            are 0. Not checked on the device.
        backend: see `minids.kernels.backend`.

    Returns:
        (T,) float32.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("logits", logits, ndim=2, dtype=DTYPES)
    check("labels", labels, ndim=1, dtype=torch.int64)
    check_shape("labels", labels, (len(logits),))
    if not logits.is_contiguous() or not labels.is_contiguous() or logits.shape[1] == 0:
        raise ValueError(
            f"logits, labels: got shape {tuple(logits.shape)} and strides {logits.stride()}, {labels.stride()}, expected "
            "contiguous tensors and V > 0"
        )
    if choose(backend, logits, labels) == "torch":
        losses, gradient = reference(logits, labels)
        logits.copy_(gradient)
        return losses
    return torch.ops.minids.cross_entropy_(logits, labels)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 1024, backend: str | None = None
) -> Tensor:
    """The sum of the tokens' losses of logits = hidden weight^T, which never exist all at once.

    Args:
        hidden: (T, D), weight: (V, D), both BF16 or both FP32; differentiable. labels: (T,) int64, -100 for none.
        chunk: tokens at a time.

    Returns:
        () float32.
    """
    check("hidden", hidden, ndim=2, dtype=DTYPES)
    check("weight", weight, ndim=2, dtype=hidden.dtype)
    check_shape("weight", weight, (len(weight), hidden.shape[1]))
    check("labels", labels, ndim=1, dtype=torch.int64)
    check_shape("labels", labels, (len(hidden),))
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected at least one token")
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, backend)


def reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The specification: losses (T,) and the gradient of their sum (T, V), in FP32."""
    z = logits.float()
    losses = torch.nn.functional.cross_entropy(z, labels, ignore_index=IGNORE, reduction="none")
    kept = (labels != IGNORE)[:, None]
    one_hot = torch.zeros_like(z).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    return losses, (z.softmax(-1) - one_hot) * kept


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, backend: str | None) -> Tensor:
        with_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        losses, labels = [], labels.contiguous()
        d_hidden = torch.empty_like(hidden) if with_gradient else None
        d_weight = None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.t()
            losses.append(cross_entropy_(logits, labels[part], backend=backend).sum())
            if with_gradient:
                torch.mm(logits, weight, out=d_hidden[part])
                d_part = (logits.t() @ hidden[part]).float()
                d_weight = d_part if d_weight is None else d_weight.add_(d_part)
        if with_gradient:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss.to(d_weight.dtype), None, None, None


# ---- Triton ----


@jit
def _cross_entropy(logits_ptr, labels_ptr, losses_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(labels_ptr + row)
    kept = label >= 0
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)  # one running maximum and sum a lane; joined at the end
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, z)
        # A lane that has seen nothing has -inf twice; 0 stands in for it, so that no -inf is subtracted from itself.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - base) + tl.exp(z - base)
        largest = higher
    top = tl.max(largest, axis=0)
    total_all = tl.sum(total * tl.exp(largest - top), axis=0)
    at_label = tl.load(logits_ptr + tl.where(kept, label, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(kept, top + tl.log(total_all) - at_label, 0.0))
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(z - top) / total_all - tl.where(column == label, 1.0, 0.0)
        gradient = tl.where(kept, gradient, 0.0)
        tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < V)


@torch.library.custom_op("minids::cross_entropy_", mutates_args=("logits",))
def _cross_entropy_op(logits: Tensor, labels: Tensor) -> Tensor:
    (t, v), losses = logits.shape, logits.new_empty(len(logits), dtype=torch.float32)
    if t:
        block = min(4096, 1 << (v - 1).bit_length())
        _cross_entropy[(t,)](logits, labels, losses, v, block, num_warps=max(1, min(8, block // 512)))
    return losses


@_cross_entropy_op.register_fake
def _(logits, labels):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
