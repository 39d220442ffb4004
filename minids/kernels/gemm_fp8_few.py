"""`fp8_gemm` for few rows, as in decoding, in Gluon: one warp copies, one warp group multiplies, all of K in one program.

With 64 or 128 tokens the time is that of reading B. Few tiles leave multiprocessors idle. Parts of K would fill them, but
then a second kernel must sum the parts. Tiles of 64 x 64 do without: 128 tokens and 4096 columns are 128 tiles, one a
multiprocessor, and one program is fast enough if much is under way: twelve buffers of 64 x 128 of A and of B, 192 KB. Where
there are more tiles than multiprocessors, two programs share one, with six buffers each.

The way through is that of `gemm_fp8_gluon` with one consumer: TURN products a turn, two under way, and scales of A in
shared memory in twice as many places as there are buffers, so that none is overwritten while it is being read. (A product
that is started in the registers of one before it waits for that one's addition, and so for the scales of all before.)

The problem and the equation are those of `fp8_gemm`, whose reference is the specification. Floor: the bytes of B.
Simplifications: a scale a block of 128 x 128 of B, BF16 results. Hopper only, not in Triton's CPU interpreter.
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

from minids.kernels.backend import cdiv, multiprocessors
from minids.kernels.gemm_fp8_gluon import FLAT, descriptor
from minids.kernels.quantize import as_column_major

TURN = gl.constexpr(4)


@gluon.jit
def _corner(index, m_tiles):
    """The first row and column of tile number `index`: tiles that read the same rows of B are neighbours."""
    return index % m_tiles * 64, index // m_tiles * 64


@gluon.jit
def _produce(copied, STAGES: gl.constexpr):
    a_desc, b_desc, as_desc, a_buffers, b_buffers, as_buffers, full, empty, tiles, m_tiles, K = copied
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        a_row, b_row = _corner(index, m_tiles)
        for k in range(gl.cdiv(K, 128)):
            stage, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), 64 * (128 + 4) + 64 * 128)  # bytes
            tma.async_copy_global_to_shared(b_desc, [b_row, k * 128], full.index(stage), b_buffers.index(stage))
            tma.async_copy_global_to_shared(a_desc, [a_row, k * 128], full.index(stage), a_buffers.index(stage))
            scales = as_buffers.index(stage + STAGES * phase)
            tma.async_copy_global_to_shared(as_desc, [k, a_row], full.index(stage), scales)
            step += 1


@gluon.jit
def _start(a_buffers, b_buffers, full, step, place, STAGES: gl.constexpr):
    """Waits for the blocks of this step and starts their product, in the registers of `place`; returns it unfinished."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    b = b_buffers.index(stage).permute((1, 0))
    return warpgroup_mma(a_buffers.index(stage), b, place, use_acc=False, is_async=True)


@gluon.jit
def _turn(total, a_buffers, b_buffers, as_buffers, full, empty, b_scales, b_stride_k, step, zero, layout: gl.constexpr,
          STAGES: gl.constexpr, COUNT: gl.constexpr):
    """total + the scaled products of COUNT steps. b_scales: where the scales of B's blocks are."""
    ahead, place = _start(a_buffers, b_buffers, full, step, zero, STAGES), zero
    b_ahead = gl.load(b_scales)
    for i in gl.static_range(COUNT):
        stage, phase = (step + i) % STAGES, (step + i) // STAGES & 1
        if i + 1 < COUNT:
            following = _start(a_buffers, b_buffers, full, step + i + 1, place, STAGES)
            b_following = gl.load(b_scales + (i + 1) * b_stride_k)
        a_scale = as_buffers.index(stage + STAGES * phase)._reinterpret(gl.float32, [64], FLAT)
        a_scale = a_scale.load(gl.SliceLayout(1, layout))
        if i + 1 < COUNT:
            product = warpgroup_mma_wait(1, deps=[ahead])  # the following one may run on
        else:
            product = warpgroup_mma_wait(0, deps=[ahead])
        mbarrier.arrive(empty.index(stage), count=1)
        total = gl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, (a_scale * b_ahead)[:, None], total],
            dtype=gl.float32, is_pure=False, pack=1)  # fmt: skip
        if i + 1 < COUNT:
            ahead, place, b_ahead = following, product, b_following
    return total


@gluon.jit
def _consume(used, STAGES: gl.constexpr):
    (a_buffers, b_buffers, as_buffers, c_buffer, c_desc, full, empty, b_scale_ptr, tiles, m_tiles, K,
     b_stride_n, b_stride_k) = used  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    zero = gl.zeros([64, 64], gl.float32, layout)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        c_row, b_row = _corner(index, m_tiles)
        b_scales = b_scale_ptr + b_row // 128 * b_stride_n
        total = gl.zeros([64, 64], gl.float32, layout)
        k, end = 0, gl.cdiv(K, 128)
        for _ in range(end // TURN):
            total = _turn(total, a_buffers, b_buffers, as_buffers, full, empty, b_scales + k * b_stride_k, b_stride_k, step,
                          zero, layout, STAGES, TURN)  # fmt: skip
            step += TURN
            k += TURN
        for _ in range(end % TURN):
            total = _turn(total, a_buffers, b_buffers, as_buffers, full, empty, b_scales + k * b_stride_k, b_stride_k, step,
                          zero, layout, STAGES, 1)  # fmt: skip
            step += 1
            k += 1
        tma.store_wait(0)  # of the last tile
        c_buffer.store(total.to(c_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(c_desc, [c_row, b_row], c_buffer)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "m_tiles"])
def _gemm(a_desc, b_desc, as_desc, c_desc, b_scale_ptr, tiles, m_tiles, K, b_stride_n, b_stride_k, STAGES: gl.constexpr):
    a_buffers = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 64, 128], a_desc.layout)
    b_buffers = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 64, 128], b_desc.layout)
    as_buffers = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 64], as_desc.layout)
    c_buffer = gl.allocate_shared_memory(c_desc.dtype, [64, 64], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    copied = (a_desc, b_desc, as_desc, a_buffers, b_buffers, as_buffers, full, empty, tiles, m_tiles, K)
    used = (a_buffers, b_buffers, as_buffers, c_buffer, c_desc, full, empty, b_scale_ptr, tiles, m_tiles, K,
            b_stride_n, b_stride_k)  # fmt: skip
    gl.warp_specialize([(_consume, (used, STAGES)), (_produce, (copied, STAGES))], [1], [24])


def gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """`fp8_gemm`, of (M, K) and (N, K) with a scale a block of B, in BF16."""
    (m, k), n = a.shape, len(b)
    m_tiles, processors = cdiv(m, 64), multiprocessors(a.device)
    tiles = m_tiles * cdiv(n, 64)
    alone = tiles <= processors
    out = a.new_empty((m, n), dtype=torch.bfloat16)
    _gemm[(min(tiles, 2 * processors),)](
        descriptor(a, 64, 128), descriptor(b, 64, 128), descriptor(as_column_major(a_scale).t(), 1, 64),
        descriptor(out, 64, 64), b_scale, tiles, m_tiles, k, *b_scale.stride(), 12 if alone else 6,
        num_warps=4, **({} if alone else {"maxnreg": 128}),
    )  # fmt: skip
    return out
