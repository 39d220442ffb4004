"""Every public kernel once, on sizes that are no multiples of anything, for memory checkers:

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/kernels/sanitize.py quantize_tile_t

Names after the command choose some; without any, all run. `test_sanitize.py` runs the same calls in the interpreter.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from minids import kernels

BF16 = torch.bfloat16


def calls(device: str) -> dict[str, Callable[[], object]]:
    """A call of each of `minids.kernels`' functions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    def ends(*rows: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=device)

    indices = torch.randint(0, 4, (37, 2), generator=generator).to(device)
    return {
        "quantize_tile": lambda: [kernels.quantize_tile(normal(37, 300), column_major=c) for c in (False, True)],
        "quantize_tile_t": lambda: [kernels.quantize_tile_t(normal(37, k)) for k in (256, 300)],
        "quantize_tile_both": lambda: [kernels.quantize_tile_both(normal(133, k), column_major=True) for k in (256, 304)],
        "quantize_block": lambda: kernels.quantize_block(normal(200, 304)),
        "dequantize_block": lambda: kernels.dequantize_block(*kernels.quantize_block(normal(200, 304))),
        "fp8_gemm": lambda: fp8_products(normal),
        "grouped_gemm": lambda: grouped_products(normal, ends(0, 70, 70, 133)),
        "grouped_wgrad": lambda: kernels.grouped_wgrad(normal(133, 136), normal(133, 72), ends(0, 70, 70, 133)),
        "grouped_fp8_gemm": lambda: kernels.grouped_fp8_gemm(
            *kernels.quantize_tile(normal(256, 144)), *kernels.quantize_block(normal(3, 200, 144)), ends(0, 128, 256)
        ),
        "grouped_fp8_wgrad": lambda: [
            kernels.grouped_fp8_wgrad(normal(256, n), normal(256, 144), ends(0, 128, 256)) for n in (200, 256)
        ],
        "swiglu": lambda: backward(kernels.swiglu, normal(37, 600).requires_grad_(), normal(37, dtype=torch.float32)),
        "swiglu_quantize": lambda: kernels.swiglu_quantize(normal(37, 600)),
        "combine": lambda: kernels.combine(normal(20, 300), torch.arange(20, device=device).view(5, 4)),
        "plan_slots": lambda: [kernels.plan_slots(indices, 4, multiple=m) for m in (1, 128)],
        "routed_experts": lambda: experts(normal, indices),
        "rms_norm": lambda: backward(kernels.rms_norm, normal(37, 300).requires_grad_(), torch.ones(300, device=device)),
        "rms_norm_residual": lambda: residual(normal),
        "gate_logits": lambda: backward(kernels.gate_logits, normal(37, 300).requires_grad_(), normal(64, 300)),
        "rope_heads": lambda: kernels.rope_heads(
            normal(2, 5, 3, 24), normal(2, 5, 3, 32), normal(2, 5, 8),
            torch.ones(1, 5, 4, dtype=torch.complex64, device=device),
        ),  # fmt: skip
        "router": lambda: kernels.router(
            normal(37, 64, dtype=torch.float32), torch.zeros(64, device=device), n_group=8, topk_group=4, k=8, scale=2.5
        ),
        "cross_entropy_": lambda: kernels.cross_entropy_(normal(9, 1000), torch.arange(9, device=device)),
        "linear_cross_entropy": lambda: kernels.linear_cross_entropy(
            normal(9, 24).requires_grad_(), normal(1000, 24), torch.arange(9, device=device), chunk=4
        ).backward(),
        "mla_decode": lambda: [decode(normal, device, heads) for heads in (16, 128)],
        "adamw_": lambda: update(normal),
    }


def backward(function: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> None:
    function(x, *rest).float().square().sum().backward()


def residual(normal: Callable[..., Tensor]) -> None:
    x, delta = normal(37, 300, dtype=torch.float32).requires_grad_(), normal(37, 300).requires_grad_()
    total, y = kernels.rms_norm_residual(x, delta, normal(300), out_dtype=BF16)
    (total.sum() + y.float().square().sum()).backward()


def fp8_products(normal: Callable[..., Tensor]) -> None:
    """Forward, a scale a row on both sides, K in parts, and few rows."""
    block = kernels.quantize_block(normal(200, 304))
    for rows in (37, 333):
        a = kernels.quantize_tile(normal(rows, 304), column_major=True)
        kernels.fp8_gemm(*a, *block)
        kernels.fp8_gemm(*a, *kernels.quantize_tile(normal(200, 304)), out_dtype=torch.float32)
    kernels.fp8_gemm(*kernels.quantize_tile(normal(64, 4096)), *kernels.quantize_block(normal(64, 4096)))
    if block[0].is_cuda:  # few rows, and tiles for every multiprocessor of a Hopper GPU
        a = kernels.quantize_tile(normal(121, 2048), column_major=True)
        kernels.fp8_gemm(*a, *kernels.quantize_block(normal(7104, 2048)))


def grouped_products(normal: Callable[..., Tensor], ends: Tensor) -> None:
    w = normal(4, 136, 72)
    kernels.grouped_gemm(normal(133, 72), w, ends)
    kernels.grouped_gemm(normal(133, 136), w.transpose(1, 2), ends)
    kernels.grouped_gemm(normal(133, 64), normal(4, 64, 72).transpose(1, 2), ends)  # whole blocks of 64 channels


def experts(normal: Callable[..., Tensor], indices: Tensor) -> None:
    choice, token, slot, ends = kernels.plan_slots(indices, 4)
    for width in (24, 128):  # on Hopper SwiGLU of the second is part of the product
        leaves = [normal(37, 72), normal(37, 2, dtype=torch.float32), normal(4, 2 * width, 72), normal(4, 72, width)]
        out = kernels.routed_experts(*(leaf.requires_grad_() for leaf in leaves), token, slot, ends, choice)
        out.float().square().sum().backward()


def decode(normal: Callable[..., Tensor], device: str, heads: int) -> Tensor:
    """Texts of 1, 100 and 192 tokens on 9 pages, of which the first belongs to nobody."""
    table = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([1, 100, 192], dtype=torch.int32, device=device)
    return kernels.mla_decode(normal(3, heads, 576), normal(9, 64, 576), table, lengths, rank=512, scale=192**-0.5)


def update(normal: Callable[..., Tensor]) -> None:
    weight, gradient = normal(1000, dtype=torch.float32), normal(1000, dtype=torch.float32)
    m, v = torch.zeros_like(weight, dtype=BF16), torch.zeros_like(weight, dtype=BF16)
    kernels.adamw_(weight, gradient, m, v, step=1, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.1)


def main(names: list[str]) -> None:
    every = calls("cuda")
    if unknown := sorted(set(names) - set(every)):
        raise SystemExit(f"got {', '.join(unknown)}, expected some of {', '.join(every)}")
    for name in names or every:
        every[name]()
        torch.cuda.synchronize()
        print(name, "ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
