"""`grouped_gemm`, `grouped_wgrad` and the experts' first half a second time, in Gluon: roles share one multiprocessor.

In plain Triton the eight warps of a program do everything in turn: while they store a tile, or wait for their first
blocks, the tensor core rests. Here a program stays on its multiprocessor, takes one tile of 128 x 256 after the other, and
divides the work:

    producer    waits until a buffer is empty, starts the copies of the next 64 columns of both factors into it
    consumer 0  rows 0 to 63 of the tile:   waits until a buffer is full, starts its product, passes the buffer before on
    consumer 1  rows 64 to 127

Four buffers of 48 KB run round, into the next tile too. Nothing keeps the consumers together but the buffers: the one
that is ahead stores its rows while the other, up to four blocks behind, has the tensor core, and the other way round.
Rows go out through 16 KB of shared memory a consumer and the copy engine; those of a tile that ends inside 64 rows by
masked stores, since what follows is the next expert's. A consumer without any row of the expert does not multiply.

Tiles are taken expert by expert, all rows of one before the next columns: an expert's matrix comes from memory once.

An expert's last tile may have 64 rows or less and take half the time. If every program took each 132nd tile, those with few
of the short ones would end late. So tiles of the forward product are dealt out: a program's producer draws the number of
its next tile from a counter that all programs share, one tile ahead, and hands it to the consumers through shared memory.
Which program makes a tile changes from run to run. Its bits do not.

`swiglu_up` does more to the first product: a tile is 128 gate columns and the 128 up columns that belong to them, two boxes
of W, so that h = silu(gate) up g is ready before anything is stored; z is stored beside it if it is to be kept. Floors of
`swiglu_up`: 4 M F K operations; 2 (M K + 2 E F K + M F) bytes, and 4 M F more with z.

In a weight gradient the summed index is the expert's rows. Of the last 64 some may be the next expert's: both consumers
write zeros over them, in both factors, before they multiply (0 times infinity is no zero).

Problem, equation and floors of the others are those of `grouped`, whose references are the specification. Hopper only
(capability 9.x), not in Triton's CPU interpreter; tests run it on threads, too (`tests/kernels/gluon_threads.py`).

Shapes: M rows (token slots), E experts, N output channels, K summed channels, F expert width.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minids.kernels.backend import cdiv, multiprocessors
from minids.kernels.grouped_gluon_tiles import clear, copy, halves, store, tile_of

BM, BN, BK, STAGES = 128, 256, 64, 4
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # a single number, for the four warps of a consumer
ONE_WARP = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # and for the producer
GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@gluon.jit
def _deal(dealing, turn):
    """The number of the program's next tile, which the consumers are told, too. turn: how many it had before."""
    counter_ptr, numbers, given, taken = dealing
    index = gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)
    mbarrier.wait(taken.index(turn % 2), (turn // 2 & 1) ^ 1)
    numbers.index(turn % 2).store(gl.full([1], index, gl.int32, ONE_WARP))
    gl.thread_barrier()
    mbarrier.arrive(given.index(turn % 2), count=1)
    return index


@gluon.jit
def _dealt(dealing, turn):
    """What `_deal` told."""
    _, numbers, given, taken = dealing
    mbarrier.wait(given.index(turn % 2), turn // 2 & 1)
    index = gl.max(numbers.index(turn % 2).load(ONE), 0)
    gl.thread_barrier()
    mbarrier.arrive(taken.index(turn % 2), count=1)
    return index


@gluon.jit
def _produce(a_desc, b_desc, buffers, barriers, dealing, lists, sizes,
             STAGES: gl.constexpr, KIND: gl.constexpr, SWIGLU: gl.constexpr):
    a_buffers, b_buffers, _ = buffers
    full, empty, _ = barriers
    step, turn = 0, 0
    index = gl.program_id(0)
    while index < sizes[0]:
        following = index + gl.num_programs(0)
        if KIND == "k_major":
            following = _deal(dealing, turn)
        tile = tile_of(index, lists, sizes, KIND)
        index = following
        turn += 1
        for k in range(tile[5] + (tile[6] > 0)):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            copy(a_desc, b_desc, a_buffers.index(stage), b_buffers.index(stage), full.index(stage), tile, k, sizes,
                 KIND, SWIGLU)
            step += 1


@gluon.jit
def _start(buffers, stage, total, KIND: gl.constexpr, PART: gl.constexpr):
    """Starts the product of a buffer's blocks; returns the sum unfinished."""
    a_buffers, b_buffers, _ = buffers
    a, b = a_buffers.index(stage), b_buffers.index(stage)
    a = a.slice(PART * 64, 64, dim=1).permute((1, 0)) if KIND == "wgrad" else a.slice(PART * 64, 64)
    return warpgroup_mma(a, b.permute((1, 0)) if KIND == "k_major" else b, total, is_async=True)


@gluon.jit
def _last(buffers, barriers, total, step, rest, clearings, STAGES: gl.constexpr, PART: gl.constexpr):
    """The last block of a weight gradient, where `rest` rows are the expert's and the others are cleared first."""
    a_buffers, b_buffers, _ = buffers
    full, empty, cleared = barriers
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    clear(a_buffers.index(stage).slice(PART * 64, 64, dim=1), rest)
    clear(b_buffers.index(stage).slice(PART * 128, 128, dim=1), rest)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(cleared, count=1)
    mbarrier.wait(cleared, clearings & 1)
    total = warpgroup_mma_wait(0, deps=[_start(buffers, stage, total, "wgrad", PART)])
    mbarrier.arrive(empty.index(stage), count=1)
    return total


@gluon.jit
def _swiglu(gate, up, gates_ptr, row, end):
    """h of 64 rows. Gate and up are rounded to BF16 first: what z holds and backward starts from."""
    m = row + gl.arange(0, 64, gl.SliceLayout(1, gate.type.layout))
    weight = gl.load(gates_ptr + m, mask=m < end, other=0.0)
    gate, up = gate.to(gl.bfloat16).to(gl.float32), up.to(gl.bfloat16).to(gl.float32)
    return gate / (1.0 + gl.exp(-gate)) * up * weight[:, None]


@gluon.jit
def _finish(total, buffer, c_desc, z_desc, out_ptr, z_ptr, gates_ptr, tile, row, N, K,
            KIND: gl.constexpr, SWIGLU: gl.constexpr, KEEP: gl.constexpr):
    """Stores 64 rows of a tile, or their h."""
    expert, _, n_tile, end, _, _, _ = tile
    if SWIGLU:
        gate, up = halves(total)
        F, column = N // 2, n_tile * 128
        if KEEP:
            store(gate, buffer, z_desc, z_ptr, N, 0, row, column, end, N)
            store(up, buffer, z_desc, z_ptr, N, 0, row, F + column, end, N)
        store(_swiglu(gate, up, gates_ptr, row, end), buffer, c_desc, out_ptr, F, 0, row, column, end, F)
    elif KIND == "wgrad":
        store(total, buffer, c_desc, out_ptr, K, expert * N, row, n_tile * 256, end, K)
    else:
        store(total, buffer, c_desc, out_ptr, N, 0, row, n_tile * 256, end, N)


@gluon.jit
def _consume(c_desc, z_desc, buffers, barriers, dealing, out_ptr, z_ptr, gates_ptr, lists, sizes, STAGES: gl.constexpr,
             KIND: gl.constexpr, SWIGLU: gl.constexpr, KEEP: gl.constexpr, PART: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    _, _, c_buffers = buffers
    full, empty, _ = barriers
    tiles, _, N, K, _ = sizes
    step, clearings, turn = 0, 0, 0
    index = gl.program_id(0)
    tile = tile_of(index, lists, sizes, KIND)
    while index < tiles:
        index += gl.num_programs(0)
        if KIND == "k_major":
            index = _dealt(dealing, turn)
        turn += 1
        following = tile_of(gl.minimum(index, tiles - 1), lists, sizes, KIND)  # asked for early
        _, row, _, end, _, blocks, rest = tile
        row += PART * 64
        idle = 0
        if KIND != "wgrad":  # no row of the expert's: only pass the buffers on
            idle = gl.where(row < end, 0, blocks)
        total = gl.zeros([64, 256], gl.float32, layout)
        for _ in range(idle):
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
        for k in range(blocks - idle):
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            total = _start(buffers, step % STAGES, total, KIND, PART)
            total = warpgroup_mma_wait(1, deps=[total])  # the product before is done
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=blocks > idle)
        if KIND == "wgrad":
            for _ in range((rest > 0).to(gl.int32)):
                total = _last(buffers, barriers, total, step, rest, clearings, STAGES, PART)
                step += 1
                clearings += 1
        _finish(total, c_buffers.index(PART), c_desc, z_desc, out_ptr, z_ptr, gates_ptr, tile, row, N, K,
                KIND, SWIGLU, KEEP)
        tile = following
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "n_tiles", "E"])
def _gemm(a_desc, b_desc, c_desc, z_desc, out_ptr, z_ptr, gates_ptr, tiles_ptr, ends_ptr, counter_ptr, tiles, n_tiles, N, K,
          E, STAGES: gl.constexpr, KIND: gl.constexpr, SWIGLU: gl.constexpr, KEEP: gl.constexpr):
    a_buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 128] if KIND == "wgrad" else [STAGES, 128, 64],
                                          a_desc.layout)
    b_buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 256, 64] if KIND == "k_major" else [STAGES, 64, 256],
                                          b_desc.layout)
    c_buffers = gl.allocate_shared_memory(c_desc.dtype, [2, 64, c_desc.block_shape[1]], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cleared = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both consumers
    mbarrier.init(cleared, count=2)
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(given.index(place), count=1)
        mbarrier.init(taken.index(place), count=2)
    dealing = (counter_ptr, numbers, given, taken)
    if KIND != "wgrad":  # as many as the list's last entry says, not as many as there could be
        tiles = (gl.load(tiles_ptr + (tiles // n_tiles - 1) * 3) - E) * n_tiles
    fence_async_shared()
    buffers, barriers = (a_buffers, b_buffers, c_buffers), (full, empty, cleared)
    lists, sizes = (tiles_ptr, ends_ptr), (tiles, n_tiles, N, K, E)
    gl.warp_specialize([
        (_consume, (c_desc, z_desc, buffers, barriers, dealing, out_ptr, z_ptr, gates_ptr, lists, sizes, STAGES, KIND,
                    SWIGLU, KEEP, 0)),
        (_consume, (c_desc, z_desc, buffers, barriers, dealing, out_ptr, z_ptr, gates_ptr, lists, sizes, STAGES, KIND,
                    SWIGLU, KEEP, 1)),
        (_produce, (a_desc, b_desc, buffers, barriers, dealing, lists, sizes, STAGES, KIND, SWIGLU)),
    ], [4, 1], [232, 24])  # fmt: skip


def gemm(x: Tensor, w: Tensor, ends: Tensor, tiles: Tensor) -> Tensor:
    """`grouped_gemm`, with the list that `grouped.find_tiles` makes of tiles of 128 rows."""
    (m, _), (e, n, k) = x.shape, w.shape
    out = x.new_empty((m, n))
    k_major = w.stride(2) == 1
    b = _desc(w.flatten(0, 1), [BN, BK]) if k_major else _desc(w.transpose(1, 2).flatten(0, 1), [BK, BN])
    _launch("k_major" if k_major else "n_major", _desc(x, [BM, BK]), b, out, len(tiles), (tiles, ends), (n, k, e))
    return out


def wgrad(dy: Tensor, x: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`grouped_wgrad`."""
    n, k, e = dy.shape[1], x.shape[1], len(ends)
    out = x.new_empty((e, n, k), dtype=out_dtype)
    a, b = _desc(dy, [BK, BM]), _desc(x, [BK, BN])
    _launch("wgrad", a, b, out.view(-1, k), e * cdiv(n, BM), (ends, ends), (n, k, e))
    return out


def swiglu_up(
    x: Tensor, w: Tensor, ends: Tensor, tiles: Tensor, gates: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """h (M, F) = silu(z_gate) z_up gates, where z (M, 2F) are the experts' first products; and z if ``keep``, else an empty
    tensor.

    Args:
        x: (M, K) bfloat16, of every slot. w: (E, 2F, K) bfloat16, contiguous, F a multiple of 128. gates: (M,) float32.
        ends, tiles: as in `gemm`.
    """
    (m, _), (e, n, k) = x.shape, w.shape
    h, z = x.new_empty((m, n // 2)), x.new_empty((m if keep else 0, n))
    a, b = _desc(x, [BM, BK]), _desc(w.flatten(0, 1), [BN // 2, BK])
    _launch("k_major", a, b, h, len(tiles), (tiles, ends), (n, k, e), z if keep else h, gates)
    return h, z


def _desc(x: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, box, gl.NVMMASharedLayout.get_default_for(box, GL_DTYPES[x.dtype]))


def _launch(
    kind: str, a: TensorDescriptor, b: TensorDescriptor, out: Tensor, m_tiles: int, lists: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int], z: Tensor | None = None, gates: Tensor | None = None,
) -> None:  # fmt: skip
    """lists: of tiles and of the experts' ends. gates make it `swiglu_up`; z: where to keep z, or h if it is not kept."""
    n, k, _ = sizes
    n_tiles = cdiv(k if kind == "wgrad" else n, BN)
    swiglu, part = gates is not None, [64, 256 // out.element_size()]
    z, gates = (z, gates) if swiglu else (out, lists[1])
    counter = torch.zeros(1, dtype=torch.int32, device=out.device) if kind == "k_major" else lists[1]
    _gemm[(min(m_tiles * n_tiles, multiprocessors(out.device)),)](
        a, b, _desc(out, part), _desc(z, part), out, z, gates, *lists, counter, m_tiles * n_tiles, n_tiles, *sizes, STAGES,
        kind, swiglu, z is not out, num_warps=4,
    )  # fmt: skip
