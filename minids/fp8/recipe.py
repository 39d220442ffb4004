"""Which numbers of a training step are FP8, and how they are scaled: V3's recipe and what it is compared with.

    name           groups of one scale                            scales          sums of a product
    v3             1 x 128 activations, 128 x 128 weights         FP32            promoted to FP32 every 128 products
    v3_ue8m0       the same                                       powers of two   the same: V3.1
    tensor         one a tensor (one an expert, one a batch)      FP32            FP32
    no_promotion   one a tensor                                   FP32            in the tensor core's 14 bits to the end
    mx             1 x 32 along the sum, in both operands         powers of two   FP32

Without promotion there is one place to apply a scale, behind the whole sum: so `no_promotion` has a scale a tensor, and
differs from `tensor` in the sum alone. In `mx` a weight and an activation are quantised twice, along each of the two
directions in which products sum over them; V3's square weight blocks serve both.

Two engines compute the same recipe. *simulated* dequantises and multiplies in FP32 (BF16 on CUDA), on any device; it is
the specification of *real*, which hands q and scales to FP8 tensor cores.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), sections 3.3.1 to 3.3.3; MX: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SCALINGS = ("block", "tensor", "mx")
ENGINES = ("auto", "simulated", "real")
MX_BLOCK = 32


@dataclass(frozen=True)
class Fp8Recipe:
    """One way to train in FP8; `Fp8Recipe.named` has those of the table."""

    name: str = "v3"
    scaling: str = "block"
    """block (V3's tiles and blocks), tensor or mx."""
    scale: str = "fp32"
    """fp32, or ue8m0 for powers of two."""
    block: int = 128
    """Side of a group with scaling=block."""
    bits: int | None = None
    """Simulated accumulator of so many bits (Hopper: 14), cut every 32 products; None: FP32. Simulated only, slow."""
    promote_every: int | None = 128
    """Products after which such an accumulator is added to FP32; None: never."""
    engine: str = "auto"
    """auto: real where the device has the tensor cores for it; simulated; real: an error where it cannot run."""
    recompute: bool = True
    """Keep what V3 keeps: norms and MLA's up-projections are computed again in backward [V3 3.2.3]."""

    def __post_init__(self) -> None:
        allowed = {"scaling": SCALINGS, "scale": ("fp32", "ue8m0"), "engine": ENGINES}
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"Fp8Recipe.{field} = {getattr(self, field)!r}: must be one of {', '.join(values)}")
        for field in ("block", "bits", "promote_every"):
            value = getattr(self, field)
            if not (value is None and field != "block") and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"Fp8Recipe.{field} = {value!r}: must be a positive integer"
                                 + ("" if field == "block" else " or None"))  # fmt: skip
        if self.scaling == "mx" and self.bits:
            raise ValueError(f"Fp8Recipe.bits = {self.bits!r} with scaling = 'mx': must be None")
        if self.engine == "real" and self.scaling == "mx":
            raise ValueError("Fp8Recipe.engine = 'real' with scaling = 'mx': must be simulated, no kernel reads MX blocks")
        if self.scaling == "block" and self.bits and self.promote_every != self.block:
            raise ValueError(f"Fp8Recipe.promote_every = {self.promote_every!r}: must be block = {self.block} with scaling "
                             "= 'block': scales are applied where partial sums are promoted")  # fmt: skip

    @classmethod
    def named(cls, name: str | Fp8Recipe, **changes) -> Fp8Recipe:
        """The recipe of that name, with fields replaced by ``changes``; a recipe passes through. ValueError: no such
        name."""
        if isinstance(name, Fp8Recipe):
            return replace(name, **changes)
        if name not in RECIPES:
            raise ValueError(f"fp8 = {name!r}: must be one of {', '.join(RECIPES)}")
        return replace(RECIPES[name], **changes)

    def is_real(self, device: torch.device) -> bool:
        """Whether tensor cores compute the products of tensors on ``device``. RuntimeError: asked for, but impossible."""
        if self.engine == "simulated" or self.scaling == "mx":
            return False
        able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        if self.engine == "real" and not able:
            raise RuntimeError(f"Fp8Recipe.engine = 'real' with tensors on {device}: must be a CUDA device of capability "
                               "(9, 0) or above")  # fmt: skip
        return able and (self.scaling == "block" or self.bits is not None)


RECIPES = {
    "v3": Fp8Recipe("v3"),
    "v3_ue8m0": Fp8Recipe("v3_ue8m0", scale="ue8m0"),
    "tensor": Fp8Recipe("tensor", scaling="tensor", promote_every=None),
    "no_promotion": Fp8Recipe("no_promotion", scaling="tensor", bits=14, promote_every=None),
    "mx": Fp8Recipe("mx", scaling="mx", scale="ue8m0", promote_every=None),
}
