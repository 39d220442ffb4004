"""V3's router in one pass: sigmoid, bias, group-limited top-k, gate values (V3 section 2.1.2, equations 13 to 16).

    s = sigmoid(logits)            choice = s + bias            (the bias selects, and never enters a gate value)
    group score = the sum of a group's two largest choices; the best topk_group groups stay
    indices = the K largest choices among them                 weights = scale * s_k / sum of the K chosen s

The problem: as torch operations this reads and writes (N, E) a dozen times and sorts twice. Here a program keeps the
scores of a few tokens in registers, and K times takes the largest and strikes it out. Equal choices: the lower index.

Floor: logits read, scores written, 8 N E bytes, and the chosen ones.

Shapes: N tokens, E experts (a power of two), G groups, K chosen.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, check_shape, choose, jit, tl


def router(
    logits: Tensor, bias: Tensor, *, n_group: int, topk_group: int, k: int, scale: float, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses K experts for every token.

    Args:
        logits: (N, E) float32, contiguous; differentiable. bias: (E,) float32.
        n_group: groups of adjacent experts, of at least two each; E, E / n_group powers of two for the kernel.
        topk_group: groups kept. k: experts chosen, at most as many as the kept groups have. scale: sum of a token's gates.
        backend: see `minids.kernels.backend`.

    Returns:
        weights (N, K) float32, indices (N, K) int64, best choice first, scores (N, E) float32. Gradients flow from
        weights and scores to logits.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("logits", logits, ndim=2, dtype=torch.float32)
    check("bias", bias, ndim=1, dtype=torch.float32)
    e = logits.shape[1]
    check_shape("bias", bias, (e,))
    if not logits.is_contiguous():
        raise ValueError(f"logits: got strides {logits.stride()}, expected a contiguous matrix")
    if n_group < 1 or e % n_group or e // n_group < 2:
        raise ValueError(f"n_group: got {n_group} for {e} experts, expected equal groups of at least two")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group: got {topk_group}, expected 1 to n_group = {n_group}")
    if not 1 <= k <= topk_group * (e // n_group):
        raise ValueError(f"k: got {k}, expected 1 to the {topk_group * (e // n_group)} experts of the groups kept")
    if choose(backend, logits, bias) == "torch":
        return reference(logits, bias, n_group, topk_group, k, scale)
    if e & (e - 1):
        raise ValueError(f"logits: got {e} experts, expected a power of two")
    return torch.ops.minids.router(logits, bias, n_group, topk_group, k, scale)


def reference(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification."""
    scores = logits.sigmoid()
    groups = (scores.detach() + bias).unflatten(-1, (n_group, -1))
    best = groups.topk(2, -1).values.sum(-1).topk(topk_group, -1).indices
    dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
    indices = groups.masked_fill(dropped[..., None], -torch.inf).flatten(-2).topk(k, -1).indices
    chosen = scores.gather(-1, indices)
    return scale * chosen / (chosen.sum(-1, keepdim=True) + 1e-20), indices, scores


# ---- Triton ----


@jit(varying=("N",))
def _router(logits_ptr, bias_ptr, weights_ptr, indices_ptr, scores_ptr, N, scale,
            E: tl.constexpr, G: tl.constexpr, TOPK_GROUP: tl.constexpr, K: tl.constexpr, K_POWER: tl.constexpr,
            ROWS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    expert = tl.arange(0, E)
    at, mask = row[:, None] * E + expert[None, :], row[:, None] < N
    scores = 1.0 / (1.0 + tl.exp(-tl.load(logits_ptr + at, mask=mask, other=0.0)))
    tl.store(scores_ptr + at, scores, mask=mask)
    choice = scores + tl.load(bias_ptr + expert)[None, :]

    # The sum of the two best of each group: the best, and the best of what is left when its first place is struck out.
    groups = tl.reshape(choice, (ROWS, G, E // G))
    place = tl.arange(0, E // G)[None, None, :]
    first = tl.argmax(groups, axis=2)
    rest = tl.where(place == first[:, :, None], float("-inf"), groups)
    group_scores = tl.max(groups, axis=2) + tl.max(rest, axis=2)

    kept = tl.zeros((ROWS, G), dtype=tl.int32)
    group = tl.arange(0, G)[None, :]
    for _ in tl.static_range(TOPK_GROUP):
        best = group == tl.argmax(group_scores, axis=1)[:, None]
        kept = tl.where(best, 1, kept)
        group_scores = tl.where(best, float("-inf"), group_scores)
    choice = tl.reshape(tl.where(kept[:, :, None] == 1, groups, float("-inf")), (ROWS, E))

    slot = tl.arange(0, K_POWER)[None, :]
    chosen = tl.zeros((ROWS, K_POWER), dtype=tl.float32)
    indices = tl.zeros((ROWS, K_POWER), dtype=tl.int64)
    for i in tl.static_range(K):
        index = tl.argmax(choice, axis=1)
        struck = expert[None, :] == index[:, None]
        value = tl.sum(tl.where(struck, scores, 0.0), axis=1)
        chosen = tl.where(slot == i, value[:, None], chosen)
        indices = tl.where(slot == i, index[:, None].to(tl.int64), indices)
        choice = tl.where(struck, float("-inf"), choice)
    weights = scale * chosen / (tl.sum(chosen, axis=1)[:, None] + 1e-20)
    out, mask = row[:, None] * K + slot, mask & (slot < K)
    tl.store(weights_ptr + out, weights, mask=mask)
    tl.store(indices_ptr + out, indices, mask=mask)


@torch.library.custom_op("minids::router", mutates_args=())
def _router_op(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, e = logits.shape
    weights, indices, scores = _empty(logits, k)
    if n:
        k_power, rows = 1 << (k - 1).bit_length(), 8
        _router[(cdiv(n, rows),)](
            logits, bias, weights, indices, scores, n, scale, e, n_group, topk_group, k, k_power, rows, num_warps=4
        )
    return weights, indices, scores


def _empty(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty((n, k)), logits.new_empty((n, k), dtype=torch.int64), logits.new_empty(logits.shape)


@_router_op.register_fake
def _(logits, bias, n_group, topk_group, k, scale):
    return _empty(logits, k)


def _save(ctx, inputs, output):
    weights, indices, scores = output
    ctx.scale = inputs[-1]
    ctx.save_for_backward(weights, indices, scores)
    ctx.mark_non_differentiable(indices)


def _gradients(ctx, d_weights: Tensor | None, _, d_scores: Tensor | None):
    """w_k = c s_k / S:  ds_k = (c dw_k - sum_j dw_j w_j) / S, then the sigmoid's s (1 - s)."""
    weights, indices, scores = ctx.saved_tensors
    total = scores.gather(-1, indices).sum(-1, keepdim=True) + 1e-20
    d = torch.zeros_like(scores) if d_scores is None else d_scores.clone()
    if d_weights is not None:
        d.scatter_add_(-1, indices, (ctx.scale * d_weights - (d_weights * weights).sum(-1, keepdim=True)) / total)
    return d * scores * (1 - scores), None, None, None, None, None


_router_op.register_autograd(_gradients, setup_context=_save)
