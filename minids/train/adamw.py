"""AdamW whose moments are BF16, as V3's [V3 section 3.3.3]: 4 bytes a weight in the place of 8.

    m = bf16(b1 m + (1 - b1) g)        v = bf16(b2 v + (1 - b2) g^2)
    w = w - lr (m_hat / (sqrt(v_hat) + eps) + decay w)            m_hat = m / (1 - b1^t),  v_hat = v / (1 - b2^t)

Everything is computed in FP32; a moment is rounded to BF16, to nearest even, when it is stored, and the update of a step
uses it before it is rounded. Rounding errs by 2^-9 of a moment at most, and a step replaces a tenth (m) or a twentieth (v)
of it, far more than that: so no change is ever lost, as it would be with b2 = 0.999, whose step changes v by a thousandth.

torch's fused AdamW wants moments of the weights' own dtype; this is a loop over weights, on CUDA with one kernel each
(minids/kernels/adamw.py).
"""

from __future__ import annotations

import torch

from minids import kernels


class BF16AdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW (arguments, groups, names of the state), but exp_avg and exp_avg_sq are bfloat16."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every weight that has a gradient; the gradients are left as they are."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: torch.Tensor, group: dict) -> None:
        state, (b1, b2), g = self.state[weight], group["betas"], weight.grad
        if not state:
            state["step"] = torch.zeros(())  # on the CPU: asking a GPU for its value would stop it
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, dtype=torch.bfloat16)
        state["step"] += 1
        t = int(state["step"])
        if kernels.uses_kernels(weight) and weight.dtype == g.dtype == torch.float32 and weight.is_contiguous():
            kernels.adamw_(weight, g.contiguous(), state["exp_avg"], state["exp_avg_sq"], step=t, lr=group["lr"],
                           betas=(b1, b2), eps=group["eps"], decay=group["weight_decay"])  # fmt: skip
            return
        g = g.to(torch.promote_types(g.dtype, torch.float32))  # FP64 of FP64 weights
        m = state["exp_avg"].to(g.dtype).lerp_(g, 1 - b1)
        v = state["exp_avg_sq"].to(g.dtype).mul_(b2).addcmul_(g, g, value=1 - b2)
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        divisor = v.div_(1 - b2**t).sqrt_().add_(group["eps"])
        weight.addcdiv_(m, divisor, value=-group["lr"] / (1 - b1**t))
