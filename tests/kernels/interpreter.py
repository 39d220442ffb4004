"""Triton's CPU interpreter, corrected where it computes something else than the hardware. For tests only.

What the stock interpreter (3.6 to 3.9) gets wrong, and what is done about it here:

- float32 to float8 and bfloat16: mantissa carries, subnormals and saturation are lost, bfloat16 is truncated. Here torch
  converts: to nearest even, float8 saturating, as Hopper's instructions do. `test_interpreter.py` checks every value.
- bfloat16 operands: arithmetic runs on their raw bits. Kernels here load, convert to float32 at once and compute in
  float32; the one exception is a product of bfloat16 tiles (`tl.dot`), which is computed in float32 here.
- fused multiply-add: rounds twice. Here in extended precision, then once.
"""

import os

import numpy as np
import torch

ENABLED = os.environ.get("TRITON_INTERPRET") == "1"
TORCH = {
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "bf16": torch.bfloat16, "fp16": torch.float16,
    "fp32": torch.float32,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def convert(values: np.ndarray, source: torch.dtype, target: torch.dtype) -> np.ndarray:
    """The bits of values of one type as the bits of another."""
    x = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1).copy()).view(source)
    x = x.float() if source.itemsize < 4 else x
    if target.itemsize == 1:
        x = x.clamp(-torch.finfo(target).max, torch.finfo(target).max)  # keeps NaN
    return x.to(target).view(torch.uint8).numpy().view(BITS[target.itemsize]).reshape(values.shape)


def install() -> None:
    """Replaces the interpreter's conversions, products and fused multiply-adds. Before the first launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle, stock = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._convert_float

    def convert_float(values, source, target, rounding):
        pair = TORCH.get(str(source)), TORCH.get(str(target))
        return stock(values, source, target, rounding) if None in pair else convert(values, *pair)

    def in_float32(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle(convert(x.data, torch.bfloat16, torch.float32).view(np.float32), tl.float32)

    def fma(self, x, y, z):
        exact = x.data.astype(np.longdouble) * y.data.astype(np.longdouble) + z.data.astype(np.longdouble)
        return handle(exact.astype(z.data.dtype), z.dtype.scalar)

    dot = builder.create_dot
    interpreter._convert_float = convert_float
    builder.create_dot = lambda self, a, b, *rest: dot(self, in_float32(a), in_float32(b), *rest)
    builder.create_fma = fma


if ENABLED:
    install()
