"""Slow references for FP8 layers: groups by explicit loops, sums in float64, error bounds from the format."""

import torch

MAX = 448.0


def quantize_loops(x, rows, columns, power_of_two=False):
    """(dequantised x, scale of each number), by loops over groups and torch's own cast; float64 of float32 numbers."""
    values, scales = torch.empty_like(x), torch.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns]
            largest = part.abs().max()
            scale = largest / torch.tensor(MAX) if largest > 0 else torch.tensor(1.0)
            if power_of_two and largest > 0:
                scale = 2.0 ** torch.ceil(torch.log2(largest.double() / MAX)).float()
            q = (part / scale).clamp(-MAX, MAX).to(torch.float8_e4m3fn).float()
            values[i : i + rows, j : j + columns], scales[i : i + rows, j : j + columns] = q * scale, scale
    return values, scales


def rounding(x, scale):
    """The largest error of E4M3 at x: half a unit in the last place, or of the subnormals', and FP32's of two steps."""
    return torch.maximum(2.0**-4 * x.abs(), 2.0**-10 * scale) * (1 + 2.0**-20)


def group_scale(x, rows, columns, factor=1.0):
    """An upper bound of the scale of each number's group; ``factor`` 2 for powers of two, rounded up."""
    padded = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    groups = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    amax = groups.amax((1, 3)).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return factor * amax[: x.shape[0], : x.shape[1]] / MAX


def once(x, rows, columns, factor=1.0):
    """Bound of |x - quantised x|, elementwise."""
    return rounding(x, group_scale(x, rows, columns, factor))


def product_bound(a, ea, b, eb):
    """|a b - a' b'| where |a - a'| <= ea and |b - b'| <= eb, and FP32's own rounding of sums of K terms."""
    a, b = a.abs(), b.abs()
    fp32 = (a.shape[1] + 4) * 2.0**-23
    return ea @ b + a @ eb + ea @ eb + fp32 * (a + ea) @ (b + eb)
