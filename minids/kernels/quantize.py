"""Quantisation of activations and gradients to FP8 in tiles of 1 x 128 (V3 section 3.3.2, figure 7a).

The problem: E4M3 spans 2^-9 to 448, and activations have outliers. One scale a token and 128 channels keeps an outlier
from costing the rest of its row their precision:

    s[m, k] = max |x[m, 128 k : 128 k + 128]| / 448        q = round_to_E4M3(x / s)        x ~ q * s

With `scale="ue8m0"` s is the next power of two (V3 does so for the inputs of the layers after attention; later chips want
no other). `e4m3` says how both are computed, and what becomes of zeros, infinities and NaN.

The weight gradient dW = dY^T X sums over tokens, so there a tile is 128 tokens of one channel: `quantize_tile_t` gives
the transpose, quantised 1 x 128, and `quantize_tile_both` both from one read of x.

Floors for M x K in BF16, on a device that moves B bytes a second: M K (2 + 1 + 4 / 128) / B for one pass and
M K (2 + 2 + 8 / 128) / B for both. The arithmetic of one pass, about ten operations a number, hides below it; that of
both does not, unless it is done as in `quantize_gluon`, which computes the same on Hopper.

Layout: q is row-major. scale_inv (M, ceil(K / 128)) is row-major, or column-major (strides (1, M'), M' = M rounded up to
4), which is how GEMMs read it. Of the transpose q (K, M) the row stride is M rounded up to 16, so that rows start where the
copy engine can read them.

Shapes: M tokens, K channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.kernels.backend import E4M3_MAX, TILE, capability, cdiv, check, choose, jit, registered, tl
from minids.kernels.e4m3 import SCALES, e4m3_scale, magnitude_bits, scale_of, to_e4m3

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
    return _quantize_tile(x, scale == "ue8m0", column_major)


def quantize_tile_t(
    x: Tensor, *, scale: str = "fp32", column_major: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_tile` of the transpose: q (K, M), whose row stride is M rounded up to 16, and scale_inv (K, ceil(M / 128)).
    Arguments and errors as there."""
    _check(x, scale)
    if choose(backend, x) == "torch":
        return _reference_t(x, scale, column_major)
    return _quantize_tile_t(x, scale == "ue8m0", column_major)


def quantize_tile_both(
    x: Tensor, *, scale: str = "fp32", column_major: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_tile` and `quantize_tile_t`, from one read of x if it is BF16 or FP16 and its rows are a multiple of 16
    numbers apart: q, scale_inv, q_t, scale_inv_t."""
    _check(x, scale)
    if choose(backend, x) == "torch":
        q, scale_inv = reference(x, scale)
        return q, _column_major(scale_inv) if column_major else scale_inv, *_reference_t(x, scale, column_major)
    return _quantize_tile_both(x, scale == "ue8m0", column_major)


# ---- reference ----


def reference(x: Tensor, scale: str = "fp32") -> tuple[Tensor, Tensor]:
    """The specification: q (M, K), scale_inv (M, ceil(K / 128)), in PyTorch."""
    m, k = x.shape
    tiles = F.pad(x.float(), (0, -k % TILE)).view(m, cdiv(k, TILE), TILE)
    scale_inv = scale_of(tiles.abs().amax(-1), scale)
    scaled = (tiles / scale_inv[..., None]).clamp(-E4M3_MAX, E4M3_MAX)  # amax / s can round to just above 448
    return scaled.to(torch.float8_e4m3fn).flatten(1)[:, :k].contiguous(), scale_inv


def _reference_t(x: Tensor, scale: str, column_major: bool) -> tuple[Tensor, Tensor]:
    q, scale_inv = reference(x.t(), scale)
    return _empty_t(x, False)[0].copy_(q), _column_major(scale_inv) if column_major else scale_inv


# ---- Triton ----


@jit(varying=("M",))
def _rows(x_ptr, q_ptr, s_ptr, M, K, x_stride, s_stride_m, s_stride_k,
          ROWS: tl.constexpr, TILES: tl.constexpr, UE8M0: tl.constexpr):
    """One program: ROWS tokens of TILES tiles of 128 channels."""
    tile, across = tl.arange(0, ROWS * TILES), tl.cdiv(K, TILES * 128)
    row = ((tl.program_id(0) // across) * ROWS + tile // TILES).to(tl.int64)
    k = (tl.program_id(0) % across) * TILES + tile % TILES
    column = k[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = (row[:, None] < M) & (column < K)
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = e4m3_scale(tl.max(magnitude_bits(x), axis=1), UE8M0)
    tl.store(s_ptr + row * s_stride_m + k * s_stride_k, scale, mask=(row < M) & (k * 128 < K))
    tl.store(q_ptr + row[:, None] * K + column, to_e4m3(x, scale[:, None]), mask=mask)


@jit
def _load_rows(x_ptr, row, column, M, K, x_stride):
    mask = (row[:, None] < M) & (column[None, :] < K)
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _byte(x, scale, SHIFT: tl.constexpr):
    """The E4M3 bits of x / scale, in byte SHIFT / 8 of a word."""
    return to_e4m3(x, scale).to(tl.uint8, bitcast=True).to(tl.int32) << SHIFT


@jit
def _store_rows(x, q_ptr, s_ptr, row, column, M, K, s_stride_m, UE8M0: tl.constexpr):
    """The pass along rows for the tiles of 128 channels in x."""
    scale = e4m3_scale(tl.max(magnitude_bits(x), axis=1), UE8M0)
    tl.store(s_ptr + row * s_stride_m, scale, mask=row < M)
    mask = (row[:, None] < M) & (column[None, :] < K)
    tl.store(q_ptr + row.to(tl.int64)[:, None] * K + column[None, :], to_e4m3(x, scale[:, None]), mask=mask)


@jit(varying=("M",))
def _square(x_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, M, K, words, x_stride, s_stride_m, s_stride_k, st_stride_k, st_stride_m,
            COLUMNS: tl.constexpr, ROW_PASS: tl.constexpr, UE8M0: tl.constexpr):
    """One program: 128 tokens of COLUMNS channels, read once; quantised down the columns, and along the rows if asked.

    Bytes are slow to turn: the exchange between threads goes by words. So a thread's value is a word of four tokens of one
    channel, made of four loads, and the words are turned. qt_ptr points to words, `words` of them to a row.
    """
    quad = tl.program_id(1) * 32 + tl.arange(0, 32)  # tokens 4 quad to 4 quad + 3
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x0 = _load_rows(x_ptr, quad * 4, column, M, K, x_stride)
    x1 = _load_rows(x_ptr, quad * 4 + 1, column, M, K, x_stride)
    x2 = _load_rows(x_ptr, quad * 4 + 2, column, M, K, x_stride)
    x3 = _load_rows(x_ptr, quad * 4 + 3, column, M, K, x_stride)

    bits = tl.maximum(magnitude_bits(x0), magnitude_bits(x1))
    bits = tl.maximum(bits, tl.maximum(magnitude_bits(x2), magnitude_bits(x3)))
    scale = e4m3_scale(tl.max(bits, axis=0), UE8M0)
    tl.store(st_ptr + column.to(tl.int64) * st_stride_k + tl.program_id(1) * st_stride_m, scale, mask=column < K)
    scale = scale[None, :]
    word = _byte(x0, scale, 0) | _byte(x1, scale, 8) | _byte(x2, scale, 16) | _byte(x3, scale, 24)
    mask = (column[:, None] < K) & (quad[None, :] < words)
    tl.store(qt_ptr + column.to(tl.int64)[:, None] * words + quad[None, :], tl.trans(word), mask=mask)

    if ROW_PASS:  # COLUMNS = 128: the program's channels are one tile
        s_ptr += tl.program_id(0) * s_stride_k
        _store_rows(x0, q_ptr, s_ptr, quad * 4, column, M, K, s_stride_m, UE8M0)
        _store_rows(x1, q_ptr, s_ptr, quad * 4 + 1, column, M, K, s_stride_m, UE8M0)
        _store_rows(x2, q_ptr, s_ptr, quad * 4 + 2, column, M, K, s_stride_m, UE8M0)
        _store_rows(x3, q_ptr, s_ptr, quad * 4 + 3, column, M, K, s_stride_m, UE8M0)


# From a sweep on an H200: tokens, tiles and warps a program of _rows; channels and warps a program of _square.
ROWS = {False: (1, 8, 2), True: (16, 1, 1)}  # scales row-major; column-major, where neighbours in memory are tokens
COLUMNS_T, WARPS_T, WARPS_BOTH = 32, 2, 4


def prefers_gluon(x: Tensor) -> bool:
    """Whether `quantize_gluon` makes the transpose: on Hopper, of BF16 in whole tiles of channels and aligned rows."""
    tiles = x.dtype == torch.bfloat16 and x.shape[1] % TILE == 0
    return tiles and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and capability(x.device)[0] == 9


@registered("quantize_tile")
def _quantize_tile(x: Tensor, ue8m0: bool, column_major: bool) -> tuple[Tensor, Tensor]:
    (m, k), q, scale_inv = x.shape, *empty(x, column_major)
    if q.numel():
        rows, tiles, warps = ROWS[column_major]
        grid = (cdiv(k, TILE * tiles) * cdiv(m, rows),)  # in one dimension: the others end at 65,535
        _rows[grid](x, q, scale_inv, m, k, x.stride(0), *scale_inv.stride(), rows, tiles, ue8m0, num_warps=warps)
    return q, scale_inv


@registered("quantize_tile_t")
def _quantize_tile_t(x: Tensor, ue8m0: bool, column_major: bool) -> tuple[Tensor, Tensor]:
    q_t, scale_t = _empty_t(x, column_major)
    if q_t.numel():
        _launch_square(x, q_t, scale_t, q_t, scale_t, COLUMNS_T, False, ue8m0, WARPS_T)
    return q_t, scale_t


@registered("quantize_tile_both")
def _quantize_tile_both(x: Tensor, ue8m0: bool, column_major: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Triton 3.6 loses some of the words that it turns where a thread has loaded four numbers of a row, not eight.
    if not prefers_gluon(x) and (x.stride(0) % 16 or x.dtype == torch.float32):
        return *_quantize_tile(x, ue8m0, column_major), *_quantize_tile_t(x, ue8m0, column_major)
    (q, scale_inv), (q_t, scale_t) = empty(x, column_major), _empty_t(x, column_major)
    if q.numel():
        _launch_square(x, q, scale_inv, q_t, scale_t, TILE, True, ue8m0, WARPS_BOTH)
    return q, scale_inv, q_t, scale_t


def _launch_square(
    x: Tensor, q: Tensor, scale_inv: Tensor, q_t: Tensor, scale_t: Tensor, columns: int, row_pass: bool, ue8m0: bool,
    warps: int,
) -> None:
    (m, k), words = x.shape, cdiv(len(x), 16) * 4
    words_t = q_t.as_strided((k, words * 4), (words * 4, 1)).view(torch.int32)  # rows with what pads them
    if prefers_gluon(x):
        from minids.kernels import quantize_gluon

        return quantize_gluon.square(x, q, scale_inv, words_t, scale_t, row_pass, ue8m0)
    _square[(cdiv(k, columns), cdiv(m, TILE))](
        x, q, scale_inv, words_t, scale_t, m, k, words, x.stride(0), *scale_inv.stride(), *scale_t.stride(),
        columns, row_pass, ue8m0, num_warps=warps,
    )  # fmt: skip


@_quantize_tile.register_fake
def _(x, ue8m0, column_major):
    return empty(x, column_major)


@_quantize_tile_t.register_fake
def _(x, ue8m0, column_major):
    return _empty_t(x, column_major)


@_quantize_tile_both.register_fake
def _(x, ue8m0, column_major):
    return (*empty(x, column_major), *_empty_t(x, column_major))


def empty(x: Tensor, column_major: bool) -> tuple[Tensor, Tensor]:
    """Room for q (M, K) and its scales."""
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), _empty_scale(x, *x.shape, column_major)


def _empty_t(x: Tensor, column_major: bool) -> tuple[Tensor, Tensor]:
    """Room for the transposed q (K, M), rows a multiple of 16 bytes apart, and its scales."""
    m, k = x.shape
    return x.new_empty((k, cdiv(m, 16) * 16), dtype=torch.float8_e4m3fn)[:, :m], _empty_scale(x, k, m, column_major)


def _empty_scale(x: Tensor, m: int, k: int, column_major: bool) -> Tensor:
    """Room for the scales of an (M, K) matrix."""
    if column_major:
        return x.new_empty((cdiv(k, TILE), cdiv(m, 4) * 4), dtype=torch.float32).t()[:m]
    return x.new_empty((m, cdiv(k, TILE)), dtype=torch.float32)


def as_column_major(scale_inv: Tensor) -> Tensor:
    """Scales as `column_major=True` makes them, which the copy engine can read: these, if they are, or a copy."""
    ready = scale_inv.stride(0) == 1 and scale_inv.stride(1) % 4 == 0 and scale_inv.data_ptr() % 16 == 0
    return scale_inv if ready else _column_major(scale_inv)


def _column_major(scale_inv: Tensor) -> Tensor:
    m, n_tiles = scale_inv.shape
    return _empty_scale(scale_inv, m, n_tiles * TILE, True).copy_(scale_inv)


def _check(x: Tensor, scale: str) -> None:
    check("x", x, ndim=2, dtype=FLOATS)
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(SCALES)}")
    if x.shape[1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one channel")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x: got strides {x.stride()}, expected unit stride inside rows")
