"""Quantisation of activations and gradients to FP8 in tiles of 1 x 128 (V3 section 3.3.2, figure 7a).

The problem: E4M3 spans 2^-9 to 448, and activations have outliers. One scale a token and 128 channels keeps an outlier
from costing the rest of its row their precision:

    s[m, k] = max |x[m, 128 k : 128 k + 128]| / 448        q = round_to_E4M3(x / s)        x ~ q * s

Both divisions are true ones, rounded as IEEE says, so that the kernel gives the reference's bits. With
`scale="ue8m0"` s is the next power of two (V3 does so for the inputs of the layers after attention; later chips want
no other). A tile of zeros gets s = 1. A tile with a NaN or an infinity becomes NaN, scale and all: the loss will tell,
and nothing has to be read back from the device to find out.

The weight gradient dW = dY^T X sums over tokens, so there a tile is 128 tokens of one channel: `quantize_tile_t` gives
the transpose, quantised 1 x 128, and `quantize_tile_both` both from one read of x.

Floors for M x K in BF16, on a device that moves B bytes a second: M K (2 + 1 + 4 / 128) / B for one pass and
M K (2 + 2 + 8 / 128) / B for both. The arithmetic, about ten operations a number, hides below it.

Layout: q is row-major. scale_inv (M, ceil(K / 128)) is row-major, or column-major (strides (1, M'), M' = M rounded up to
4), which is how GEMMs read it. Of the transpose q (K, M) the row stride is M rounded up to 16, so that rows start where the
copy engine can read them.

Shapes: M tokens, K channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels.backend import E4M3_MAX, TILE, cdiv, check, choose, jit, tl

SCALES = ("fp32", "ue8m0")
# The smallest amax whose scale is a normal FP32 number; below it amax / 448 would lose bits or become 0.
SMALLEST_AMAX = E4M3_MAX * torch.finfo(torch.float32).tiny
SMALLEST = tl.constexpr(SMALLEST_AMAX)
FLOATS = (torch.bfloat16, torch.float32, torch.float16)


def quantize_tile(
    x: Tensor, *, scale: str = "fp32", column_major: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Quantises each 1 x 128 tile with a scale of its own.

    Args:
        x: (M, K) BF16, FP16 or FP32, unit stride inside rows; M may be 0.
        scale: "fp32", or "ue8m0" for powers of two.
        column_major: scales stored with tokens adjacent.
        backend: see `minids.kernels.backend`.

    Returns:
        q (M, K) float8_e4m3fn and scale_inv (M, ceil(K / 128)) float32: x ~ q * scale_inv.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    _check(x, scale)
    if choose(backend, x) == "torch":
        q, scale_inv = reference(x, scale)
        return q, _column_major(scale_inv) if column_major else scale_inv
    return torch.ops.minids.quantize_tile(x, scale == "ue8m0", column_major)


def quantize_tile_t(x: Tensor, *, scale: str = "fp32", backend: str | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_tile` of the transpose: q (K, M), whose row stride is M rounded up to 16, and scale_inv (K, ceil(M / 128)).
    Arguments and errors as there."""
    _check(x, scale)
    if choose(backend, x) == "torch":
        return _reference_t(x, scale)
    return torch.ops.minids.quantize_tile_t(x, scale == "ue8m0")


def quantize_tile_both(
    x: Tensor, *, scale: str = "fp32", column_major: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_tile` and `quantize_tile_t` from one read of x: q, scale_inv, q_t, scale_inv_t."""
    _check(x, scale)
    if choose(backend, x) == "torch":
        q, scale_inv = reference(x, scale)
        return q, _column_major(scale_inv) if column_major else scale_inv, *_reference_t(x, scale)
    return torch.ops.minids.quantize_tile_both(x, scale == "ue8m0", column_major)


# ---- reference ----


def reference(x: Tensor, scale: str = "fp32") -> tuple[Tensor, Tensor]:
    """The specification: q (M, K), scale_inv (M, ceil(K / 128)), in PyTorch."""
    m, k = x.shape
    tiles = F.pad(x.float(), (0, -k % TILE)).view(m, -1, TILE)
    scale_inv = scale_of(tiles.abs().amax(-1), scale)
    scaled = (tiles / scale_inv[..., None]).clamp(-E4M3_MAX, E4M3_MAX)  # amax / s can round to just above 448
    return scaled.to(torch.float8_e4m3fn).view(m, -1)[:, :k].contiguous(), scale_inv


def scale_of(amax: Tensor, scale: str = "fp32") -> Tensor:
    """The scale of tiles whose largest magnitudes are amax: amax / 448, or the next power of two; 1 for zero, NaN for
    what is not finite."""
    # Divided by a tensor: CUDA turns a division by a Python number into a product with its rounded reciprocal.
    scale_inv = amax.clamp(min=SMALLEST_AMAX) / torch.full_like(amax, E4M3_MAX)
    if scale == "ue8m0":
        bits = scale_inv.view(torch.int32)
        scale_inv = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # mantissa 0: stays; else the next exponent
    scale_inv = torch.where(amax == 0, 1.0, scale_inv)
    return torch.where(amax < torch.inf, scale_inv, torch.nan)


def _reference_t(x: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    q, scale_inv = reference(x.t(), scale)
    padded = _empty_t(x)
    padded.copy_(q)
    return padded, scale_inv


# ---- Triton ----


@jit
def e4m3_scale(amax_bits, UE8M0: tl.constexpr):
    """The scale of tiles from the bits of their largest magnitudes: as integers NaN > infinity > every number."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.maximum(amax, SMALLEST), tl.full(amax.shape, 448.0, tl.float32))
    if UE8M0:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    scale = tl.where(amax_bits == 0, 1.0, scale)
    return tl.where(amax_bits >= 0x7F800000, float("nan"), scale)


@jit
def magnitude_bits(x):
    """|x| as an integer that orders like it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def to_e4m3(x, scale):
    """round_to_E4M3(x / scale). scale has x's shape or broadcasts to it.

    The quotient is the correctly rounded one, without a division a number: x times the rounded 1 / scale is off by at
    most two units in the last place; a fused multiply-add finds what is missing, exactly, and a second one adds it
    (Markstein). Tiles so small that the remainder would be subnormal are lifted by 2^64 first. The conversion saturates.
    """
    lift = tl.where(scale < 1e-20, -18446744073709551616.0, -1.0)  # negative: the order of signs keeps -0 as it is
    scale *= -lift
    inverse = tl.div_rn(tl.full(scale.shape, -1.0, tl.float32), scale)
    scale, inverse = tl.broadcast_to(scale, x.shape), tl.broadcast_to(inverse, x.shape)
    x *= lift
    quotient = x * inverse
    return tl.fma(tl.fma(quotient, scale, x), inverse, quotient).to(tl.float8e4nv)


@jit(varying=("M",))
def _rows(x_ptr, q_ptr, s_ptr, M, K, x_stride, s_stride_m, s_stride_k,
          ROWS: tl.constexpr, TILES: tl.constexpr, UE8M0: tl.constexpr):
    """One program: ROWS tokens of TILES tiles of 128 channels."""
    tile = tl.arange(0, ROWS * TILES)
    row = (tl.program_id(1) * ROWS + tile // TILES).to(tl.int64)
    k = tl.program_id(0) * TILES + tile % TILES
    column = k[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = (row[:, None] < M) & (column < K)
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = e4m3_scale(tl.max(magnitude_bits(x), axis=1), UE8M0)
    tl.store(s_ptr + row * s_stride_m + k * s_stride_k, scale, mask=(row < M) & (k * 128 < K))
    tl.store(q_ptr + row[:, None] * K + column, to_e4m3(x, scale[:, None]), mask=mask)


@jit(varying=("M", "st_stride"))
def _square(x_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, M, K, x_stride, s_stride_m, s_stride_k, qt_stride, st_stride,
            COLUMNS: tl.constexpr, ROW_PASS: tl.constexpr, UE8M0: tl.constexpr):
    """One program: 128 tokens of COLUMNS channels, read once; quantised down the columns, and along the rows if asked."""
    row = (tl.program_id(1) * 128 + tl.arange(0, 128)).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row[:, None] < M) & (column[None, :] < K)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    bits = magnitude_bits(x)

    scale_t = e4m3_scale(tl.max(bits, axis=0), UE8M0)
    tl.store(st_ptr + column.to(tl.int64) * st_stride + tl.program_id(1), scale_t, mask=column < K)
    q_t = to_e4m3(x, scale_t[None, :])
    tl.store(qt_ptr + column.to(tl.int64)[:, None] * qt_stride + row[None, :], tl.trans(q_t), mask=tl.trans(mask))

    if ROW_PASS:  # COLUMNS = 128: the program's channels are one tile
        scale = e4m3_scale(tl.max(bits, axis=1), UE8M0)
        tl.store(s_ptr + row * s_stride_m + tl.program_id(0) * s_stride_k, scale, mask=row < M)
        q = to_e4m3(x, scale[:, None])
        tl.store(q_ptr + row[:, None] * K + column[None, :], q, mask=mask)


# From a sweep on an H200: tokens, tiles and warps a program of _rows; channels and warps a program of _square.
ROWS, TILES, WARPS = 4, 4, 4
COLUMNS_T, WARPS_T, WARPS_BOTH = 64, 8, 16


@torch.library.custom_op("minids::quantize_tile", mutates_args=())
def _quantize_tile(x: Tensor, ue8m0: bool, column_major: bool) -> tuple[Tensor, Tensor]:
    (m, k), q, scale_inv = x.shape, *_empty(x, column_major)
    if q.numel():
        grid = (cdiv(k, TILE * TILES), cdiv(m, ROWS))
        _rows[grid](x, q, scale_inv, m, k, x.stride(0), *scale_inv.stride(), ROWS, TILES, ue8m0, num_warps=WARPS)
    return q, scale_inv


@torch.library.custom_op("minids::quantize_tile_t", mutates_args=())
def _quantize_tile_t(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    (m, k), q_t, scale_t = x.shape, _empty_t(x), x.new_empty((x.shape[1], cdiv(len(x), TILE)), dtype=torch.float32)
    if q_t.numel():
        grid = (cdiv(k, COLUMNS_T), cdiv(m, TILE))
        _square[grid](x, q_t, scale_t, q_t, scale_t, m, k, x.stride(0), 0, 0, q_t.stride(0), scale_t.stride(0),
                      COLUMNS_T, False, ue8m0, num_warps=WARPS_T)
    return q_t, scale_t


@torch.library.custom_op("minids::quantize_tile_both", mutates_args=())
def _quantize_tile_both(x: Tensor, ue8m0: bool, column_major: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (m, k), q, scale_inv = x.shape, *_empty(x, column_major)
    q_t, scale_t = _empty_t(x), x.new_empty((k, cdiv(m, TILE)), dtype=torch.float32)
    if q.numel():
        grid = (cdiv(k, TILE), cdiv(m, TILE))
        _square[grid](x, q, scale_inv, q_t, scale_t, m, k, x.stride(0), *scale_inv.stride(), q_t.stride(0),
                      scale_t.stride(0), TILE, True, ue8m0, num_warps=WARPS_BOTH)
    return q, scale_inv, q_t, scale_t


@_quantize_tile.register_fake
def _(x, ue8m0, column_major):
    return _empty(x, column_major)


@_quantize_tile_t.register_fake
def _(x, ue8m0):
    return _empty_t(x), x.new_empty((x.shape[1], cdiv(x.shape[0], TILE)), dtype=torch.float32)


@_quantize_tile_both.register_fake
def _(x, ue8m0, column_major):
    return (*_empty(x, column_major), *_quantize_tile_t(x, ue8m0))


def _empty(x: Tensor, column_major: bool) -> tuple[Tensor, Tensor]:
    """Room for q and scale_inv."""
    m, k = x.shape
    q, n_tiles = x.new_empty((m, k), dtype=torch.float8_e4m3fn), cdiv(k, TILE)
    if column_major:
        return q, x.new_empty((n_tiles, cdiv(m, 4) * 4), dtype=torch.float32).t()[:m]
    return q, x.new_empty((m, n_tiles), dtype=torch.float32)


def _empty_t(x: Tensor) -> Tensor:
    """Room for the transposed q, rows a multiple of 16 bytes apart."""
    m, k = x.shape
    return x.new_empty((k, cdiv(m, 16) * 16), dtype=torch.float8_e4m3fn)[:, :m]


def _column_major(scale_inv: Tensor) -> Tensor:
    m, n_tiles = scale_inv.shape
    return scale_inv.new_empty((n_tiles, cdiv(m, 4) * 4)).t()[:m].copy_(scale_inv)


def _check(x: Tensor, scale: str) -> None:
    check("x", x, ndim=2, dtype=FLOATS)
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(SCALES)}")
    if x.shape[1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one channel")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x: got strides {x.stride()}, expected unit stride inside rows")
