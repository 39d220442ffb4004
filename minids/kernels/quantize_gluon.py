"""`quantize_tile_both` and `quantize_tile_t` a second time, in Gluon and with few instructions: 13 to 16 a number, not 36.

The plain kernel `quantize._square` is bound by instructions, not by memory. What is saved here, for BF16 and whole tiles:

    two numbers a word  x is loaded as words of two BF16 numbers; magnitudes are compared two at a time (max.u16x2: as
                        integers they have the order of the numbers, and NaN > infinity > all)
    two operations      instead of a division: 1 / s = high + low, high a little too small so that low > 0 keeps the sign
                        of -0, and q = round_to_E4M3(fma(x, high, x * low)). Not in general the bits of a division; but x
                        and amax have 8 significant bits, so that x / s is a boundary between two codes or far from it. A
                        test goes through all mantissas and exponents.
    once a tile         a column's scale and reciprocal are computed by one thread and handed to the others through shared
                        memory, not by each of the 32 threads that need them
    words turned        a thread has four tokens of a channel, packs their bytes to a word, and the words change places in
                        shared memory, whose rows are permuted so that neither side meets a bank twice

The problem, the equation, the layouts and the floors are `quantize`'s, whose reference is the specification.
Hopper only, BF16, channels a multiple of 128; not in Triton's CPU interpreter. Shapes: M tokens, K channels.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from minids.kernels.backend import TILE, cdiv
from minids.kernels.e4m3 import RECIPROCAL_SHRUNK, SMALLEST_AMAX

SMALLEST, SHRUNK = gl.constexpr(SMALLEST_AMAX), gl.constexpr(RECIPROCAL_SHRUNK)
MAGNITUDES = gl.constexpr(0x7FFF7FFF)  # two BF16 numbers without their signs


@gluon.jit
def _larger(a, b):
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _scale(bits, UE8M0: gl.constexpr):
    """`e4m3.e4m3_scale`, and the two parts of its reciprocal."""
    amax = gl.maximum(bits.to(gl.float32, bitcast=True), SMALLEST)
    scale = amax * (1 / 448)
    scale = gl.fma(gl.fma(scale, -448.0, amax), 1 / 448, scale)
    if UE8M0:
        scale = ((scale.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(gl.float32, bitcast=True)
    scale = gl.where(bits == 0, 1.0, scale)
    scale = gl.where(bits >= 0x7F800000, float("nan"), scale)
    high = 1.0 / scale * SHRUNK
    return scale, high, gl.fma(-scale, high, 1.0) * high


@gluon.jit
def _load(x_ptr, row, pair, M, x_stride):
    return gl.load(x_ptr + row.to(gl.int64)[:, None] * x_stride + pair[None, :], mask=(row < M)[:, None], other=0)


@gluon.jit
def _along_rows(x, row, q_ptr, s_ptr, pair, M, pairs, s_stride_m, UE8M0: gl.constexpr):
    """The pass along rows: x holds a tile of 128 channels in words of two, of 32 tokens."""
    amax = gl.reduce(x & MAGNITUDES, 1, _larger)
    scale, high, low = _scale(gl.maximum(amax << 16, amax & 0x7FFF0000), UE8M0)
    gl.store(s_ptr + row * s_stride_m, scale, mask=row < M)
    high, x = gl.broadcast(high[:, None], x)
    low, x = gl.broadcast(low[:, None], x)
    q = gl.inline_asm_elementwise(
        """{ .reg .f32 a, b, c, d, z; .reg .b32 t; .reg .b16 p, r;
        shl.b32 t, $1, 16;         mov.b32 a, t; mul.rn.f32 z, a, $5; fma.rn.f32 a, a, $3, z;
        and.b32 t, $1, 0xffff0000; mov.b32 b, t; mul.rn.f32 z, b, $5; fma.rn.f32 b, b, $3, z;
        shl.b32 t, $2, 16;         mov.b32 c, t; mul.rn.f32 z, c, $6; fma.rn.f32 c, c, $4, z;
        and.b32 t, $2, 0xffff0000; mov.b32 d, t; mul.rn.f32 z, d, $6; fma.rn.f32 d, d, $4, z;
        cvt.rn.satfinite.e4m3x2.f32 p, b, a; cvt.rn.satfinite.e4m3x2.f32 r, d, c; mov.b32 $0, {p, r}; }""",
        "=r,r,r,f,f,f,f", [x, high, low], dtype=gl.int16, is_pure=True, pack=2,
    )  # fmt: skip
    gl.store(q_ptr + row.to(gl.int64)[:, None] * pairs + pair[None, :], q, mask=(row < M)[:, None])


@gluon.jit
def _four_tokens(x0, x1, x2, x3, parts, column: gl.constexpr):
    """E4M3 bytes of four tokens in a word: for the even channels, and for the odd ones. parts: their reciprocals."""
    high_0, _ = gl.broadcast(parts.index(0).load(column)[None, :], x0)
    low_0, _ = gl.broadcast(parts.index(1).load(column)[None, :], x0)
    high_1, _ = gl.broadcast(parts.index(2).load(column)[None, :], x0)
    low_1, _ = gl.broadcast(parts.index(3).load(column)[None, :], x0)
    return gl.inline_asm_elementwise(
        """{ .reg .f32 a, b, c, d, z; .reg .b32 t; .reg .b16 p, r;
        shl.b32 t, $2, 16; mov.b32 a, t; mul.rn.f32 z, a, $7; fma.rn.f32 a, a, $6, z;
        shl.b32 t, $3, 16; mov.b32 b, t; mul.rn.f32 z, b, $7; fma.rn.f32 b, b, $6, z;
        shl.b32 t, $4, 16; mov.b32 c, t; mul.rn.f32 z, c, $7; fma.rn.f32 c, c, $6, z;
        shl.b32 t, $5, 16; mov.b32 d, t; mul.rn.f32 z, d, $7; fma.rn.f32 d, d, $6, z;
        cvt.rn.satfinite.e4m3x2.f32 p, b, a; cvt.rn.satfinite.e4m3x2.f32 r, d, c; mov.b32 $0, {p, r};
        and.b32 t, $2, 0xffff0000; mov.b32 a, t; mul.rn.f32 z, a, $9; fma.rn.f32 a, a, $8, z;
        and.b32 t, $3, 0xffff0000; mov.b32 b, t; mul.rn.f32 z, b, $9; fma.rn.f32 b, b, $8, z;
        and.b32 t, $4, 0xffff0000; mov.b32 c, t; mul.rn.f32 z, c, $9; fma.rn.f32 c, c, $8, z;
        and.b32 t, $5, 0xffff0000; mov.b32 d, t; mul.rn.f32 z, d, $9; fma.rn.f32 d, d, $8, z;
        cvt.rn.satfinite.e4m3x2.f32 p, b, a; cvt.rn.satfinite.e4m3x2.f32 r, d, c; mov.b32 $1, {p, r}; }""",
        "=&r,=&r,r,r,r,r,f,f,f,f", [x0, x1, x2, x3, high_0, low_0, high_1, low_1],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def _square(x_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, M, pairs, words, x_stride, s_stride_m, s_stride_k,
            st_stride_k, st_stride_m, ROW_PASS: gl.constexpr, UE8M0: gl.constexpr, WARPS: gl.constexpr):
    """One program: 128 tokens of 128 channels. x_ptr: words of two channels, `pairs` to a row of q; qt_ptr: words of four
    tokens, `words` to a row."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // WARPS, WARPS], [WARPS, 1], [1, 0])  # tokens / 4 x words
    column: gl.constexpr = gl.SliceLayout(0, layout)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    turned: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])  # channels x tokens / 4
    first = gl.program_id(0) * 128
    row = gl.program_id(1) * 128 + gl.arange(0, 32, gl.SliceLayout(1, layout)) * 4
    pair = first // 2 + gl.arange(0, 64, column)
    x0 = _load(x_ptr, row, pair, M, x_stride)
    x1 = _load(x_ptr, row + 1, pair, M, x_stride)
    x2 = _load(x_ptr, row + 2, pair, M, x_stride)
    x3 = _load(x_ptr, row + 3, pair, M, x_stride)

    amax = _larger(_larger(x0 & MAGNITUDES, x1 & MAGNITUDES), _larger(x2 & MAGNITUDES, x3 & MAGNITUDES))
    amax = gl.convert_layout(gl.reduce(amax, 0, _larger), flat)
    scale_0, high_0, low_0 = _scale(amax << 16, UE8M0)
    scale_1, high_1, low_1 = _scale(amax & 0x7FFF0000, UE8M0)
    st_ptr += (first + 2 * gl.arange(0, 64, flat)).to(gl.int64) * st_stride_k + gl.program_id(1) * st_stride_m
    gl.store(st_ptr, scale_0)
    gl.store(st_ptr + st_stride_k, scale_1)
    parts = gl.allocate_shared_memory(gl.float32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    parts.index(0).store(high_0)
    parts.index(1).store(low_0)
    parts.index(2).store(high_1)
    parts.index(3).store(low_1)

    if ROW_PASS:
        s_ptr += gl.program_id(0) * s_stride_k
        _along_rows(x0, row, q_ptr, s_ptr, pair, M, pairs, s_stride_m, UE8M0)
        _along_rows(x1, row + 1, q_ptr, s_ptr, pair, M, pairs, s_stride_m, UE8M0)
        _along_rows(x2, row + 2, q_ptr, s_ptr, pair, M, pairs, s_stride_m, UE8M0)
        _along_rows(x3, row + 3, q_ptr, s_ptr, pair, M, pairs, s_stride_m, UE8M0)

    even, odd = _four_tokens(x0, x1, x2, x3, parts, column)
    buffer = gl.allocate_shared_memory(gl.int32, [128, 32], gl.SwizzledSharedLayout(4, WARPS, 8, [1, 0]))
    buffer.permute((1, 0)).store(gl.reshape(gl.join(even, odd), [32, 128]))
    channel = first + gl.arange(0, 128, gl.SliceLayout(1, turned))
    quad = gl.program_id(1) * 32 + gl.arange(0, 32, gl.SliceLayout(0, turned))
    qt_ptr += channel.to(gl.int64)[:, None] * words + quad[None, :]
    gl.store(qt_ptr, buffer.load(turned), mask=(quad < words)[None, :])


def square(
    x: Tensor, q: Tensor, scale_inv: Tensor, words_t: Tensor, scale_t: Tensor, row_pass: bool, ue8m0: bool
) -> None:
    """`quantize._square` for BF16 x (M, K), K a multiple of 128. words_t: the rows of the transposed q as int32."""
    m, k = x.shape
    _square[(k // TILE, cdiv(m, TILE))](
        x.view(torch.int32), q.view(torch.int16) if row_pass else words_t, scale_inv, words_t, scale_t, m, k // 2,
        words_t.shape[1], x.stride(0) // 2, *scale_inv.stride(), *scale_t.stride(), row_pass, ue8m0, WARPS[row_pass],
        num_warps=WARPS[row_pass], maxnreg=REGISTERS[row_pass],
    )  # fmt: skip


# From a sweep on an H200, for the transposed pass alone and for both passes.
WARPS, REGISTERS = {False: 8, True: 8}, {False: None, True: 80}
