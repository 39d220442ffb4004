"""MLA as V3 trains it: the up-projections, and the norms before them, are computed again in backward (V3 section 3.2.3).

Attention's backward reads q, k and v: H (2 (N + R) + V) numbers a token, 65 thousand in V3. They are made from the
compressed query and the latent, Q + C + R = 2112 numbers, by two products. So only those are kept, and q, k and v are made
again when attention's backward asks autograd for them.

On CUDA that is a hook on what autograd keeps: the fused attention's own node keeps its output and a statistic a row, and a
note in the place of each of q, k and v. (torch.utils.checkpoint with a policy a operation does the same; but it looks at
every operation in Python, which took longer than the operations.) On a CPU attention runs again too, whose written-out
form has no part that could be left out: that is a plain checkpoint.

The layer is `MLA`; this class only says where the part to be computed again begins and ends.

Shapes: B rows, T tokens, D hidden, H heads, N/R/V head dims, C latent, Q query rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from minids.fp8.recipe import Fp8Recipe
from minids.fp8.saved import under_this_autocast
from minids.model.attention import MLA, LatentCache

HEADS: ContextVar[Heads | None] = ContextVar("HEADS", default=None)  # of the layer that runs in this thread


class Heads:
    """q, k and v of one forward pass, made again by ``again`` when backward asks for them, once for all three."""

    def __init__(self, again: Callable[[], tuple[Tensor, ...]]):
        self.again, self.collecting, self.places, self.made = again, False, {}, {}

    def note(self, *heads: Tensor) -> None:
        self.places = {(t.data_ptr(), t.numel()): i for i, t in enumerate(heads)}

    def pack(self, tensor: Tensor) -> Tensor | tuple:
        """What is kept in the tensor's place: itself, or which of the three it is and how it lies in memory."""
        place = self.places.get((tensor.data_ptr(), tensor.numel()))
        return tensor if place is None else (place, tensor.shape, tensor.stride())

    def unpack(self, kept: Tensor | tuple) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        place, shape, stride = kept
        if place not in self.made:
            self.collecting, token = True, HEADS.set(self)
            try:
                self.made = dict(enumerate(self.again()))
            finally:
                self.collecting = False
                HEADS.reset(token)
        return self.made.pop(place).as_strided(shape, stride)


class Fp8MLA(MLA):
    """An `MLA` whose children were replaced by FP8 layers."""

    @classmethod
    def of(cls, attention: MLA, recipe: str | Fp8Recipe = "v3") -> Fp8MLA:
        """On the very parameters of ``attention``."""
        found = cls.__new__(cls)
        super(MLA, found).__init__()
        found.cfg, found.scale, found.recipe = attention.cfg, attention.scale, Fp8Recipe.named(recipe)
        for name, child in attention.named_children():
            setattr(found, name, child)
        return found.train(attention.training)

    def core(self, low_BTq: Tensor, joint_BTc: Tensor, rope: Tensor, mask: Tensor | None, cache: LatentCache | None = None,
             layer: int = 0, positions: Tensor | None = None, absorb: bool = False) -> Tensor:  # fmt: skip
        """From the compressed query and latent to attention's output, (B, T, H * V)."""
        rest = (rope, mask, cache, layer, positions, absorb)
        if cache is not None or not self.recipe.recompute or not torch.is_grad_enabled():
            return super().core(low_BTq, joint_BTc, *rest)
        if not is_fused(low_BTq):
            return checkpoint(super().core, low_BTq, joint_BTc, *rest, use_reentrant=False, preserve_rng_state=False)
        low, joint, core = low_BTq.detach(), joint_BTc.detach(), under_this_autocast(super().core, low_BTq.device.type)
        token = HEADS.set(Heads(lambda: tuple(t.detach() for t in core(low, joint, *rest))))
        try:
            return super().core(low_BTq, joint_BTc, *rest)
        finally:
            HEADS.reset(token)

    def attend(self, q_BTHn: Tensor, k_BSHn: Tensor, v_BSHv: Tensor, mask: Tensor | None) -> Tensor:
        heads = HEADS.get()
        if heads is None:
            return super().attend(q_BTHn, k_BSHn, v_BSHv, mask)
        if heads.collecting:
            return q_BTHn, k_BSHn, v_BSHv
        heads.note(q_BTHn, k_BSHn, v_BSHv)
        with saved_tensors_hooks(heads.pack, heads.unpack):
            return super().attend(q_BTHn, k_BSHn, v_BSHv, mask)


def is_fused(x: Tensor) -> bool:
    """Whether attention is one operation, which keeps its inputs, its output and little else."""
    return x.is_cuda
