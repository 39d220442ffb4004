"""Inputs that a kernel may meet: outliers, zeros, subnormal and enormous tiles; and the distance to a reference."""

import torch
from torch import Tensor


def hard(rows: int, columns: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Random numbers whose tiles differ by many magnitudes, with outliers, zeros of both signs, a row of zeros, tiles of
    subnormal numbers, of the smallest normal ones and of the largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp(4 * torch.randn(rows, -(-columns // 128), generator=generator)).repeat_interleave(128, 1)[:, :columns]
    x[torch.rand(rows, columns, generator=generator) < 0.02] *= 100
    x[torch.rand(rows, columns, generator=generator) < 0.02] = 0.0
    x[torch.rand(rows, columns, generator=generator) < 0.02] = -0.0
    x[0] = 0
    if rows > 1:
        x[1, :128] = x[1, :128].clamp(-4, 4) * 1e-39
        x[3::5, :128] = x[3::5, :128].clamp(-4, 4) * 1e-36
    if rows > 2:
        x[2, :128] = x[2, :128].sign() * (3e38 if dtype != torch.float16 else 6e4)
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).to(device)


def tame(rows: int, columns: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers with a few outliers, for products that stay finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[torch.rand(rows, columns, generator=generator) < 0.01] *= 50
    return x.to(dtype).to(device)


def error(out: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what was expected; NaN fails every comparison."""
    out, expected = out.double(), expected.double()
    return ((out - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and type hold the same bits."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(views[a.itemsize]), b.view(views[b.itemsize]))
