"""Words of four E4M3 numbers, and the few instructions that the passes between FP8 products cannot do without.

Between two products a number of z costs five quantisations; these passes are bound by instructions, not by memory. What
Triton's own operations leave on the table, an instruction sequence each, is written out here:

    word_of        four rows' numbers to one word: two conversions of pairs and one permutation, instead of four
                   conversions, and bytes shifted and joined
    sigmoid        1 / (1 + 2^(-x log2 e)) by the two approximations of the hardware, without the steps that rescue
                   subnormal numbers: of 1 + 2^y there are none
    largest        |x| of two numbers, one instruction: NaN, and so infinity times 0, is larger than every number

Triton's interpreter knows no instructions: there each is what it means.
"""

from minids.kernels.backend import INTERPRETED, jit, tl

TO_WORD = tl.constexpr("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
                       "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }")  # fmt: skip
SIGMOID = tl.constexpr("{ .reg .f32 e; mul.ftz.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; "
                       "add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }")  # fmt: skip
LARGEST = tl.constexpr("{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b; }")


@jit
def _word_meant(x0, x1, x2, x3):
    b0, b1 = x0.to(tl.float8e4nv).to(tl.uint8, bitcast=True), x1.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    b2, b3 = x2.to(tl.float8e4nv).to(tl.uint8, bitcast=True), x3.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    low = b0.to(tl.int32) | (b1.to(tl.int32) << 8)
    return low | (b2.to(tl.int32) << 16) | (b3.to(tl.int32) << 24)


@jit
def _word_asm(x0, x1, x2, x3):
    return tl.inline_asm_elementwise(TO_WORD, "=r,f,f,f,f", [x0, x1, x2, x3], dtype=tl.int32, is_pure=True, pack=1)


@jit
def _sigmoid_meant(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _sigmoid_asm(x):
    return tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def _largest_meant(a, b):
    return tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)


word_of = _word_meant if INTERPRETED else _word_asm
sigmoid = _sigmoid_meant if INTERPRETED else _sigmoid_asm
largest = _largest_meant


@jit
def over(x, scale, UE8M0: tl.constexpr):
    """x / scale as a division rounds it, as `minids.kernels.e4m3.to_e4m3` says; the scales of a tile broadcast to it."""
    if UE8M0:
        return x * tl.broadcast_to(1.0 / scale, x.shape)
    lift = tl.where(scale < 1e-20, -18446744073709551616.0, -1.0)
    scale *= -lift
    inverse = -1.0 / scale
    scale, inverse = tl.broadcast_to(scale, x.shape), tl.broadcast_to(inverse, x.shape)
    x *= lift
    quotient = x * inverse
    return tl.fma(tl.fma(quotient, scale, x), inverse, quotient)
