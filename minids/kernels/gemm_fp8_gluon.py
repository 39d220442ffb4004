"""`fp8_gemm` and the grouped FP8 products a second time, in Gluon: one warp copies, two or three warp groups multiply.

Plain Triton waits for each 128-channel product before it scales it, and leaves it to other programs on the multiprocessor
to keep the tensor core busy meanwhile. Gluon, the language below Triton, lets one program do it alone:

    producer    one warp: waits until a buffer is empty, starts the copies of the next blocks of A and B, and of their
                scales, into it
    consumer 0  rows 0 to 63 of the tile:  waits until a buffer is full, multiplies, scales, adds, passes the buffer on
    consumer 1  rows 64 to 127             (the tensor core works for one consumer while the other adds)
    consumer 2  rows 128 to 191, where tiles of 192 rows cut the matrix better

A program stays on its multiprocessor and takes one tile after the other; the producer runs ahead into the next tile while
the consumers store the last one.

Two consumers take TURN products at a time, two of them under way: while one is added, the tensor core has the next. Over
the end of a turn none is carried: registers of a running product must not move, and the compiler moves what a loop
carries. Nor may additions slip behind the start of the next product, which would then need registers of its own: as
ordinary arithmetic they do, so they are assembly, which the compiler leaves where it stands. Three consumers share the
registers of two: one product each, and the other consumers' products meanwhile.

Scales come from shared memory, in which the producer's copies have put them, when they are needed. Loaded by the consumers
they come late, and with a scale a row of B a thread would hold 64 of them. Threads read them, the tensor core reads the
rest. The engine that copies knows nothing of threads' reads, which may be under way still when a buffer is passed on. So
scales have twice as many places as operands have buffers: one is copied to again only STAGES products later, and two
later products do not start before it was used, since they need the registers of what waits for it. (A fence before each
buffer is passed on does as well, and costs 2%.)

The problem, the equation and the floors are those of `fp8_gemm` and `grouped_fp8`, whose references are the specification.
Hopper only (capability 9.x), not in Triton's CPU interpreter.
"""

from functools import cache
from typing import NamedTuple

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
from minids.kernels.quantize import as_column_major

GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _tile_of(index, tiles_ptr, m_tiles, n_tiles, M, N, K, E, GROUP: gl.constexpr, KIND: gl.constexpr,
             BM: gl.constexpr):
    """Tile number `index`: its expert, first rows in A, B and C, column of tiles, and the blocks of K to sum over."""
    expert, begin, end = 0, 0, gl.cdiv(K, 128)
    if KIND == "wgrad":  # every expert has all tiles of C, and blocks of K of its own; tiles_ptr: where they end
        expert = index // (m_tiles * n_tiles)
        index = index % (m_tiles * n_tiles)
        begin = gl.load(tiles_ptr + expert - 1, mask=expert > 0, other=0) // 128
        end = gl.load(tiles_ptr + expert) // 128
    in_group = GROUP * n_tiles
    first = index // in_group * GROUP
    height = gl.minimum(m_tiles - first, GROUP)
    m_tile, n_tile = first + index % in_group % height, index % in_group // height
    a_row = m_tile * BM
    b_row, c_row = n_tile * 128, expert * M + a_row
    if KIND == "grouped":
        expert = gl.load(tiles_ptr + m_tile * 3)
        a_row = gl.load(tiles_ptr + m_tile * 3 + 1)
        b_row, c_row = expert * N + n_tile * 128, gl.where(expert < E, a_row, M)
        end = gl.where(expert < E, end, 0)  # no such tile: nothing to sum, and rows from M on are not stored
    return expert, a_row, b_row, c_row, n_tile, begin, end


@gluon.jit
def _produce(copied, GROUP: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, B_ROWS: gl.constexpr,
             CONSUMERS: gl.constexpr):
    (a_desc, b_desc, as_desc, bs_desc, a_buffers, b_buffers, as_buffers, bs_buffers, full, empty, tiles_ptr, tiles,
     m_tiles, M, N, K, E) = copied  # fmt: skip
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, a_row, b_row, _, _, begin, end = _tile_of(
            index, tiles_ptr, m_tiles, gl.cdiv(N, 128), M, N, K, E, GROUP, KIND, 64 * CONSUMERS)  # fmt: skip
        for k in range(begin, end):
            stage, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), 64 * CONSUMERS * (128 + 4) + 128 * (128 + 4 * B_ROWS))  # bytes
            scales = stage + STAGES * phase
            for part in gl.static_range(CONSUMERS):
                row, place = a_row + part * 64, stage * CONSUMERS + part
                tma.async_copy_global_to_shared(a_desc, [row, k * 128], full.index(stage), a_buffers.index(place))
                place = scales * CONSUMERS + part
                tma.async_copy_global_to_shared(as_desc, [k, row], full.index(stage), as_buffers.index(place))
            tma.async_copy_global_to_shared(b_desc, [b_row, k * 128], full.index(stage), b_buffers.index(stage))
            if B_ROWS:
                tma.async_copy_global_to_shared(bs_desc, [k, b_row], full.index(stage), bs_buffers.index(scales))
            step += 1


@gluon.jit
def _start(a_buffers, b_buffers, full, step, place, PART: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Waits for the blocks of this step and starts their product; returns it unfinished. place: a tensor that is no longer
    needed, so that its registers can be the product's."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    b = b_buffers.index(stage).permute((1, 0))
    return warpgroup_mma(a_buffers.index(stage * CONSUMERS + PART), b, place, use_acc=False, is_async=True)


@gluon.jit
def _turn(total, a_buffers, b_buffers, as_buffers, bs_buffers, full, empty, b_scales, b_stride_k, step, zero,
          layout: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, B_ROWS: gl.constexpr, CONSUMERS: gl.constexpr,
          COUNT: gl.constexpr):
    """total + the scaled products of COUNT steps. b_scales: where the scales of B's blocks are, unless a row has one."""
    ahead = _start(a_buffers, b_buffers, full, step, zero, PART, STAGES, CONSUMERS)
    place = zero
    if not B_ROWS:
        b_ahead = gl.load(b_scales)
    for i in gl.static_range(COUNT):
        stage = (step + i) % STAGES
        scales = stage + STAGES * ((step + i) // STAGES & 1)
        if i + 1 < COUNT:
            following = _start(a_buffers, b_buffers, full, step + i + 1, place, PART, STAGES, CONSUMERS)
            if not B_ROWS:
                b_following = gl.load(b_scales + (i + 1) * b_stride_k)
            product = warpgroup_mma_wait(1, deps=[ahead])  # the following one may run on
        else:
            product = warpgroup_mma_wait(0, deps=[ahead])
        a_scale = as_buffers.index(scales * CONSUMERS + PART)._reinterpret(gl.float32, [64], FLAT)
        a_scale = a_scale.load(gl.SliceLayout(1, layout))
        if B_ROWS:
            b_scale = bs_buffers.index(scales)._reinterpret(gl.float32, [128], FLAT).load(gl.SliceLayout(0, layout))
            total = gl.inline_asm_elementwise(
                "{ .reg .f32 t; mul.rn.f32 t, $1, $2; fma.rn.f32 $0, t, $3, $4; }", "=f,f,f,f,f",
                [product, a_scale[:, None], b_scale[None, :], total], dtype=gl.float32, is_pure=False, pack=1)
        else:
            total = gl.inline_asm_elementwise(
                "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, (a_scale * b_ahead)[:, None], total],
                dtype=gl.float32, is_pure=False, pack=1)
        mbarrier.arrive(empty.index(stage), count=1)  # scales: see above
        if i + 1 < COUNT:
            ahead, place = following, product
            if not B_ROWS:
                b_ahead = b_following
    return total


@gluon.jit
def _consume(used, GROUP: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, B_ROWS: gl.constexpr,
             CONSUMERS: gl.constexpr, TURN: gl.constexpr, PART: gl.constexpr):
    (a_buffers, b_buffers, as_buffers, bs_buffers, c_buffers, c_desc, full, empty, b_scale_ptr, tiles_ptr,
     tiles, m_tiles, M, N, K, E, b_stride_e, b_stride_n, b_stride_k) = used  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    zero = gl.zeros([64, 128], gl.float32, layout)
    c_buffer = c_buffers.index(PART)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, a_row, _, c_row, n_tile, k, end = _tile_of(
            index, tiles_ptr, m_tiles, gl.cdiv(N, 128), M, N, K, E, GROUP, KIND, 64 * CONSUMERS)  # fmt: skip
        b_scales = b_scale_ptr + expert * b_stride_e + n_tile * b_stride_n
        total = gl.zeros([64, 128], gl.float32, layout)
        for _ in range((end - k) // TURN):
            total = _turn(total, a_buffers, b_buffers, as_buffers, bs_buffers, full, empty, b_scales + k * b_stride_k,
                          b_stride_k, step, zero, layout, PART, STAGES, B_ROWS, CONSUMERS, TURN)  # fmt: skip
            step += TURN
            k += TURN
        if TURN > 2:
            for _ in range((end - k) // 2):
                total = _turn(total, a_buffers, b_buffers, as_buffers, bs_buffers, full, empty, b_scales + k * b_stride_k,
                              b_stride_k, step, zero, layout, PART, STAGES, B_ROWS, CONSUMERS, 2)  # fmt: skip
                step += 2
                k += 2
        if TURN > 1:
            for _ in range(end - k):  # the last one of an odd number
                total = _turn(total, a_buffers, b_buffers, as_buffers, bs_buffers, full, empty, b_scales + k * b_stride_k,
                              b_stride_k, step, zero, layout, PART, STAGES, B_ROWS, CONSUMERS, 1)  # fmt: skip
                step += 1
                k += 1
        tma.store_wait(0)  # of this consumer's last tile
        c_buffer.store(total.to(c_desc.dtype))
        fence_async_shared()
        if KIND != "wgrad" or a_row + PART * 64 < M:  # the rows after an expert's last are the next expert's
            tma.async_copy_shared_to_global(c_desc, [c_row + PART * 64, n_tile * 128], c_buffer)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "m_tiles", "M", "E", "b_stride_e"])
def _gemm(a_desc, b_desc, as_desc, bs_desc, c_desc, b_scale_ptr, tiles_ptr, tiles, m_tiles, M, N, K, E,
          b_stride_e, b_stride_n, b_stride_k,
          GROUP: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, B_ROWS: gl.constexpr, CONSUMERS: gl.constexpr,
          TURN: gl.constexpr):
    a_buffers = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CONSUMERS, 64, 128], a_desc.layout)
    b_buffers = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 128, 128], b_desc.layout)
    as_buffers = gl.allocate_shared_memory(gl.float32, [2 * STAGES * CONSUMERS, 1, 64], as_desc.layout)
    bs_buffers = gl.allocate_shared_memory(gl.float32, [2 * STAGES if B_ROWS else 1, 1, 128], bs_desc.layout)
    c_buffers = gl.allocate_shared_memory(c_desc.dtype, [CONSUMERS, 64, 128], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    copied = (a_desc, b_desc, as_desc, bs_desc, a_buffers, b_buffers, as_buffers, bs_buffers, full, empty, tiles_ptr, tiles,
              m_tiles, M, N, K, E)  # fmt: skip
    used = (a_buffers, b_buffers, as_buffers, bs_buffers, c_buffers, c_desc, full, empty, b_scale_ptr, tiles_ptr,
            tiles, m_tiles, M, N, K, E, b_stride_e, b_stride_n, b_stride_k)  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (used, GROUP, STAGES, KIND, B_ROWS, CONSUMERS, TURN, 0)),
            (_consume, (used, GROUP, STAGES, KIND, B_ROWS, CONSUMERS, TURN, 1)),
            (_produce, (copied, GROUP, STAGES, KIND, B_ROWS, CONSUMERS)),
        ], [4, 1], [232, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (used, GROUP, STAGES, KIND, B_ROWS, CONSUMERS, TURN, 0)),
            (_consume, (used, GROUP, STAGES, KIND, B_ROWS, CONSUMERS, TURN, 1)),
            (_consume, (used, GROUP, STAGES, KIND, B_ROWS, CONSUMERS, TURN, 2)),
            (_produce, (copied, GROUP, STAGES, KIND, B_ROWS, CONSUMERS)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


class Cut(NamedTuple):
    """How a product is cut: consumers (64 rows of a tile each), products a turn, buffers, rows of tiles in a group."""

    consumers: int = 2
    turn: int = 4
    stages: int = 5
    group: int = 8


# From sweeps on an H200. FP32 results of 128 x 128 take twice the room in shared memory: one buffer less.
TALL, SHORT = Cut(consumers=3, turn=1, stages=4), Cut()
FLOAT32, WGRAD, GROUPED, GROUPED_WGRAD = Cut(stages=4), Cut(turn=2, stages=4), Cut(group=4), Cut(turn=2, stages=4)


def cut_for(m: int, n: int, k: int, processors: int) -> Cut:
    """Tiles of 192 rows instead of 128 for a BF16 result: for a short K, and where they fill their last wave better."""
    waves = {rows: cdiv(cdiv(m, rows) * cdiv(n, 128), processors) for rows in (128, 192)}
    return TALL if k <= 512 or waves[192] * 192 < 0.95 * waves[128] * 128 else SHORT


def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, cut: Cut | None = None
) -> Tensor:
    """`fp8_gemm`, of (M, K) and (N, K)."""
    (m, k), n, rows = a.shape, len(b), len(b_scale) == len(b)
    chosen = cut_for(m, n, k, multiprocessors(a.device)) if out_dtype == torch.bfloat16 else FLOAT32
    cut = cut or (WGRAD if rows else chosen)
    out = a.new_empty((m, n), dtype=out_dtype)
    _launch(a, a_scale, b, b_scale, out, a_scale, 1, cdiv(m, 64 * cut.consumers), "dense", cut)
    return out


def grouped(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, tiles: Tensor, out_dtype: torch.dtype, cut: Cut | None = None
) -> Tensor:
    """`grouped_fp8_gemm`, of (M, K) and (E, N, K), with the list of tiles that `grouped.find_tiles` makes."""
    out = a.new_empty((len(a), b.shape[1]), dtype=out_dtype)
    cut = cut or (GROUPED if out_dtype == torch.bfloat16 else GROUPED._replace(stages=4))
    _launch(a, a_scale, b, b_scale, out, tiles, len(b), len(tiles), "grouped", cut)
    return out


def grouped_wgrad(
    dy_t: Tensor, dy_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, cut: Cut = GROUPED_WGRAD
) -> Tensor:
    """`grouped_fp8_wgrad`, of (N, M) and (K, M); N a multiple of 64, so that no consumer's rows are two experts'."""
    out = x_t.new_empty((len(ends), len(dy_t), len(x_t)), dtype=torch.float32)
    m_tiles = cdiv(len(dy_t), 64 * cut.consumers)
    _launch(dy_t, dy_scale, x_t, x_scale, out, ends, len(ends), m_tiles, "wgrad", cut)
    return out


def _launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, tiles_of: Tensor, e: int, m_tiles: int, kind: str,
    cut: Cut,
) -> None:  # fmt: skip
    (m, k), n = a.shape, b.shape[-2]
    b_rows = b_scale.ndim == 2 and len(b_scale) == n
    tiles = m_tiles * cdiv(n, 128) * (e if kind == "wgrad" else 1)
    a_scale, out = as_column_major(a_scale), out.view(-1, n)
    as_desc = descriptor(a_scale.t(), 1, 64)
    if b_rows:
        b_scale = as_column_major(b_scale)
    bs_desc = descriptor(b_scale.t(), 1, 128) if b_rows else as_desc
    b_stride_e = b_scale.stride(0) if kind == "grouped" else 0
    _gemm[(min(tiles, multiprocessors(a.device)),)](
        descriptor(a, 64, 128), descriptor(b.view(-1, k), 128, 128), as_desc, bs_desc, descriptor(out, 64, 128), b_scale,
        tiles_of, tiles, m_tiles, m, n, k, e, b_stride_e, *b_scale.stride()[-2:],
        cut.group, cut.stages, kind, b_rows, cut.consumers, cut.turn, num_warps=4,
    )  # fmt: skip


@cache
def _layout(dtype: torch.dtype, rows: int, columns: int) -> gl.NVMMASharedLayout:
    if rows == 1:  # scales: as they are
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GL_DTYPES[dtype])


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For copies of (rows, columns) of a row-major matrix."""
    return TensorDescriptor.from_tensor(x, [rows, columns], _layout(x.dtype, rows, columns))
