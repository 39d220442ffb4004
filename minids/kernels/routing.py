"""V3's router in one pass: sigmoid, bias, group-limited top-k, gate values (V3 section 2.1.2, equations 13 to 16).

    s = sigmoid(logits)            choice = s + bias            (the bias selects, and never enters a gate value)
    group score = the sum of a group's two largest choices; the best topk_group groups stay
    indices = the K largest choices among them                 weights = scale * s_k / sum of the K chosen s

    ds_k = (scale dw_k - sum_j dw_j w_j) / sum of the K chosen s        d logits = (ds + d scores) s (1 - s)

The problem: as torch operations this reads and writes (N, E) a dozen times and sorts twice. Here a program keeps a few
tokens in registers and reads them once. What costs time is the choice: K rounds of the largest, each of which looks at all
that is left. So the groups that stay are laid over each other, and a list of TOPK_GROUP experts, one of each, is sorted at
every place; a round looks at the heads of the lists, and only the list whose head won moves up:

    place            0   1   2  ...  E / G - 1
    heads           .9  .7  .8         .3             the largest of these is chosen, and its list moves up
    behind them     .4  .6  .1         .2

Keys are integers that order like the choices; equal ones: the lower index. What each expert got is counted afterwards, from
the indices: thousands of programs that add to 64 numbers wait for each other longer than all of this takes. Backward is one
pass, too.

Floors: logits read, scores written, 8 N E bytes, and the chosen ones; backward 12 N E at most. For 8,192 tokens and 256
experts that is 4 us, and a copy of as many bytes takes 9.5 us, half of it to start and end; the choice adds 6, about 440
instructions of a warp a token.

Shapes: N tokens, E experts (a power of two), G groups, K chosen.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, check_shape, choose, jit, registered, tl
from minids.kernels.dispatch import count_choices

LOWEST = tl.constexpr(-(2**31))  # below every key


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
        weights, indices, scores, load = _router_op(logits, bias, n_group, topk_group, k, scale, with_load)
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


@jit
def _two_best(a1, a2, b1, b2):
    """The two largest of two pairs, each in descending order."""
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@jit
def _orderable(x):
    """An integer that orders like x: the machine finds the largest integer of 32 threads in one instruction."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _rooms(group_scores, GROUPS: tl.constexpr, KEPT: tl.constexpr):
    """Where each group goes among those that are kept, in the order of the groups; GROUPS where it is not. A group's rank
    is the number of those before it."""
    rooms, room = (), tl.zeros_like(group_scores[0]).to(tl.int32)
    for g in tl.static_range(GROUPS):
        rank = tl.zeros_like(room)
        for h in tl.static_range(GROUPS):
            if h < g:
                rank += (group_scores[h] >= group_scores[g]).to(tl.int32)
            if h > g:
                rank += (group_scores[h] > group_scores[g]).to(tl.int32)
        rooms = rooms + (tl.where(rank < KEPT, room, GROUPS),)
        room += (rank < KEPT).to(tl.int32)
    return rooms


@jit
def _insert(keys, experts, key, expert, LENGTH: tl.constexpr):
    """Each thread's list, in descending order, with one more; behind its equals."""
    longer, longer_experts = (), ()
    here = tl.zeros_like(key) != 0
    for j in tl.static_range(LENGTH):
        here = here | (key > keys[j])  # once the place is found, all others move up
        longer = longer + (tl.where(here, key, keys[j]),)
        longer_experts = longer_experts + (tl.where(here, expert, experts[j]),)
        key, expert = tl.where(here, keys[j], key), tl.where(here, experts[j], expert)
    return longer + (key,), longer_experts + (expert,)


@jit
def _pop(lists, won, last, LENGTH: tl.constexpr):
    """The lists without their heads where those have won."""
    shorter = ()
    for j in tl.static_range(LENGTH - 1):
        shorter = shorter + (tl.where(won, lists[j + 1], lists[j]),)
    return shorter + (tl.where(won, last, lists[LENGTH - 1]),)


@jit(varying=("N",))
def _router(logits_ptr, bias_ptr, weights_ptr, indices_ptr, scores_ptr, N, scale,
            E: tl.constexpr, PIECES: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, K_POWER: tl.constexpr,
            ROWS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside, member = row[:, None] < N, tl.arange(0, E // PIECES)
    pieces, group_scores = (), ()
    for g in tl.static_range(PIECES):
        expert = g * (E // PIECES) + member
        at = row[:, None] * E + expert[None, :]
        scores = 1.0 / (1.0 + tl.exp(-tl.load(logits_ptr + at, mask=inside, other=0.0)))
        tl.store(scores_ptr + at, scores, mask=inside)
        choice = scores + tl.load(bias_ptr + expert)[None, :]
        pieces = pieces + (_orderable(choice),)
        if KEPT < PIECES:
            best, second = tl.reduce((choice, tl.full(choice.shape, float("-inf"), tl.float32)), 1, _two_best)
            group_scores = group_scores + (best + second,)

    if KEPT < PIECES:
        rooms = _rooms(group_scores, PIECES, KEPT)
    keys, experts = (), ()
    for room in tl.static_range(KEPT):
        key, start = pieces[room], tl.full((ROWS,), room * (E // PIECES), tl.int32)
        for g in tl.static_range(room + 1, room + 1 + PIECES - KEPT):  # who may be there if it is not the group itself
            moved = rooms[g] == room
            key, start = tl.where(moved[:, None], pieces[g], key), tl.where(moved, g * (E // PIECES), start)
        keys, experts = _insert(keys, experts, key, start[:, None] + member[None, :], room)

    slot = tl.arange(0, K_POWER)[None, :]
    indices = tl.zeros((ROWS, K_POWER), dtype=tl.int32)
    for i in tl.static_range(K):
        best = tl.max(keys[0], axis=1)
        index = tl.min(tl.where(keys[0] == best[:, None], experts[0], E), axis=1)
        indices = tl.where(slot == i, index[:, None], indices)
        won = experts[0] == index[:, None]
        keys, experts = _pop(keys, won, LOWEST, KEPT), _pop(experts, won, E, KEPT)

    mask = inside & (slot < K)
    chosen = tl.load(logits_ptr + row[:, None] * E + indices, mask=mask, other=float("-inf"))
    chosen = 1.0 / (1.0 + tl.exp(-chosen))
    weights = scale * chosen / (tl.sum(chosen, axis=1)[:, None] + 1e-20)
    out = row[:, None] * K + slot
    tl.store(weights_ptr + out, weights, mask=mask)
    tl.store(indices_ptr + out, indices.to(tl.int64), mask=mask)


@jit(varying=("N",))
def _backward(d_weights_ptr, d_scores_ptr, weights_ptr, indices_ptr, scores_ptr, out_ptr, N, scale,
              E: tl.constexpr, K: tl.constexpr, K_POWER: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
              SCORES: tl.constexpr):
    """All experts as if none had been chosen; then those that were once more."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at, d = row * E + tl.arange(0, E)[None, :], tl.zeros((ROWS, E), tl.float32)
    if SCORES:
        scores = tl.load(scores_ptr + at, mask=row < N, other=0.0)
        d = tl.load(d_scores_ptr + at, mask=row < N, other=0.0) * scores * (1.0 - scores)
    tl.store(out_ptr + at, d, mask=row < N)
    if WEIGHTS:
        slot = tl.arange(0, K_POWER)[None, :]
        mask = (row < N) & (slot < K)
        at = row * K + slot
        d_weights = tl.load(d_weights_ptr + at, mask=mask, other=0.0)
        inner = tl.sum(d_weights * tl.load(weights_ptr + at, mask=mask, other=0.0), axis=1)[:, None]
        at = row * E + tl.load(indices_ptr + at, mask=mask, other=0)
        chosen = tl.load(scores_ptr + at, mask=mask, other=0.0)
        d = (scale * d_weights - inner) / (tl.sum(chosen, axis=1)[:, None] + 1e-20)
        if SCORES:
            d += tl.load(d_scores_ptr + at, mask=mask, other=0.0)
        tl.debug_barrier()  # the zeros or sums that other threads wrote there come first
        tl.store(out_ptr + at, d * chosen * (1.0 - chosen), mask=mask)


def _tokens(n: int, e: int) -> tuple[int, int]:
    """Tokens and warps of a program, from a sweep on an H200. Four tokens a warp take the fewest instructions; where there
    are few tokens, one a warp takes the least time."""
    return (16, 4) if n > 2048 else (1, 1)


def _pieces(e: int, n_group: int, topk_group: int) -> tuple[int, int]:
    """Pieces of a token's experts that a thread keeps apart, and how many stay: the groups, if some of them go."""
    return (n_group, topk_group) if topk_group < n_group else (min(8, max(1, e // 32)),) * 2


@registered("router")
def _router_op(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, k: int, scale: float, count: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, e = logits.shape
    weights, indices, scores, load = _empty(logits, k, count)
    if n:
        rows, warps = _tokens(n, e)
        _router[(cdiv(n, rows),)](
            logits, bias, weights, indices, scores, n, scale, e, *_pieces(e, n_group, topk_group), k, power_of_two(k), rows,
            num_warps=warps,
        )  # fmt: skip
    if count:
        load = count_choices(indices, e)
    return weights, indices, scores, load


@registered("router_backward")
def _router_backward(
    d_weights: Tensor | None, d_scores: Tensor | None, weights: Tensor, indices: Tensor, scores: Tensor, scale: float
) -> Tensor:
    (n, e), k, out = scores.shape, indices.shape[1], scores.new_empty(scores.shape)
    rows, warps = _tokens(n, e)
    if n:
        _backward[(cdiv(n, rows),)](
            scores if d_weights is None else d_weights, scores if d_scores is None else d_scores, weights, indices, scores,
            out, n, scale, e, k, power_of_two(k), rows, d_weights is not None, d_scores is not None, num_warps=warps,
        )  # fmt: skip
    return out


def power_of_two(k: int) -> int:
    """The next one, which `tl.arange` wants."""
    return 1 << (k - 1).bit_length()


def _empty(logits: Tensor, k: int, count: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, e = logits.shape
    indices, load = logits.new_empty((n, k), dtype=torch.int64), logits.new_empty(e if count else 0, dtype=torch.int64)
    return logits.new_empty((n, k)), indices, logits.new_empty(logits.shape), load


@_router_op.register_fake
def _(logits, bias, n_group, topk_group, k, scale, count):
    return _empty(logits, k, count)


@_router_backward.register_fake
def _(d_weights, d_scores, weights, indices, scores, scale):
    return scores.new_empty(scores.shape)


def _save(ctx, inputs, output):
    weights, indices, scores, load = output
    ctx.scale = inputs[5]
    ctx.save_for_backward(weights, indices, scores)
    ctx.mark_non_differentiable(indices, load)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_weights: Tensor | None, _, d_scores: Tensor | None, __):
    d_weights, d_scores = (None if d is None else d.contiguous() for d in (d_weights, d_scores))
    if d_weights is None and d_scores is None:
        return (None,) * 7
    return _router_backward(d_weights, d_scores, *ctx.saved_tensors, ctx.scale), *(None,) * 6


_router_op.register_autograd(_gradients, setup_context=_save)
