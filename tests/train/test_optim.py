"""AdamW against the published formula in float64, masters, clipping, layer rates, loss scaling, state."""

import math

import pytest
import torch
from torch import nn

from minids.train.optim import LossScaler, OptimConfig, Optimizer, layer_factor


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 5, generator=generator).to(dtype))
        self.gain = nn.Parameter((1 + 0.1 * torch.randn(5, generator=generator)).to(dtype))


def give_gradients(net, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = (size * torch.randn(p.shape, generator=generator)).to(p.dtype)


def test_update_is_the_published_adamw():
    net, config = Net(), OptimConfig(clip=0.0)
    optimizer = Optimizer(net, config)
    weights = {n: p.detach().double().clone() for n, p in net.named_parameters()}
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    v = {n: torch.zeros_like(w) for n, w in weights.items()}
    for t in range(1, 6):
        give_gradients(net, t)
        lr = 1e-2 / t
        for n, p in net.named_parameters():
            g = p.grad.double()
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.95 * v[n] + 0.05 * g * g
            decay = 0.1 if n == "weight" else 0.0
            update = (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.95**t)).sqrt() + 1e-8)
            weights[n] = weights[n] - lr * (update + decay * weights[n])
        assert optimizer.step(lr)
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.double(), weights[n], rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_joint_norm_and_reports_the_norm_before():
    def first_moments(size, clip):
        net = Net()
        optimizer = Optimizer(net, OptimConfig(clip=clip))
        give_gradients(net, 1, size)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters()))
        optimizer.step(1e-3)
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-5)
        tensors, _ = optimizer.state()
        return norm, math.sqrt(sum(float(t.double().square().sum()) for k, t in tensors.items() if "exp_avg/" in k))

    _, moment = first_moments(100.0, 1.0)
    assert moment == pytest.approx(0.1 * 1.0, rel=1e-4)  # m = 0.1 g, and |g| was clipped to 1
    norm, moment = first_moments(1e-3, 1.0)
    assert norm < 1 and moment == pytest.approx(0.1 * norm, rel=1e-4)  # small gradients stay as they are
    norm, moment = first_moments(100.0, 0.0)
    assert moment == pytest.approx(0.1 * norm, rel=1e-4)


def test_masters_keep_what_bf16_rounds_away():
    """Twenty updates of 1e-3 on a weight of 1: in BF16 each rounds back to 1 (spacing 2^-8 below 1), in FP32 they add."""
    net = Net(torch.bfloat16)
    with torch.no_grad():
        net.weight.fill_(1.0)
    optimizer = Optimizer(net, OptimConfig(weight_decay=0.0))
    for _ in range(20):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.accumulate()
        optimizer.step(1e-3)
    assert optimizer.masters["weight"].dtype == torch.float32
    torch.testing.assert_close(optimizer.masters["weight"], torch.full((6, 5), 0.98), rtol=0, atol=1e-4)
    assert torch.equal(net.weight, optimizer.masters["weight"].bfloat16())
    naive = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(20):
        naive -= 1e-3
    assert float(naive) == 1.0


def test_low_precision_gradients_are_summed_in_fp32():
    net = Net(torch.bfloat16)
    optimizer = Optimizer(net)
    for _ in range(3):  # 1 + 3 * 2^-9: needs more than BF16's 8 bits
        for p in net.parameters():
            p.grad = torch.full_like(p, 2.0**-9)
        optimizer.accumulate()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.accumulate()
    assert net.weight.grad is None
    assert torch.equal(optimizer.masters["weight"].grad, torch.full((6, 5), 1 + 3 * 2.0**-9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "loss"])
def test_a_bad_step_leaves_every_bit(dtype, bad):
    net = Net(dtype)
    optimizer = Optimizer(net)
    give_gradients(net, 1)
    optimizer.accumulate()
    assert optimizer.step(1e-2)
    before = {k: v.clone() for k, v in optimizer.state()[0].items()} | {n: p.clone() for n, p in net.named_parameters()}
    give_gradients(net, 2)
    if bad != "loss":
        net.weight.grad[0, 0] = bad
    optimizer.accumulate()
    assert optimizer.step(1e-2, apply=bad != "loss") is False
    after = optimizer.state()[0] | dict(net.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(t.grad is None for t in [*net.parameters(), *optimizer.masters.values()])


def test_loss_scaling_saves_gradients_that_fp16_loses():
    def gradient(scaling):
        net = Net(torch.float16)
        optimizer = Optimizer(net, OptimConfig(loss_scaling=scaling, clip=0.0))
        loss = (net.weight * 1e-4).mean().float() * 1e-3 + net.gain.float().sum() * 0
        (optimizer.scale * loss).backward()
        optimizer.accumulate()
        optimizer.step(0.0)
        return optimizer.grad_norm

    exact = math.sqrt(30) * 1e-7 / 30
    assert gradient(scaling=False) == 0.0  # 3.3e-9 is below FP16's smallest number, 6e-8
    assert gradient(scaling=True) == pytest.approx(exact, rel=0.02)


def test_loss_scale_halves_on_overflow_and_doubles_after_the_interval():
    scaler = LossScaler(True, 1024.0, growth_interval=3)
    trace = []
    for overflow in (True, False, False, False, False, False, True, False, False, False):
        scaler.update(overflow)
        trace.append(scaler.scale)
    assert trace == [512, 512, 512, 1024, 1024, 1024, 512, 512, 512, 1024]
    off = LossScaler(False, 1024.0, 1)
    off.update(True)
    assert off.scale == 1.0


def test_layer_factors():
    assert layer_factor("model.embed_tokens.weight", 4, 0.5) == 0.125
    assert [layer_factor(f"model.layers.{i}.mlp.gate.weight", 4, 0.5) for i in range(5)] == [0.125, 0.25, 0.5, 1, 1]
    assert layer_factor("lm_head.weight", 4, 0.5) == layer_factor("model.norm.weight", 4, 0.5) == 1
    assert layer_factor("model.embed_tokens.weight", 4, 1.0) == 1


def test_layer_factors_scale_the_update():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)])})

    net = Two()
    optimizer = Optimizer(net, OptimConfig(layer_decay=0.25, weight_decay=0.0, clip=0.0), layers=2)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-2)
    moves = [(b - p).detach() for b, p in zip(before, net.parameters(), strict=True)]
    torch.testing.assert_close(moves[0], torch.full((3, 3), 0.25e-2), rtol=1e-4, atol=0)
    torch.testing.assert_close(moves[1], torch.full((3, 3), 1e-2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_state_round_trip_continues_bit_for_bit(dtype, moments):
    def steps(net, optimizer, seeds):
        for seed in seeds:
            give_gradients(net, seed)
            optimizer.accumulate()
            optimizer.step(3e-3)

    net, config = Net(dtype), OptimConfig(moments=moments)
    optimizer = Optimizer(net, config)
    steps(net, optimizer, range(3))
    tensors, values = optimizer.state()
    tensors = {k: v.clone() for k, v in tensors.items()}
    other = Net(dtype)
    other.load_state_dict(net.state_dict())
    resumed = Optimizer(other, config)
    resumed.load_state(tensors, values)
    steps(net, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    for n, master in optimizer.masters.items():
        assert torch.equal(master, resumed.masters[n]) and torch.equal(net.get_parameter(n), other.get_parameter(n))
    assert optimizer.scale == resumed.scale


def test_state_of_another_model_is_refused():
    tensors, values = Optimizer(Net()).state()
    with pytest.raises(ValueError, match="master/weight"):
        Optimizer(Net(torch.bfloat16)).load_state(tensors, values)
    with pytest.raises(ValueError, match="exp_avg/other"):
        Optimizer(Net()).load_state({"exp_avg/other": torch.zeros(1)}, values)
    halves = {"exp_avg/gain": torch.zeros(5, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match="exp_avg/gain: got dtype torch.bfloat16, expected torch.float32"):
        Optimizer(Net()).load_state(halves, values)


def bf16(x):
    """A Python float rounded to 8 significant bits, to nearest even, by integers."""
    if x == 0:
        return 0.0
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def test_bf16_moments_against_scalars():
    """Every weight by itself, in Python floats; the moments must be the very BF16 numbers."""
    net = Net()
    optimizer = Optimizer(net, OptimConfig(clip=0.0, moments="bf16"))
    weights = {(n, i): w for n, p in net.named_parameters() for i, w in enumerate(p.flatten().tolist())}
    m, v = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for t in range(1, 8):
        give_gradients(net, t)
        grads = {(n, i): g for n, p in net.named_parameters() for i, g in enumerate(p.grad.flatten().tolist())}
        assert optimizer.step(1e-2)
        tensors, _ = optimizer.state()
        for (name, i), g in grads.items():
            new_m, new_v = 0.9 * m[name, i] + 0.1 * g, 0.95 * v[name, i] + 0.05 * g * g
            update = new_m / (1 - 0.9**t) / (math.sqrt(new_v / (1 - 0.95**t)) + 1e-8)
            weights[name, i] -= 1e-2 * (update + (0.1 * weights[name, i] if name == "weight" else 0.0))
            for key, new in (("exp_avg", new_m), ("exp_avg_sq", new_v)):
                stored = float(tensors[f"{key}/{name}"].flatten()[i])
                # FP32 and float64 may fall on either side of a tie: the neighbour is allowed there alone.
                assert stored in (bf16(new * (1 - 2**-22)), bf16(new * (1 + 2**-22))), (key, name, i, t)
            m[name, i], v[name, i] = (float(tensors[f"{k}/{name}"].flatten()[i]) for k in ("exp_avg", "exp_avg_sq"))
    for name, p in net.named_parameters():
        for i, w in enumerate(p.flatten().tolist()):
            assert w == pytest.approx(weights[name, i], rel=1e-5, abs=1e-7)
    assert {t.dtype for k, t in tensors.items() if k.startswith("exp_avg")} == {torch.bfloat16}


def test_a_weight_without_a_gradient_keeps_its_bits_under_bf16_moments():
    net = Net()
    optimizer, before = Optimizer(net, OptimConfig(moments="bf16")), net.gain.detach().clone()
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step(1e-2)
    assert torch.equal(net.gain, before) and not any("gain" in k for k in optimizer.state()[0])


@pytest.mark.parametrize("change", [{"beta1": 1.0}, {"eps": 0.0}, {"clip": -1.0}, {"layer_decay": 0.0},
                                    {"scale_init": 0.5}, {"growth_interval": 0}, {"moments": 8}])
def test_impossible_settings_are_refused_by_name(change):
    (name, value), = change.items()
    with pytest.raises(ValueError, match=f"OptimConfig.{name} = {value}"):
        OptimConfig(**change)
