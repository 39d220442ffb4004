"""AdamW in one pass against torch's own in FP64, and against the optimizer's written-out form."""

import pytest
import torch
from numbers_ import error

from minids.kernels import adamw_
from minids.train.adamw import BF16AdamW

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}


def case(device, shape=(7, 300)):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator)
    gradients = [torch.randn(*shape, generator=generator) * scale for scale in (1.0, 1e-3, 30.0)]
    return weight.to(device), [g.to(device) for g in gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_steps_are_torchs(where, dtype):
    """With BF16 moments each stored moment is off by 2^-9 of itself at most, and so are the next updates."""
    backend, device = where
    weight, gradients = case(device)
    exact = weight.double().requires_grad_()
    optimizer = torch.optim.AdamW([exact], weight_decay=0.1, **SETTINGS)
    start, m, v = weight.clone(), torch.zeros_like(weight, dtype=dtype), torch.zeros_like(weight, dtype=dtype)
    for step, gradient in enumerate(gradients, start=1):
        adamw_(weight, gradient, m, v, step=step, decay=0.1, backend=backend, **SETTINGS)
        exact.grad = gradient.double()
        optimizer.step()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2  # of the change, which is 1e-3 of the weights
    assert error(weight - start, exact.detach() - start.double()) < tolerance
    state = optimizer.state[exact]
    assert error(m, state["exp_avg"]) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert error(v, state["exp_avg_sq"]) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_the_optimizer_uses_it(kernel, monkeypatch):
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MINIDS_KERNELS", backend)
        weight, gradients = case(kernel)
        weight.requires_grad_()
        optimizer = BF16AdamW([{"params": [weight], "weight_decay": 0.1}], **SETTINGS)
        for gradient in gradients:
            version, weight.grad = weight._version, gradient
            optimizer.step()
            assert weight._version > version  # what is kept of a weight must learn that it changed
        found.append((weight.detach(), optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and error(a, b) < (1e-6 if a.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("change, exception, message", [
    ({"weight": torch.zeros(3).bfloat16()}, TypeError, "weight: got dtype torch.bfloat16, expected torch.float32"),
    ({"m": torch.zeros(3, dtype=torch.float16)}, TypeError, "m: got dtype torch.float16"),
    ({"gradient": torch.zeros(4)}, ValueError, r"gradient: got shape \(4,\), expected \(3,\)"),
    ({"v": torch.zeros(6)[::2]}, ValueError, r"v: got strides \(2,\)"),
    ({"step": 0}, ValueError, "step: got 0"),
])  # fmt: skip
def test_bad_input(change, exception, message):
    good = {name: torch.zeros(3) for name in ("weight", "gradient", "m", "v")} | {"step": 1, "decay": 0.1, **SETTINGS}
    with pytest.raises(exception, match=message):
        adamw_(**{**good, **change})


def test_registered(kernel):
    weight, (gradient, *_) = case(kernel)
    args = (weight, gradient, torch.zeros_like(weight), torch.zeros_like(weight), 0.1, 0.95, 0.05, 1.0, 1e-3, 0.05, 1e-8)
    torch.library.opcheck(torch.ops.minids.adamw_.default, args, test_utils=("test_schema", "test_faketensor"))
