"""What an FP8 layer keeps between forward and backward, handed to autograd so that it is counted, moved and freed as
any other saved tensor (checkpointing and saved-tensor hooks see nothing else).

An input x is kept in one of three ways:

    FP8            q and scales of the operand that Fprop used: one byte a number         linears
    E5M6           12 bits a number, powers of two for scales                             o_proj [V3 3.3.3]
    recomputed     nothing but the input of the norm that made x, which the norm keeps    behind an RMSNorm [V3 3.2.3]

Backward gets the operand of Fprop back from the first and the third, bit for bit the same: recomputing changes memory
and time, never a result. Layers that read one x (q_a_proj and kv_a_proj_with_mqa; the experts, routed and shared) have one
`Again`: the first that backward comes to makes x again, and what it makes of x the others find there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minids.fp8.operands import Kept12, Operand


def save(ctx: Any, *kept: Operand | Kept12 | Tensor | None) -> None:
    """Saves the tensors of what is given; `restore` returns it in the same order."""
    tensors, ctx.kept = [], []
    for item in kept:
        fields = item._asdict() if isinstance(item, Operand | Kept12) else {"tensor": item}
        own = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in fields.items() if name not in own}
        ctx.kept.append((type(item) if rest or len(own) > 1 else None, tuple(own), rest))
        tensors += own.values()
    ctx.save_for_backward(*tensors)


def restore(ctx: Any) -> list:
    """What `save` was given. Raises RuntimeError, as torch does, if it has been freed."""
    tensors, found = iter(ctx.saved_tensors), []
    for kind, names, rest in ctx.kept:
        own = {name: next(tensors) for name in names}
        found.append(own.get("tensor") if kind in (None, type(None)) else kind(**own, **rest))
    return found


class Again:
    """Makes x = function(tensor) again, once a backward pass for all the layers that read x. It keeps no tensor meanwhile:
    each layer hands in what it has kept."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function, self.readers, self.left, self.made = function, 0, 0, {}

    def __call__(self, tensor: Tensor, make: Callable[[Tensor], Any] | None = None, name: Any = None) -> Any:
        """x, or make(x): once for all that ask for the same ``name``. A layer asks once a backward pass; when the last one
        has, everything is forgotten."""
        if not self.made:
            self.left, self.made = self.readers, {None: self.function(tensor)}
        if name not in self.made:
            self.made[name] = make(self.made[None])
        found, self.left = self.made[name], self.left - 1
        if self.left <= 0:
            self.made = {}
        return found


class Source(NamedTuple):
    """x = again(tensor)."""

    again: Again
    tensor: Tensor

    def read(self) -> Tensor:
        """What one more layer keeps of x."""
        self.again.readers += 1
        return self.tensor


def under_this_autocast(function: Callable, device: str) -> Callable:
    """The function as it would run here and now: backward has another thread, which knows nothing of autocast. Gradients
    are on, as they were, since that may choose another way to compute the same."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def again(*args):
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
            return function(*args)

    return again


def mark_recomputable(x: Tensor, function: Callable[[Tensor], Tensor], source: Tensor) -> None:
    """Says that x = function(source), so that a layer may keep ``source`` in the place of x."""
    again = under_this_autocast(function, source.device.type)
    x.fp8_source = Source(Again(lambda tensor: again(tensor).detach()), source.detach())


def source_of(x: Tensor) -> Source | None:
    """What `mark_recomputable` said of x; nothing where no backward will follow."""
    return getattr(x, "fp8_source", None) if torch.is_grad_enabled() else None
