"""The tensor core's accumulator, simulated: 14 bits, and promotion to FP32 (V3 sections 3.3.2 and 3.5.2, figure 7b).

The problem: a product of two E4M3 numbers has at most 8 significant bits, so multiplying is exact; adding is not. What
Hopper does with FP8, in V3's words and those of "Insights into DeepSeek-V3" (section 3.1.1): one WGMMA step takes 32
products, shifts their mantissas right until all have the largest one's exponent, keeps 13 fraction bits of each (14 with
the leading one), cuts off the rest and adds. The sums are collected in registers of the same width: 1 sign bit, 8
exponent bits, 13 fraction bits (FP22). For products p_i of one step

    u = 2^(max_i exponent(p_i) - (bits - 1))        acc = cut(acc + sum_i u * trunc(p_i / u))

where trunc goes towards zero and cut keeps the leading `bits` bits, towards zero too. So every step loses up to one part
in 2^13 of the accumulator and, while the sum keeps its sign, always on the same side: errors do not average out, they
grow with the number of steps.

Is the accumulator itself one of the numbers that are aligned? The papers do not say. It is, by default:
`shared_alignment=True` takes acc into the maximum, so that beside a large sum all 32 products are cut at *its* last bit.
False takes the words literally: products among themselves. An H200 was asked (`python -m minids.bench kernel_ladder`,
figures/bench/kernel_ladder.json): sums of K products of E4M3 numbers from 0 to 1 come out too small, in the mean, by

    K                                   512      1024     2048     4096      promoted every 128
    H200                                0.516%   1.34%    3.09%    6.60%     0.050%
    shared_alignment=True               0.513%   1.33%    3.10%    6.61%     0.050%
    shared_alignment=False              0.035%   0.068%   0.133%   0.265%    0.011%

For normal matrices, whose sums change sign, the two differ little: at K = 4096 the largest error is 1.4 to 1.9% and 1.4 to
1.5% of the root mean square result. V3 reports "a maximum relative error of nearly 2%" of random matrices with K = 4096,
without saying of what; it fits both.

What to expect. A cut loses half a unit in the mean, 0.36 * 2^-13 of acc, and acc grows to its final value step by step.
One cut a step (False): K / 32 * 0.18 * 2^-13 = 0.28% of a result of positive numbers, K = 4096. With shared alignment 32
products lose as much each: up to 33 times that, and less where products have no bits below the sum's last one.

The repair: every N_C = 128 numbers of K, that is after 4 steps, the partial sum goes to an FP32 register of the CUDA
cores and the accumulator starts at zero. Then 4 steps err, whatever K is, and FP32 adds the rest. It is also the moment
at which scales of 1 x 128 tiles can be applied, since they differ from one stretch of 128 to the next.

Simplifications. V3 does not say how the hardware adds 32 products inside (in what order, with what carry bits); here that
sum is exact once the terms are cut. Exponents are those of the values, not of unnormalised mantissas.

Shapes: M rows, N columns, K summed; k = K / promote_every scales along K.
"""

import torch
from torch import Tensor

from minids.fp8.formats import floor_power_of_two

BITS = 14  # Hopper, with the leading one
PROMOTE_EVERY = 128  # N_C
GROUP = 32  # products that one WGMMA instruction adds
EXACT_BITS = 17  # up to here the sum of 32 products cut to the largest's unit, each below 4 * 2^bits, is exact in FP32
TINY = 2.0**-100  # far below any product of scaled FP8 numbers, far above what FP32 can divide by


def matmul(
    a: Tensor, b: Tensor, *, bits: int | None = BITS, promote_every: int | None = PROMOTE_EVERY,
    a_scale: Tensor | None = None, b_scale: Tensor | None = None, group: int = GROUP, shared_alignment: bool = True,
) -> Tensor:  # fmt: skip
    """a @ b as the tensor core adds it up.

    Args:
        a: (M, K), b: (K, N): numbers of FP8 formats in any floating-point dtype.
        bits: significant bits of the accumulator, 2 to 17; None adds in FP32.
        promote_every: N_C, a multiple of group: numbers of K after which the sum goes to FP32; None: never.
        a_scale: (M, k), b_scale: (k, N), or broadcastable to these: multipliers of each stretch of promote_every numbers,
            applied as it is promoted. Without promotion no hardware can apply them; then k must be 1.
        group: products added at once.
        shared_alignment: whether the running sum is aligned with the products, as an H200 does, or they without it.

    Returns:
        (M, N) float32.

    Raises:
        TypeError, ValueError: operands that are no matrices of one K, non-finite operands, arguments out of range.
    """
    _check(a, b, bits, promote_every, group)
    a, b = a.float(), b.float()
    stretch = promote_every or a.shape[1]
    n = -(-a.shape[1] // stretch)
    a_scale = _scale("a_scale", a_scale, (a.shape[0], n), a.device)
    b_scale = _scale("b_scale", b_scale, (n, b.shape[1]), a.device)
    total = torch.zeros(a.shape[0], b.shape[1], device=a.device)
    for i in range(n):
        part = slice(i * stretch, (i + 1) * stretch)
        sums = a[:, part] @ b[part] if bits is None else _tensor_core(a[:, part], b[part], bits, group, shared_alignment)
        total += sums * a_scale[:, i, None] * b_scale[i]
    return total


def error_bound(k: int, bits: int = BITS, promote_every: int | None = PROMOTE_EVERY, group: int = GROUP,
                shared_alignment: bool = True) -> float:  # fmt: skip
    """Largest error of a sum of k products, in units of |a| @ |b|; FP32's own error is left out.

    With n steps: collecting loses n 2^-(bits - 1) at most. Products aligned among themselves lose group 2^-(bits - 1) in
    all, since the steps' largest add up to |a| @ |b| at most: (n + group) 2^-(bits - 1), 1.6% + 0.4% for K = 4096. Aligned
    to the sum they may lose that in every step, and the sum once more: (n + n group + 1) 2^-(bits - 1), far from what
    happens.
    """
    n = -(-min(k, promote_every or k) // group)
    return (n + (n * group + 1 if shared_alignment else group)) * 2.0 ** -(bits - 1)


def _tensor_core(a: Tensor, b: Tensor, bits: int, group: int, shared_alignment: bool) -> Tensor:
    """One run of the accumulator from zero to the end of K."""
    acc = torch.zeros(a.shape[0], b.shape[1], device=a.device)
    a_exponent, b_exponent = floor_power_of_two(a), floor_power_of_two(b)
    for k in range(0, a.shape[1], group):
        part = slice(k, k + group)
        products = a[:, part].T[:, :, None] * b[part, None, :]
        largest = (a_exponent[:, part].T[:, :, None] * b_exponent[part, None, :]).amax(0)
        if shared_alignment:
            largest = torch.maximum(largest, floor_power_of_two(acc))
        unit = (largest * 2.0 ** (1 - bits)).clamp_(min=TINY)
        sums = products.div_(unit).trunc_().sum(0).mul_(unit).double()
        if shared_alignment:
            acc = (acc / unit).trunc_().mul_(unit)
        acc = _cut(acc + sums, bits).float()
    return acc


def _cut(x: Tensor, bits: int) -> Tensor:
    """The leading `bits` bits of x (float64, so that acc + sums was exact), the rest dropped."""
    unit = (floor_power_of_two(x) * 2.0 ** (1 - bits)).clamp_(min=TINY)
    return (x / unit).trunc_().mul_(unit)


def _scale(name: str, scale: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    if scale is None:
        return torch.ones(1, 1, device=device).expand(shape)
    if scale.ndim != 2 or any(got not in (1, side) for got, side in zip(scale.shape, shape, strict=True)):
        raise ValueError(f"{name}: got shape {tuple(scale.shape)}, expected {shape}, or 1 in place of a side")
    return scale.float().expand(shape)


def _check(a: Tensor, b: Tensor, bits: int | None, promote_every: int | None, group: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (M, K) and (K, N), none empty")
    for name, x in (("a", a), ("b", b)):
        if not x.is_floating_point():
            raise TypeError(f"{name}: got dtype {x.dtype}, expected a floating-point matrix")
        if not torch.isfinite(x.float()).all():
            raise ValueError(f"{name}: holds NaN or infinity, expected finite numbers")
    for name, value in (("bits", bits), ("promote_every", promote_every), ("group", group)):
        if not (isinstance(value, int) or (value is None and name != "group")):
            raise TypeError(f"{name}: got {value!r}, expected an integer" + (" or None" if name != "group" else ""))
    if bits is not None and not 2 <= bits <= EXACT_BITS:
        raise ValueError(f"bits: got {bits}, expected 2 to {EXACT_BITS}, or None for FP32")
    if not 1 <= group <= GROUP:
        raise ValueError(f"group: got {group}, expected 1 to {GROUP} products")
    if promote_every is not None and (promote_every < 1 or promote_every % group):
        raise ValueError(f"promote_every: got {promote_every}, expected a multiple of group = {group}, or None")
