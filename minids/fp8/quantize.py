"""Quantisation to FP8 with one scale a tile, a block, a row or a tensor (V3 section 3.3.2, figure 7a).

The problem: E4M3 has four exponent and three mantissa bits, so it spans only 2^-9 to 448. A matrix of small weights
would vanish in it. Therefore each group of numbers carries one FP32 multiplier s that makes the group's largest magnitude
the format's largest number:

    s = max |x| / 448        q = round_to_E4M3(x / s)        x ~ q * s

The published checkpoints store q as `weight` and s as `weight_scale_inv`; "inv" because s undoes the scaling 1/s. The
smaller the group, the less an outlier costs the others. V3 takes the shape of a group from the GEMM that reads it:

    function          group        scale_inv of (..., T, K)           used by V3 for
    quantize_tile     1 x 128      (..., T, ceil(K/128))              activations and gradients: a token's 128 channels
    quantize_block    128 x 128    (..., ceil(T/128), ceil(K/128))    weights
    quantize_row      1 x K        (..., T, 1)                        nothing: for comparison
    quantize_tensor   everything   ()                                 nothing: what was usual before, for comparison

A group keeps its relative precision over the 15 binades of E4M3's normal numbers, and an absolute one below:

    |x - q s| <= max(2^-4 |x|, 2^-10 s)        (half a unit in the last place, up to FP32 rounding of x / s)

`scale="ue8m0"` makes s a power of two, the smallest that lets nothing overflow: it is rounded UP. V3 does so for what is
quantised twice (dispatch, the input of o_proj) and V3.1 everywhere. Multiplying by s is then exact, and moving to
another grouping can only change exponents. The price: the largest magnitude lands anywhere from 224 to 448.

Conventions at the edge. A group of zeros has no magnitude to divide by: its scale is 1, so it dequantises to exact
zeros. Sides that are no multiples of 128 get smaller groups at the right and bottom edge (kv_a_proj_with_mqa,
576 x 7168, has 5 x 56 scales); nothing is padded in storage. q is always contiguous, whatever the strides of the input:
128 x 1 tiles for the weight gradient are quantize_tile of the transpose. torch has no type for E5M6, so its q is
float32, holding numbers of the format.

Quantising what was dequantised gives the same q again; s may move by one unit in its last place, since
448 s / 448 is not always s in FP32 (a power of two never moves, but halves if the largest q fell to 224).

Shapes: T or N rows, K columns, n = ceil(N / rows of a group), k = ceil(K / columns); leading dimensions pass through.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.fp8.formats import E4M3, E5M2, E5M6, Format, floor_power_of_two, round_to

BLOCK = 128
E4M3_MAX = E4M3.max  # 448
SCALES = ("fp32", "ue8m0")
ELEMENTS = {fmt.name: fmt for fmt in (E4M3, E5M2, E5M6)}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Quantized = tuple[Tensor, Tensor]


def quantize_tile(x: Tensor, tile: int = BLOCK, *, fmt: str | Format = "e4m3", scale: str = "fp32") -> Quantized:
    """One scale for each 1 x tile group along the last dimension: V3's activations.

    Args:
        x: (..., T, K), floating point, finite, any strides, any device.
        tile: columns of a group.
        fmt: "e4m3", "e5m2" or "e5m6". scale: "fp32", or "ue8m0" for powers of two.

    Returns:
        q (..., T, K) in the format's dtype and scale_inv (..., T, ceil(K / tile)) float32: x ~ q * scale_inv.

    Raises:
        TypeError: x is no float16, bfloat16, float32 or float64.
        ValueError: fewer than two dimensions, an empty one, NaN or infinity in x; unknown fmt or scale.
    """
    if tile < 1:
        raise ValueError(f"tile: got {tile}, expected a positive number of columns")
    return _quantize("x", x, (1, tile), fmt, scale)


def quantize_block(w: Tensor, block: int = BLOCK, *, fmt: str | Format = "e4m3", scale: str = "fp32") -> Quantized:
    """One scale for each block x block group: V3's weights.

    Args:
        w: (..., N, K), floating point, finite, any strides, any device; leading dimensions are matrices of their own.
        block: side of a group; 128 in every published checkpoint.
        fmt, scale: as in quantize_tile.

    Returns:
        q (..., N, K) in the format's dtype and scale_inv (..., n, k) float32, the multiplier: w ~ q * scale_inv.

    Raises:
        TypeError, ValueError: as quantize_tile.
    """
    return _quantize("w", w, _sides(block), fmt, scale)


def quantize_row(x: Tensor, *, fmt: str | Format = "e4m3", scale: str = "fp32") -> Quantized:
    """One scale for each row: (..., T, K) -> q (..., T, K), scale_inv (..., T, 1). Otherwise as quantize_tile."""
    _check_matrix("x", x)
    return _quantize("x", x, (1, x.shape[-1]), fmt, scale)


def quantize_tensor(x: Tensor, *, fmt: str | Format = "e4m3", scale: str = "fp32") -> Quantized:
    """One scale for everything: x of any shape -> q of that shape, scale_inv (). Otherwise as quantize_tile."""
    flat = x.reshape(1, -1)
    q, scale_inv = _quantize("x", flat, (1, x.numel()), fmt, scale)
    return q.view(x.shape), scale_inv.reshape(())


def dequantize(
    q: Tensor, scale_inv: Tensor, block: int | tuple[int, int] | None = BLOCK, dtype: torch.dtype = torch.float32,
    *, fmt: str | Format | None = None,
) -> Tensor:  # fmt: skip
    """Multiplies each group by its scale, in FP32, and rounds once to dtype.

    Args:
        q: (..., N, K) float8_e4m3fn or float8_e5m2; float32 only with fmt="e5m6".
        scale_inv: one entry a group, floating point.
        block: the group: 128 means 128 x 128, (1, 128) a tile, (1, K) a row, None everything (scale_inv of shape ()).
        dtype: of the result.
        fmt: "e5m6" if q holds numbers of that format. Without it float32 is refused: whoever passes it has most likely
            dequantised already and would apply the scale twice.

    Returns:
        (..., N, K) in dtype.

    Raises:
        TypeError: q is not quantised. ValueError: scale_inv does not have one entry a group.
    """
    if fmt is None:
        allowed = [f.dtype for f in ELEMENTS.values() if f.dtype]
    else:
        allowed = [_element(fmt).dtype or torch.float32]
    if q.dtype not in allowed:
        raise TypeError(f"q: got dtype {q.dtype}, expected {' or '.join(str(d) for d in allowed)}")
    if block is None:
        if scale_inv.shape != ():
            raise ValueError(f"scale_inv: got shape {tuple(scale_inv.shape)}, expected () for one scale of everything")
        return (q.float() * scale_inv.float()).to(dtype)
    _check_matrix("q", q)
    rows, columns = _sides(block)
    expected = scale_shape(q.shape, block)
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv: got shape {tuple(scale_inv.shape)}, expected {expected} for weights of shape "
            f"{tuple(q.shape)} in blocks of {rows} x {columns}"
        )
    groups = _to_groups(q.float(), rows, columns) * scale_inv.float()[..., :, None, :, None]
    return _from_groups(groups, q.shape).to(dtype)


def fake_quantize(
    x: Tensor, block: int | tuple[int, int] | None = BLOCK, *, fmt: str | Format = "e4m3", scale: str = "fp32"
) -> Tensor:
    """dequantize(quantize(x)) to the bit, in float32 throughout: what a simulated FP8 GEMM reads.

    On a CPU the casts to and from torch's 8-bit types cost more than the arithmetic; this leaves them out. Arguments and
    errors as in quantize_tile, block as in dequantize. Returns float32 of x's shape, contiguous.
    """
    shape = x.shape
    if block is None:
        x = x.reshape(1, -1)
    group = (1, max(x.numel(), 1)) if block is None else _sides(block)
    groups, scale_inv = _scaled_groups("x", x, group, _element(fmt), _rule(scale))
    rounded = round_to(groups, fmt).mul_(scale_inv)
    return _from_groups(rounded, x.shape).view(shape)


def scale_shape(shape: tuple[int, ...] | torch.Size, block: int | tuple[int, int] = BLOCK) -> tuple[int, ...]:
    """The shape of the scales of a tensor of this shape: (..., ceil(N / rows), ceil(K / columns))."""
    *leading, n_rows, n_columns = shape
    rows, columns = _sides(block)
    return (*leading, -(-n_rows // rows), -(-n_columns // columns))


def scale_of(amax: Tensor, fmt: Format, scale: str) -> Tensor:
    """The multiplier of groups whose largest magnitudes are amax, float32; a group of zeros has 1.

    "fp32": amax / max. "ue8m0": the next power of two above. "mx": the power of two below, by which the largest numbers
    may saturate (mx.py). A scale is always a normal FP32 number, so amax below max * 2^-126 counts as that.
    """
    floor = amax.clamp(min=fmt.max * torch.finfo(torch.float32).tiny)
    if scale == "fp32":
        # Divided by a tensor: CUDA turns a division by a Python number into a product with its rounded reciprocal.
        scale_inv = floor / torch.full_like(floor, fmt.max)
    else:
        # Not by a logarithm, which may err at the powers of two: by comparing amax with what this exponent can hold.
        low = floor_power_of_two(floor) * 2.0**-fmt.max_exponent
        scale_inv = low if scale == "mx" else torch.where(low * fmt.max >= floor, low, 2 * low)
    return torch.where(amax > 0, scale_inv, 1.0)


def _quantize(name: str, x: Tensor, group: tuple[int, int], fmt: str | Format, scale: str) -> Quantized:
    fmt = _element(fmt)
    scaled, scale_inv = _scaled_groups(name, x, group, fmt, _rule(scale))
    q = scaled.to(fmt.dtype) if fmt.dtype else round_to(scaled, fmt)
    return _from_groups(q, x.shape), scale_inv[..., 0, :, 0]


def _scaled_groups(name: str, x: Tensor, group: tuple[int, int], fmt: Format, scale: str) -> Quantized:
    """x / s in groups (..., n, rows, k, columns), clamped to the format, and s (..., n, 1, k, 1)."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected a floating-point tensor of 16 bits or more")
    _check_matrix(name, x)
    groups = _to_groups(x.float().contiguous(), *group)
    amax = groups.abs().amax(dim=(-3, -1), keepdim=True)
    if not torch.isfinite(amax).all():
        bad = int((~torch.isfinite(x.float())).sum())
        raise ValueError(f"{name}: {bad} of {x.numel()} values are NaN or infinite in FP32, expected finite values")
    scale_inv = scale_of(amax, fmt, scale)
    # amax / scale can round to just above 448: clamped, since casts disagree on what comes of that.
    return (groups / scale_inv).clamp_(-fmt.max, fmt.max), scale_inv


def _element(fmt: str | Format) -> Format:
    name = fmt.name if isinstance(fmt, Format) else fmt
    if name not in ELEMENTS:
        raise ValueError(f"fmt: got {name!r}, expected one of {', '.join(ELEMENTS)}")
    return ELEMENTS[name]


def _rule(scale: str) -> str:
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(SCALES)}")
    return scale


def _sides(block: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = block if isinstance(block, tuple) else (block, block)
    if rows < 1 or columns < 1:
        raise ValueError(f"block: got {block}, expected a positive number of rows and columns")
    return rows, columns


def _check_matrix(name: str, x: Tensor) -> None:
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (..., N, K) with no empty dimension")


def _to_groups(x: Tensor, rows: int, columns: int) -> Tensor:
    """(..., N, K) -> (..., n, rows, k, columns); edge groups are filled up with zeros, which change no maximum."""
    n_rows, n_columns = x.shape[-2:]
    if n_rows % rows or n_columns % columns:
        x = F.pad(x, (0, -n_columns % columns, 0, -n_rows % rows))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _from_groups(groups: Tensor, shape: torch.Size) -> Tensor:
    """(..., n, rows, k, columns) -> (..., N, K), without the fill."""
    return groups.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()
