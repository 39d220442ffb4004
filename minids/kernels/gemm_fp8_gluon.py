"""`fp8_gemm` and `grouped_fp8_gemm` a second time, in Gluon: one warp copies, two warp groups multiply, as in DeepGEMM.

Plain Triton waits for each 128-channel product before it scales it, and leaves it to other programs on the multiprocessor
to keep the tensor core busy meanwhile. Gluon, the language below Triton, lets one program do it alone:

    producer    one warp: waits until a buffer is empty, starts the copies of the next blocks of A and B into it
    consumer 0  rows 0 to 63 of the tile:   waits until a buffer is full, multiplies, passes the buffer on, scales, adds
    consumer 1  rows 64 to 127              (the tensor core works for one consumer while the other adds)

A program stays on its multiprocessor and takes one tile after the other; the producer runs ahead into the next tile while
the consumers store the last one. Each consumer has two products under way and adds the first while the second runs.

The problem, the equation and the floors are those of `fp8_gemm` and `grouped_fp8`, whose references are the specification.
One scale of B for 128 x 128; scales of A column-major; Hopper only (capability 9.x), not in Triton's CPU interpreter.
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

BM, BN, BK = 128, 128, 128
GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@gluon.jit
def _tile_of(index, tiles_ptr, m_tiles, n_tiles, M, N, K, E, GROUP: gl.constexpr, KIND: gl.constexpr):
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
    a_row = m_tile * 128
    b_row, c_row = n_tile * 128, expert * M + a_row
    if KIND == "grouped":
        expert = gl.load(tiles_ptr + m_tile * 3)
        a_row = gl.load(tiles_ptr + m_tile * 3 + 1)
        b_row, c_row = expert * N + n_tile * 128, gl.where(expert < E, a_row, M)
        end = gl.where(expert < E, end, 0)  # no such tile: nothing to sum, and rows from M on are not stored
    return expert, a_row, b_row, c_row, n_tile, begin, end


@gluon.jit
def _produce(a_desc, b_desc, a_buffers, b_buffers, full, empty, tiles_ptr, tiles, m_tiles, M, N, K, E,
             GROUP: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr):
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, a_row, b_row, _, _, begin, end = _tile_of(index, tiles_ptr, m_tiles, gl.cdiv(N, 128), M, N, K, E, GROUP, KIND)
        for k in range(begin, end):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [a_row, k * 128], full.index(stage), a_buffers.index(stage))
            tma.async_copy_global_to_shared(b_desc, [b_row, k * 128], full.index(stage), b_buffers.index(stage))
            step += 1


@gluon.jit
def _start(a_buffers, b_buffers, full, step, zero, PART: gl.constexpr, STAGES: gl.constexpr):
    """Waits for the blocks of this step and starts their product; returns it unfinished."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    a = a_buffers.index(stage).slice(PART * 64, 64)
    return warpgroup_mma(a, b_buffers.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _finish(product, others, empty, step, STAGES: gl.constexpr):
    """Waits for a product while `others` run on, and passes its buffers back."""
    done = warpgroup_mma_wait(others, deps=[product])
    mbarrier.arrive(empty.index(step % STAGES), count=1)
    return done


@gluon.jit
def _scales(a_scales, b_scales, a_stride_k, b_stride_k, k, end, a_mask, b_mask):
    """The scales of block k, asked for a step before they are needed; zeros beyond the end."""
    a_scale = gl.load(a_scales + k * a_stride_k, mask=a_mask & (k < end), other=0.0)
    return a_scale, gl.load(b_scales + k * b_stride_k, mask=b_mask & (k < end), other=0.0)


@gluon.jit
def _consume(a_buffers, b_buffers, c_buffers, c_desc, full, empty, a_scale_ptr, b_scale_ptr, tiles_ptr, tiles, m_tiles,
             M, N, K, E, a_stride_m, a_stride_k, b_stride_e, b_stride_n, b_stride_k,
             GROUP: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, B_ROWS: gl.constexpr, PART: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    zero = gl.zeros([64, 128], gl.float32, layout)
    c_buffer = c_buffers.index(PART)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, a_row, b_row, c_row, n_tile, begin, end = _tile_of(
            index, tiles_ptr, m_tiles, gl.cdiv(N, 128), M, N, K, E, GROUP, KIND)  # fmt: skip
        m = a_row + PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        a_scales = a_scale_ptr + m * a_stride_m
        total = gl.zeros([64, 128], gl.float32, layout)
        if B_ROWS:
            n = b_row + gl.arange(0, 128, gl.SliceLayout(0, layout))
            b_scales = b_scale_ptr + n * b_stride_n
            a_scale, b_scale = _scales(a_scales, b_scales, a_stride_k, b_stride_k, begin, end, m < M, n < N)
            for k in range(begin, end):
                product = _start(a_buffers, b_buffers, full, step, zero, PART, STAGES)
                a_next, b_next = _scales(a_scales, b_scales, a_stride_k, b_stride_k, k + 1, end, m < M, n < N)
                total += _finish(product, 0, empty, step, STAGES) * a_scale[:, None] * b_scale[None, :]
                a_scale, b_scale = a_next, b_next
                step += 1
        else:
            b_scales = b_scale_ptr + expert * b_stride_e + n_tile * b_stride_n
            even_scale, even_b = _scales(a_scales, b_scales, a_stride_k, b_stride_k, begin, end, m < M, True)
            odd_scale, odd_b = _scales(a_scales, b_scales, a_stride_k, b_stride_k, begin + 1, end, m < M, True)
            pairs = (end - begin) // 2 * 2
            for k in range(begin, begin + pairs, 2):
                even = _start(a_buffers, b_buffers, full, step, zero, PART, STAGES)
                odd = _start(a_buffers, b_buffers, full, step + 1, zero, PART, STAGES)
                even_next, even_b_next = _scales(a_scales, b_scales, a_stride_k, b_stride_k, k + 2, end, m < M, True)
                odd_next, odd_b_next = _scales(a_scales, b_scales, a_stride_k, b_stride_k, k + 3, end, m < M, True)
                total += _finish(even, 1, empty, step, STAGES) * (even_scale * even_b)[:, None]
                total += _finish(odd, 0, empty, step + 1, STAGES) * (odd_scale * odd_b)[:, None]
                even_scale, even_b, odd_scale, odd_b = even_next, even_b_next, odd_next, odd_b_next
                step += 2
            for _ in range(begin + pairs, end):  # the last one of an odd number
                product = _start(a_buffers, b_buffers, full, step, zero, PART, STAGES)
                total += _finish(product, 0, empty, step, STAGES) * (even_scale * even_b)[:, None]
                step += 1
        tma.store_wait(0)  # of this consumer's last tile
        c_buffer.store(total.to(c_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(c_desc, [c_row + PART * 64, n_tile * 128], c_buffer)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "m_tiles", "M", "E", "b_stride_e"])
def _gemm(a_desc, b_desc, c_desc, a_scale_ptr, b_scale_ptr, tiles_ptr, tiles, m_tiles, M, N, K, E,
          a_stride_m, a_stride_k, b_stride_e, b_stride_n, b_stride_k,
          GROUP: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, B_ROWS: gl.constexpr):
    a_buffers = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 128, 128], a_desc.layout)
    b_buffers = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 128, 128], b_desc.layout)
    c_buffers = gl.allocate_shared_memory(c_desc.dtype, [2, 64, 128], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both consumers
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (a_buffers, b_buffers, c_buffers, c_desc, full, empty, a_scale_ptr, b_scale_ptr, tiles_ptr, tiles,
                    m_tiles, M, N, K, E, a_stride_m, a_stride_k, b_stride_e, b_stride_n, b_stride_k, GROUP, STAGES, KIND,
                    B_ROWS, 0)),
        (_consume, (a_buffers, b_buffers, c_buffers, c_desc, full, empty, a_scale_ptr, b_scale_ptr, tiles_ptr, tiles,
                    m_tiles, M, N, K, E, a_stride_m, a_stride_k, b_stride_e, b_stride_n, b_stride_k, GROUP, STAGES, KIND,
                    B_ROWS, 1)),
        (_produce, (a_desc, b_desc, a_buffers, b_buffers, full, empty, tiles_ptr, tiles, m_tiles, M, N, K, E, GROUP,
                    STAGES, KIND)),
    ], [4, 1], [232, 24])  # fmt: skip


def gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, group: int = 8) -> Tensor:
    """`fp8_gemm`, of (M, K) and (N, K)."""
    out = a.new_empty((len(a), len(b)), dtype=out_dtype)
    _launch(a, a_scale, b, b_scale, out, a_scale, 1, cdiv(len(a), BM), group, "dense", len(b_scale) == len(b))
    return out


def grouped(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, tiles: Tensor, out_dtype: torch.dtype, group: int = 4
) -> Tensor:
    """`grouped_fp8_gemm`, of (M, K) and (E, N, K), with the list of tiles that `grouped.find_tiles` makes."""
    out = a.new_empty((len(a), b.shape[1]), dtype=out_dtype)
    _launch(a, a_scale, b, b_scale, out, tiles, len(b), len(tiles), group, "grouped", False)
    return out


def grouped_wgrad(
    dy_t: Tensor, dy_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, group: int = 8
) -> Tensor:
    """`grouped_fp8_wgrad`, of (N, M) and (K, M); N a multiple of 128, so that no tile reaches into the next expert."""
    out = x_t.new_empty((len(ends), len(dy_t), len(x_t)), dtype=torch.float32)
    _launch(dy_t, dy_scale, x_t, x_scale, out, ends, len(ends), len(dy_t) // BM, group, "wgrad", True)
    return out


def _launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, tiles_of: Tensor, e: int, m_tiles: int,
    group: int, kind: str, b_rows: bool,
) -> None:  # fmt: skip
    (m, k), n = a.shape, b.shape[-2]
    fp8 = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.float8e4nv)
    c_layout = gl.NVMMASharedLayout.get_default_for([BM // 2, BN], GL_DTYPES[out.dtype])
    tiles = m_tiles * cdiv(n, BN) * (e if kind == "wgrad" else 1)
    out = out.view(-1, n)
    b_stride_e = b_scale.stride(0) if kind == "grouped" else 0
    _gemm[(min(tiles, multiprocessors(a.device)),)](
        TensorDescriptor.from_tensor(a, [BM, BK], fp8), TensorDescriptor.from_tensor(b.view(-1, k), [BN, BK], fp8),
        TensorDescriptor.from_tensor(out, [BM // 2, BN], c_layout), a_scale, b_scale, tiles_of, tiles, m_tiles, m, n, k, e,
        *a_scale.stride(), b_stride_e, *b_scale.stride()[-2:], group, 6 if out.dtype == torch.bfloat16 else 5, kind, b_rows,
        num_warps=4,
    )  # fmt: skip
