"""Block quantisation of weight matrices to FP8 (V3 section 3.3.2, figure 7a).

The problem: E4M3 has four exponent and three mantissa bits, so it spans only 2^-9 to 448. A matrix of small weights
would vanish in it. Therefore each block of 128 x 128 weights carries one FP32 multiplier s that makes the block's
largest magnitude the format's largest number:

    s = max |w| / 448        q = round_to_E4M3(w / s)        w ~ q * s

The published checkpoints store q as `weight` and s as `weight_scale_inv`; "inv" because s undoes the scaling 1/s.
A block holds its relative precision over the 15 binades of E4M3's normal numbers, and an absolute one below:

    |w - q s| <= max(2^-4 |w|, 2^-10 s)        (half a unit in the last place, up to FP32 rounding of w / s)

Two conventions at the edge. A block of zeros has no magnitude to divide by: its scale is 1, so it dequantises to exact
zeros. Matrices whose sides are no multiples of 128 get smaller blocks at the right and bottom edge (kv_a_proj_with_mqa,
576 x 7168, has 5 x 56 scales); nothing is padded in storage.

Quantising what was dequantised gives the same q again; s may move by one unit in its last place, since
448 s / 448 is not always s in FP32.

Shapes: N output rows, K input columns, b = block, n = ceil(N / b), k = ceil(K / b); leading dimensions pass through.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
# The smallest amax whose scale is still a normal FP32 number; below it amax / 448 would lose bits or become 0.
SMALLEST_AMAX = E4M3_MAX * torch.finfo(torch.float32).tiny


def quantize_block(w: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantises each block x block tile of a matrix with one scale.

    Args:
        w: (..., N, K), floating point, finite, on any device.
        block: side of a tile; 128 in every published checkpoint.

    Returns:
        q (..., N, K) float8_e4m3fn and scale_inv (..., n, k) float32, the multiplier: w ~ q * scale_inv.

    Raises:
        TypeError: w is not floating point. ValueError: fewer than two dimensions, or NaN or infinity in w.
    """
    _check_matrix("w", w, block)
    if not w.is_floating_point():
        raise TypeError(f"w: got dtype {w.dtype}, expected a floating-point matrix")
    blocks = _to_blocks(w.float(), block)
    amax = blocks.abs().amax(dim=(-3, -1))
    if not torch.isfinite(amax).all():
        bad = int((~torch.isfinite(w.float())).sum())
        raise ValueError(f"w: {bad} of {w.numel()} values are NaN or infinite in FP32, expected finite weights")
    # Divided by a tensor: CUDA turns a division by a Python number into a product with its rounded reciprocal.
    largest = torch.full_like(amax, E4M3_MAX)
    scale_inv = torch.where(amax > 0, amax.clamp(min=SMALLEST_AMAX) / largest, 1.0)
    # amax / scale can round to just above 448. torch rounds that back and gives NaN from 464 on; other casts differ.
    scaled = (blocks / scale_inv[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return _from_blocks(scaled.to(torch.float8_e4m3fn), w.shape), scale_inv


def dequantize(q: Tensor, scale_inv: Tensor, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiplies each block by its scale, in FP32, and rounds once to dtype.

    Args:
        q: (..., N, K) float8_e4m3fn.
        scale_inv: (..., n, k) float32.
        block: side of a tile.
        dtype: of the result.

    Returns:
        (..., N, K) in dtype.

    Raises:
        TypeError: q is not float8_e4m3fn. ValueError: scale_inv does not have one entry a block.
    """
    _check_matrix("q", q, block)
    if q.dtype != torch.float8_e4m3fn:
        raise TypeError(f"q: got dtype {q.dtype}, expected torch.float8_e4m3fn")
    expected = scale_shape(q.shape, block)
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv: got shape {tuple(scale_inv.shape)}, expected {expected} for weights of shape "
            f"{tuple(q.shape)} in blocks of {block} x {block}"
        )
    blocks = _to_blocks(q.float(), block) * scale_inv.float()[..., :, None, :, None]
    return _from_blocks(blocks, q.shape).to(dtype)


def scale_shape(shape: tuple[int, ...] | torch.Size, block: int = BLOCK) -> tuple[int, ...]:
    """The shape of the scales of weights of this shape: (..., ceil(N / block), ceil(K / block))."""
    *leading, n_rows, n_columns = shape
    return (*leading, -(-n_rows // block), -(-n_columns // block))


def _check_matrix(name: str, w: Tensor, block: int) -> None:
    if block < 1:
        raise ValueError(f"block: got {block}, expected a positive number of rows and columns")
    if w.ndim < 2 or 0 in w.shape:
        raise ValueError(f"{name}: got shape {tuple(w.shape)}, expected (..., N, K) with no empty dimension")


def _to_blocks(w: Tensor, block: int) -> Tensor:
    """(..., N, K) -> (..., n, b, k, b); edge blocks are filled up with zeros, which change no maximum."""
    n_rows, n_columns = w.shape[-2:]
    padded = F.pad(w, (0, -n_columns % block, 0, -n_rows % block))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))


def _from_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    """(..., n, b, k, b) -> (..., N, K), without the fill."""
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()
