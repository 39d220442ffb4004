"""AdamW with FP32 master weights, global-norm clipping, layer-wise rates and FP16 loss scaling.

The update, for a weight w with gradient g (after clipping all gradients to a joint norm of 1.0):

    m = 0.9 m + 0.1 g        v = 0.95 v + 0.05 g^2        w = w - lr * (m_hat / (sqrt(v_hat) + 1e-8) + 0.1 w)

Why masters: BF16 keeps 8 significant bits, so an update smaller than about w / 256 rounds back to w: a
good part of them at the recipe's peak rate, nearly all at the rates it ends with. The optimizer therefore owns an FP32
copy of every weight, adds the gradients of all micro-batches in FP32, updates the copy, and rounds it into the model.
In an FP32 model the weight is its own master and nothing is copied.

Why loss scaling: FP16 has no numbers below 6e-8, where many gradients live. The loss is multiplied by a power of two
S before the backward pass and the gradients are divided by S in FP32 (exact, both ways). S is halved when a gradient
overflows and doubled after `growth_interval` steps without one. BF16 has FP32's range and needs none of it.

What decays: every tensor of two or more dimensions (projections, experts, gate, embedding, head); the gains of
RMSNorm do not, since decay would pull them from 1 to 0 and only rescale what follows. The report gives the rate and
not the list; this is the common choice. The balancing bias is a buffer: no gradient, no decay.

Moments are FP32, or BF16 as V3's (`moments`, see minids/train/adamw.py). Simplification: nothing is sharded.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), sections 3.3.3 and 4.2.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minids.train.adamw import BF16AdamW

MIN_SCALE = 1.0
MAX_SCALE = 2.0**24
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FULL = (torch.float32, torch.float64)  # weights of these are their own masters


@dataclass
class OptimConfig:
    """The published AdamW, and switches for what people try beside it."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of all matrices (not of the RMSNorm gains)."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    layer_decay: float = 1.0
    """Layer-wise learning rates: layer i of L gets lr * layer_decay^(L - 1 - i), the embedding that of layer 0."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What AdamW's two moments are stored in (V3: bf16)."""
    loss_scaling: bool = True
    """Dynamic loss scaling; acts with --precision fp16 only."""
    scale_init: float = 65536.0
    """First loss scale."""
    growth_interval: int = 200
    """Steps without overflow after which the loss scale doubles."""

    def __post_init__(self) -> None:
        rules = {"beta1": (0 <= self.beta1 < 1, "in [0, 1)"), "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
                 "eps": (self.eps > 0, "> 0"), "weight_decay": (self.weight_decay >= 0, ">= 0"),
                 "clip": (self.clip >= 0, ">= 0 (0: off)"), "moments": (self.moments in MOMENTS, "fp32 or bf16"),
                 "layer_decay": (0 < self.layer_decay <= 1, "in (0, 1]"),
                 "scale_init": (MIN_SCALE <= self.scale_init <= MAX_SCALE, f"in [{MIN_SCALE}, {MAX_SCALE}]"),
                 "growth_interval": (self.growth_interval >= 1, ">= 1")}
        for name, (good, allowed) in rules.items():
            if not good:
                raise ValueError(f"OptimConfig.{name} = {getattr(self, name)!r}: must be {allowed}")


def layer_factor(name: str, layers: int, decay: float) -> float:
    """Learning-rate factor of the parameter `name` in a model of `layers` main layers: 1 for head, final norm and MTP."""
    if name.startswith("model.embed_tokens"):
        depth = 0
    elif match := re.match(r"model\.layers\.(\d+)\.", name):
        depth = min(int(match[1]), layers - 1)
    else:
        depth = layers - 1
    return decay ** (layers - 1 - depth)


class LossScaler:
    """Dynamic loss scale S; with `enabled` False it is 1 and never moves."""

    def __init__(self, enabled: bool, init: float, growth_interval: int) -> None:
        self.enabled, self.growth_interval = enabled, growth_interval
        self.scale = init if enabled else 1.0
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        """Halve after an overflow, double after `growth_interval` good steps in a row."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale = max(self.scale / 2, MIN_SCALE)
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = min(self.scale * 2, MAX_SCALE), 0


class Optimizer:
    """AdamW over the parameters of `model` (FP32, FP64, BF16 or FP16); parameters of one tensor tied twice count once.

    A step is: `(optimizer.scale * loss).backward(); optimizer.accumulate()` for every micro-batch, then
    `optimizer.step(lr)`. `step` applies nothing and returns False when a gradient is not finite.
    """

    def __init__(self, model: nn.Module, config: OptimConfig | None = None, layers: int = 1) -> None:
        """`layers`: main layers of the model, used by `layer_decay` alone."""
        self.config = config or OptimConfig()
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("Optimizer: the model has no parameter that requires a gradient")
        self.masters = {n: p if p.dtype in FULL else nn.Parameter(p.detach().float())
                        for n, p in self.params.items()}
        half = any(p.dtype == torch.float16 for p in self.params.values())
        self.scaler = LossScaler(half and self.config.loss_scaling, self.config.scale_init,
                                 self.config.growth_interval)
        groups: dict[tuple[float, float], list[str]] = {}
        for name, p in self.params.items():
            key = (self.config.weight_decay if p.ndim >= 2 else 0.0,
                   layer_factor(name, layers, self.config.layer_decay))
            groups.setdefault(key, []).append(name)
        parts = [{"params": [self.masters[n] for n in names], "weight_decay": decay, "factor": factor}
                 for (decay, factor), names in groups.items()]
        settings = {"lr": 0.0, "betas": (self.config.beta1, self.config.beta2), "eps": self.config.eps}
        half_moments = self.config.moments == "bf16"
        self.adamw = BF16AdamW(parts, **settings) if half_moments else torch.optim.AdamW(parts, **settings, fused=True)
        self.grad_norm = 0.0

    @property
    def owns_gradients(self) -> bool:
        """Whether backward's gradients are those of the masters, so that backward itself may add them up."""
        return all(self.masters[name] is p for name, p in self.params.items())

    @property
    def scale(self) -> float:
        """Factor of the loss before `backward`."""
        return self.scaler.scale

    def accumulate(self) -> None:
        """After each backward pass: move low-precision gradients into the FP32 sum of the masters."""
        for name, p in self.params.items():
            master = self.masters[name]
            if master is p or p.grad is None:
                continue
            grad, p.grad = p.grad.float(), None
            master.grad = grad if master.grad is None else master.grad.add_(grad)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.params.values(), *self.masters.values()):
            tensor.grad = None

    def step(self, lr: float, apply: bool = True) -> bool:
        """Unscale, clip and update at rate `lr`; clears the gradients. Returns whether the weights moved.

        With `apply` False (the loss was not finite) or a non-finite gradient norm, weights and moments keep every bit;
        only the loss scale reacts. `grad_norm` holds the norm before clipping (nan or inf when it was bad).
        """
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        if not grads:
            raise RuntimeError("Optimizer.step: no gradient; call backward and accumulate() first")
        if self.scale != 1.0:
            torch._foreach_mul_(grads, 1.0 / self.scale)
        norm = self.total_norm()
        self.grad_norm = float(norm)
        good = apply and math.isfinite(self.grad_norm)
        if good:
            if self.config.clip:
                nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.clip, norm)
            for group in self.adamw.param_groups:
                group["lr"] = lr * group["factor"]
            self.adamw.step()
            self._write_back()
        self.scaler.update(overflow=not good)
        self.zero_grad()
        return good

    def moments_of(self, name: str) -> torch.dtype:
        """The dtype of a parameter's moments: its master's, or bfloat16."""
        dtype = self.params[name].dtype
        return torch.bfloat16 if self.config.moments == "bf16" else dtype if dtype in FULL else torch.float32

    def total_norm(self) -> Tensor:
        """Norm of all gradients together; where parameters are spread over ranks, a subclass sums over those."""
        return nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, p in self.params.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors for safetensors, values for JSON): everything that `load_state` needs."""
        tensors = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state[master].items():
                tensors[f"{key}/{name}"] = value
            if master is not self.params[name]:
                tensors[f"master/{name}"] = master.detach()
        return tensors, {"scale": self.scaler.scale, "good_steps": self.scaler.good_steps}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], values: dict) -> None:
        """Take over what `state` returned, bit for bit; the model's own weights are loaded elsewhere."""
        moments = [f"{key}/{n}" for n in self.masters for key in ("step", "exp_avg", "exp_avg_sq")]
        wanted = {f"master/{n}" for n, m in self.masters.items() if m is not self.params[n]}
        # A checkpoint made before the first step, or a parameter that never had a gradient, has no moments.
        unknown = tensors.keys() - wanted - set(moments)
        missing = wanted - tensors.keys()
        if unknown or missing:
            raise ValueError(f"optimizer state does not fit the model: missing {sorted(missing)}, "
                             f"unexpected {sorted(unknown)}")
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            expected = self.moments_of(name) if kind.startswith("exp_avg") else torch.float32
            if tensor.dtype != expected:
                raise ValueError(f"optimizer state {key}: got dtype {tensor.dtype}, expected {expected}, since "
                                 f"OptimConfig.moments = {self.config.moments!r}")
        for name, master in self.masters.items():
            device = master.device
            if f"master/{name}" in wanted:
                master.copy_(tensors[f"master/{name}"])
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors]
            on_cpu = {"step"} if isinstance(self.adamw, BF16AdamW) else set()
            self.adamw.state[master] = {
                k: tensors[f"{k}/{name}"].to("cpu" if k in on_cpu else device, copy=True) for k in keys}
            if not keys:
                del self.adamw.state[master]
        self.scaler.scale, self.scaler.good_steps = float(values["scale"]), int(values["good_steps"])
