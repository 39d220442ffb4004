"""Dispatch: the slot of each choice of an expert, by counting, without waiting for the device (V3 sections 2.1.2, 3.2.2).

N tokens choose K of E experts each. A slot is a row of the experts' products; the slots of an expert are a block, side by
side in the order of its tokens:

    slot[n, k] = start[e] + number of choices of e before (n, k),     e = indices[n, k],     start[e] = sum of blocks before

The problem: torch's stable sort looks at all bits of its keys, in eight passes, and how many slots only fill up a block the
device alone knows. Here blocks of tokens count their choices of each expert, one program adds the counts up, and the blocks
count again to place their choices: three small kernels. Where an expert's block is filled up to a multiple of slots, the
arrays are as long as they can become, N K + E (multiple - 1); the slots that nobody needs lie behind the last expert's.

Floors: indices read twice and slots, choices and tokens written: 40 N K bytes; 4 N K E comparisons and additions. Launches
are most of the time.

Shapes: N tokens, K chosen, E experts, M slots.
"""

import torch
from torch import Tensor

from minids.kernels.backend import cdiv, check, choose, jit, registered, tl


def plan_slots(
    indices: Tensor, experts: int, *, multiple: int = 1, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts the choices by expert, stably.

    Args:
        indices: (N, K) int64, contiguous, in [0, experts); not checked on the device. N and K may not be 0.
        experts: E. multiple: of slots, to which each expert's block is filled up.
        backend: see `minids.kernels.backend`.

    Returns:
        choice (M,) int64: the choice n K + k in each slot, N K in filling slots. token (M,) int64: its token, N - 1 in
        filling slots. slot (N, K) int64. ends (E,) int32: where each expert's slots end.
        M = N K, rounded down to a multiple after adding E (multiple - 1).

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("indices", indices, ndim=2, dtype=torch.int64)
    if 0 in indices.shape or not indices.is_contiguous():
        raise ValueError(f"indices: got shape {tuple(indices.shape)}, expected a contiguous matrix that is not empty")
    for name, value in (("experts", experts), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected a positive number")
    if choose(backend, indices) == "torch":
        return reference(indices, experts, multiple)
    return _plan(indices, experts, multiple)


def count_choices(indices: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen by indices (N, K), (E,) int64."""
    load, power = indices.new_zeros(experts), 1 << (experts - 1).bit_length()
    if indices.numel():
        _histogram[(cdiv(indices.numel(), 1024),)](indices, load, indices.numel(), power, 1024, num_warps=4)
    return load


def slots_for(choices: int, experts: int, multiple: int) -> int:
    """M: the most slots that there can be."""
    return (choices + experts * (multiple - 1)) // multiple * multiple


def reference(indices: Tensor, experts: int, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification: torch's stable sort."""
    (n, k), flat = indices.shape, indices.flatten()
    load = torch.bincount(flat, minlength=experts)
    blocks = (load + multiple - 1) // multiple * multiple
    order, ends = flat.argsort(stable=True), blocks.cumsum(0)
    rank = torch.arange(n * k, device=flat.device) - (load.cumsum(0) - load)[flat[order]]
    slot = torch.empty_like(flat)
    slot[order] = (ends - blocks)[flat[order]] + rank
    choice = torch.full((slots_for(n * k, experts, multiple),), n * k, device=flat.device)
    choice[slot] = torch.arange(n * k, device=flat.device)
    return choice, (choice // k).clamp(max=n - 1), slot.view(n, k), ends.to(torch.int32)


# ---- Triton ----


@jit(varying=("N", "E"))
def _count(indices_ptr, counts_ptr, N, E, K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """One program: how often each expert was chosen by TOKENS tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)[None, :]
    count = tl.zeros((TOKENS, EXPERTS), tl.int32)
    for k in tl.static_range(K):
        chosen = tl.load(indices_ptr + token * K + k, mask=token < N, other=-1).to(tl.int32)
        count += (chosen[:, None] == expert).to(tl.int32)
    column = tl.arange(0, EXPERTS)
    tl.store(counts_ptr + tl.program_id(0) * E + column, tl.sum(count, axis=0), mask=column < E)


@jit(varying=("CHOICES",))
def _histogram(indices_ptr, load_ptr, CHOICES, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: how often each expert is among BLOCK choices. Integers: the order of the sums changes nothing."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(indices_ptr + at, mask=at < CHOICES, other=0).to(tl.int32)
    count = tl.histogram(chosen, EXPERTS, mask=at < CHOICES)
    tl.atomic_add(load_ptr + tl.arange(0, EXPERTS), count.to(tl.int64), mask=count > 0, sem="relaxed")


@jit(varying=("BLOCKS", "E"))
def _add_up(counts_ptr, ends_ptr, BLOCKS, E, MULTIPLE: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    """One program: counts of each block become the counts of the blocks before it; where each expert's slots end."""
    expert = tl.arange(0, EXPERTS)
    before = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, BLOCKS, CHUNK):
        block = start + tl.arange(0, CHUNK)
        at = counts_ptr + block[:, None] * E + expert[None, :]
        mask = (block[:, None] < BLOCKS) & (expert[None, :] < E)
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + before[None, :], mask=mask)
        before += tl.sum(count, axis=0)
    ends = tl.cumsum((before + MULTIPLE - 1) // MULTIPLE * MULTIPLE, 0)
    tl.store(ends_ptr + expert, ends, mask=expert < E)


@jit(varying=("N", "E"))
def _place(indices_ptr, counts_ptr, ends_ptr, choice_ptr, token_ptr, slot_ptr, N, E,
           K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """One program: the slots of TOKENS tokens' choices."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, EXPERTS)
    mask, expert = token < N, column[None, :]
    count = tl.zeros((TOKENS, EXPERTS), tl.int32)
    for k in tl.static_range(K):
        chosen = tl.load(indices_ptr + token * K + k, mask=mask, other=-1).to(tl.int32)
        count += (chosen[:, None] == expert).to(tl.int32)
    start = tl.load(ends_ptr + column - 1, mask=(column > 0) & (column < E), other=0)
    start += tl.load(counts_ptr + tl.program_id(0) * E + column, mask=column < E, other=0)
    free = tl.cumsum(count, 0) - count + start[None, :]  # the next free slot of each expert when a token's turn comes
    for k in tl.static_range(K):
        chosen = tl.load(indices_ptr + token * K + k, mask=mask, other=-1).to(tl.int32)
        mine = chosen[:, None] == expert
        slot = tl.sum(tl.where(mine, free, 0), axis=1)
        free += mine.to(tl.int32)  # matters where a token chose an expert twice
        tl.store(slot_ptr + token * K + k, slot.to(tl.int64), mask=mask)
        tl.store(choice_ptr + slot, (token * K + k).to(tl.int64), mask=mask)
        tl.store(token_ptr + slot, token.to(tl.int64), mask=mask)


@registered("plan_slots")
def _plan(indices: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, k), power = indices.shape, 1 << (experts - 1).bit_length()
    choice, token, slot, ends = _empty(indices, experts, multiple)
    if multiple > 1:
        choice.fill_(n * k)
        token.fill_(n - 1)
    tokens = max(1, min(32, 2048 // power))
    counts = indices.new_empty((cdiv(n, tokens), experts), dtype=torch.int32)
    _count[(len(counts),)](indices, counts, n, experts, k, tokens, power, num_warps=4)
    _add_up[(1,)](counts, ends, len(counts), experts, multiple, max(1, min(64, 4096 // power)), power, num_warps=8)
    _place[(len(counts),)](indices, counts, ends, choice, token, slot, n, experts, k, tokens, power, num_warps=4)
    return choice, token, slot, ends


def _empty(indices: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = slots_for(indices.shape[0] * indices.shape[1], experts, multiple)
    choice, token = indices.new_empty(slots), indices.new_empty(slots)
    return choice, token, indices.new_empty(indices.shape), indices.new_empty(experts, dtype=torch.int32)


_plan.register_fake(_empty)
