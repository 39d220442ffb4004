"""V3's router in one pass: sigmoid, bias, group-limited top-k, gate values (V3 section 2.1.2, equations 13 to 16).

    s = sigmoid(logits)            choice = s + bias            (the bias selects, and never enters a gate value)
    group score = the sum of a group's two largest choices; the best topk_group groups stay
    indices = the K largest choices among them                 weights = scale * s_k / sum of the K chosen s

    ds_k = (scale dw_k - sum_j dw_j w_j) / sum of the K chosen s        d logits = (ds + d scores) s (1 - s)

The problem: as torch operations this reads and writes (N, E) a dozen times and sorts twice. Here a program keeps the
scores of a few tokens in registers, and K times takes the largest and strikes it out. Equal choices: the lower index. It
also counts what each expert got; backward is one pass, too.

Floors: logits read, scores written, 8 N E bytes, and the chosen ones; backward 12 N E at most. Operations: about 3 (K + 4)
N E comparisons, which is where the time goes: K rounds of the largest, one after the other.

Shapes: N tokens, E experts (a power of two), G groups, K chosen.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, check_shape, choose, jit, registered, tl


def router(
    logits: Tensor, bias: Tensor, *, n_group: int, topk_group: int, k: int, scale: float, with_load: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Chooses K experts for every token.

    Args:
        logits: (N, E) float32, contiguous; differentiable. bias: (E,) float32.
        n_group: groups of adjacent experts, of at least two each; E, E / n_group powers of two for the kernel.
        topk_group: groups kept. k: experts chosen, at most as many as the kept groups have. scale: sum of a token's gates.
        with_load: also return how many tokens chose each expert.
        backend: see `minids.kernels.backend`.

    Returns:
        weights (N, K) float32, indices (N, K) int64, best choice first, scores (N, E) float32. Gradients flow from
        weights and scores to logits. ``with_load``: and load (E,) int64.

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
        weights, indices, scores = reference(logits, bias, n_group, topk_group, k, scale)
        load = torch.bincount(indices.flatten(), minlength=e) if with_load else None
    else:
        if e & (e - 1):
            raise ValueError(f"logits: got {e} experts, expected a power of two")
        weights, indices, scores, load = _router_op(logits, bias, n_group, topk_group, k, scale)
    return (weights, indices, scores, load) if with_load else (weights, indices, scores)


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
def _router(logits_ptr, bias_ptr, weights_ptr, indices_ptr, scores_ptr, load_ptr, N, scale,
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
    load = tl.zeros((ROWS, E), dtype=tl.int32)
    for i in tl.static_range(K):
        index = tl.argmax(choice, axis=1)
        struck = expert[None, :] == index[:, None]
        value = tl.sum(tl.where(struck, scores, 0.0), axis=1)
        chosen = tl.where(slot == i, value[:, None], chosen)
        indices = tl.where(slot == i, index[:, None].to(tl.int64), indices)
        choice = tl.where(struck, float("-inf"), choice)
        load += (struck & mask).to(tl.int32)
    load = tl.sum(load, axis=0)
    tl.atomic_add(load_ptr + expert, load.to(tl.int64), mask=load > 0)  # integers: their order changes nothing
    weights = scale * chosen / (tl.sum(chosen, axis=1)[:, None] + 1e-20)
    out, mask = row[:, None] * K + slot, mask & (slot < K)
    tl.store(weights_ptr + out, weights, mask=mask)
    tl.store(indices_ptr + out, indices, mask=mask)


@jit(varying=("N",))
def _backward(d_weights_ptr, d_scores_ptr, weights_ptr, indices_ptr, scores_ptr, out_ptr, N, scale,
              E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, SCORES: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    expert = tl.arange(0, E)[None, :]
    at, inside = row[:, None] * E + expert, row < N
    mask = inside[:, None]
    scores = tl.load(scores_ptr + at, mask=mask, other=0.0)
    d = tl.zeros((ROWS, E), dtype=tl.float32)
    if SCORES:
        d = tl.load(d_scores_ptr + at, mask=mask, other=0.0)
    if WEIGHTS:
        chosen, inner = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
        for k in tl.static_range(K):
            index = tl.load(indices_ptr + row * K + k, mask=inside, other=0).to(tl.int32)
            chosen += tl.sum(tl.where(expert == index[:, None], scores, 0.0), axis=1)
            d_weight = tl.load(d_weights_ptr + row * K + k, mask=inside, other=0.0)
            inner += d_weight * tl.load(weights_ptr + row * K + k, mask=inside, other=0.0)
        for k in tl.static_range(K):
            index = tl.load(indices_ptr + row * K + k, mask=inside, other=0).to(tl.int32)
            d_weight = tl.load(d_weights_ptr + row * K + k, mask=inside, other=0.0)
            d_chosen = (scale * d_weight - inner) / (chosen + 1e-20)
            d += tl.where(expert == index[:, None], d_chosen[:, None], 0.0)
    tl.store(out_ptr + at, d * scores * (1.0 - scores), mask=mask)


def _tokens(e: int) -> tuple[int, int]:
    """Tokens and warps of a program, from a sweep on an H200: one warp with a token's scores asks no other."""
    return (1, 1) if e >= 256 else (16, 4)


@registered("router")
def _router_op(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, e = logits.shape
    weights, indices, scores, load = found = _empty(logits, k)
    load.zero_()
    if n:
        k_power, (rows, warps) = 1 << (k - 1).bit_length(), _tokens(e)
        _router[(cdiv(n, rows),)](
            logits, bias, weights, indices, scores, load, n, scale, e, n_group, topk_group, k, k_power, rows,
            num_warps=warps,
        )  # fmt: skip
    return found


@registered("router_backward")
def _router_backward(
    d_weights: Tensor | None, d_scores: Tensor | None, weights: Tensor, indices: Tensor, scores: Tensor, scale: float
) -> Tensor:
    (n, e), out, rows = scores.shape, scores.new_empty(scores.shape), 8
    if n:
        _backward[(cdiv(n, rows),)](
            scores if d_weights is None else d_weights, scores if d_scores is None else d_scores, weights, indices, scores,
            out, n, scale, e, indices.shape[1], rows, d_weights is not None, d_scores is not None, num_warps=4,
        )  # fmt: skip
    return out


def _empty(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, e = logits.shape
    indices, load = logits.new_empty((n, k), dtype=torch.int64), logits.new_empty(e, dtype=torch.int64)
    return logits.new_empty((n, k)), indices, logits.new_empty(logits.shape), load


@_router_op.register_fake
def _(logits, bias, n_group, topk_group, k, scale):
    return _empty(logits, k)


@_router_backward.register_fake
def _(d_weights, d_scores, weights, indices, scores, scale):
    return scores.new_empty(scores.shape)


def _save(ctx, inputs, output):
    weights, indices, scores, load = output
    ctx.scale = inputs[-1]
    ctx.save_for_backward(weights, indices, scores)
    ctx.mark_non_differentiable(indices, load)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_weights: Tensor | None, _, d_scores: Tensor | None, __):
    d_weights, d_scores = (None if d is None else d.contiguous() for d in (d_weights, d_scores))
    if d_weights is None and d_scores is None:
        return None, None, None, None, None, None
    return _router_backward(d_weights, d_scores, *ctx.saved_tensors, ctx.scale), None, None, None, None, None


_router_op.register_autograd(_gradients, setup_context=_save)
