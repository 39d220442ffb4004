"""CUDA graphs of micro-batches: the same losses and gradients as without, bit for bit; and what cannot be recorded."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minids import ModelConfig, Transformer
from minids.fp8 import to_fp8
from minids.model.balancer import Balancer
from minids.train.graph import Graphed, Recorder
from minids.train.optim import Optimizer
from minids.train.settings import TrainConfig
from minids.train.step import compute_gradients

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def model_of(precision: str, fp8: bool) -> Transformer:
    torch.manual_seed(0)
    cfg = ModelConfig.preset("toy", vocab_size=96, hidden_size=128, moe_intermediate_size=128, intermediate_size=256,
                             num_hidden_layers=3)
    model = Transformer(cfg).to("cuda", torch.bfloat16 if precision == "bf16" else torch.float32)
    return to_fp8(model, "v3") if fp8 else model


@pytest.mark.parametrize("precision, fp8", [
    pytest.param("bf16-autocast", False, marks=GPU), pytest.param("bf16", False, marks=GPU),
    pytest.param("bf16-autocast", True, marks=GPU),
])  # fmt: skip
@pytest.mark.parametrize("rows", [4, 10])
def test_a_recorded_step_is_the_eager_one(precision, fp8, rows):
    """Three steps with other data and lambda: one micro-batch each, or two and a smaller one. Attention in its plain form:
    the fused backward adds in an order that changes from run to run."""
    found = []
    for recorder in (None, Recorder()):
        config = TrainConfig(device="cuda", precision=precision, micro_batch=4)
        model = model_of(precision, fp8)
        optimizer, balancer, results = Optimizer(model), Balancer.install(model), []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(0, 96, (rows, 65), generator=generator)
            with sdpa_kernel(SDPBackend.MATH):
                result = compute_gradients(model, optimizer, tokens, torch.zeros_like(tokens), 0.3 / (step + 1), config,
                                           balancer, recorder)  # fmt: skip
            gradients = [None if m.grad is None else m.grad.clone() for m in optimizer.masters.values()]
            results.append((result.total, result.loss, result.balance_loss, result.mtp_losses, result.loads, gradients))
            assert optimizer.step(1e-3)
            balancer.update(result.loads, 1e-3)
        found.append(results)
    for eager, recorded in zip(*found, strict=True):
        assert eager[:4] == recorded[:4] and torch.equal(eager[4], recorded[4])
        for a, b in zip(eager[5], recorded[5], strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_parameter_without_a_gradient_stays_without():
    used, unused = nn.Parameter(torch.ones(3, device="cuda")), nn.Parameter(torch.ones(3, device="cuda"))

    def function(x):
        (used * x).sum().backward()
        return x.sum()

    graphed = Graphed(function, [used, unused], accumulate=True)
    for step in range(2):
        graphed.begin()
        for _ in range(2):
            total = graphed(torch.full((3,), 2.0 + step, device="cuda"))
        assert unused.grad is None and used.grad.tolist() == [2 * (2.0 + step)] * 3 and total.item() == 3 * (2.0 + step)


def test_what_cannot_be_recorded(monkeypatch):
    with pytest.raises(ValueError, match="cuda_graph = True with device = 'cpu': device must be cuda"):
        TrainConfig(cuda_graph=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for change, message in [({"recompute": True}, "recompute = True: cannot be recorded, recomputing saves"),
                            ({"precision": "fp16"}, "precision = 'fp16': cannot be recorded, the loss scale"),
                            ({"pipeline": "1f1b"}, "pipeline = '1f1b': cannot be recorded")]:
        with pytest.raises(ValueError, match=message):
            TrainConfig(cuda_graph=True, device="cuda", **change)
    assert TrainConfig(cuda_graph=True, device="cuda").cuda_graph
    with pytest.raises(ValueError, match="parameters on cpu, must be on a CUDA device"):
        Graphed(lambda x: x, [nn.Parameter(torch.ones(1))])
