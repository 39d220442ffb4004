"""ZeRO-1 against one optimizer with the summed gradients: weights, norms, saved state, on any number of ranks."""

import copy
import functools

import pytest
import torch
from torch import nn

from minids.parallel import zero
from minids.parallel.experts import is_expert
from minids.parallel.mesh import Layout, run_on_threads
from minids.parallel.zero import RankOptimizer, ZeroOptimizer
from minids.train.optim import OptimConfig, Optimizer

LAYOUTS = {"one": Layout(1), "DP 3": Layout(3), "EP 4": Layout(4, 4, gpus_per_node=2), "EP 2, 2 replicas": Layout(4, 2),
           "EP 2, 3 replicas": Layout(6, 2)}  # fmt: skip
E = 12


class Expertise(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 3, 5))
        self.down_proj = nn.Parameter(torch.randn(E, 5, 3))


class Small(nn.Module):
    """Tensors of odd sizes, of both kinds, with and without decay, in two layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(7, 5))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module() for _ in range(2)])
        for layer in self.model.layers:
            layer.mlp, layer.norm = nn.Module(), nn.Parameter(torch.randn(5))
            layer.mlp.experts = Expertise()


@functools.cache
def drawn():
    torch.manual_seed(0)
    return Small().double()


def small(dtype=torch.float64):
    return copy.deepcopy(drawn()).to(dtype)


def held(layout, rank):
    return slice(layout.experts(rank, E).start, layout.experts(rank, E).stop)


def slice_of(model, part):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for name, p in list(layer.mlp.experts.named_parameters()):
            setattr(layer.mlp.experts, name, nn.Parameter(p.detach()[part].clone()))
    return model


def rank_gradients(layout, step):
    """rank -> name -> gradient: of its own, for experts those of its slice. Eighths, whose sums BF16 holds."""
    found = []
    for rank in range(layout.world):
        generator = torch.Generator().manual_seed(100 * step + rank)
        found.append({name: torch.randint(-8, 9, p.shape, generator=generator).double() / 8
                      for name, p in slice_of(small(), held(layout, rank)).named_parameters()})  # fmt: skip
    return found


def whole_gradients(layout, step):
    """What one process has: sums over all ranks, experts' slices over their replicas and then put together."""
    ranks, found = rank_gradients(layout, step), {}
    for name, p in small().named_parameters():
        if is_expert(name):
            found[name] = torch.zeros_like(p)
            for rank, gradients in enumerate(ranks):
                found[name][held(layout, rank)] += gradients[name]
        else:
            found[name] = sum(gradients[name] for gradients in ranks)
    return found


def feed(optimizer, gradients):
    for name, p in optimizer.params.items():
        p.grad = gradients[name].to(p.dtype)
    optimizer.accumulate()


def train_one(layout, dtype=torch.float64, config=None, steps=3):
    model = small(dtype)
    optimizer, norms = Optimizer(model, config, layers=2), []
    for step in range(steps):
        feed(optimizer, whole_gradients(layout, step))
        optimizer.step(0.01)
        norms.append(optimizer.grad_norm)
    return model, optimizer, norms


def train_ranks(layout, kind=ZeroOptimizer, dtype=torch.float64, config=None, steps=range(3), start=None):
    """Per rank (parameters, norms, state). ``start``: the state dict and optimizer state of one process to go on from."""
    drawn()  # before there are threads, which share the global generator

    def work(mesh):
        part = held(layout, mesh.rank)
        model = slice_of(small(dtype), part)
        optimizer, norms = kind(model, config, 2, mesh=mesh), []
        if start is not None:
            weights, tensors, values = start
            cut = {k: v[part] if is_expert(k) and v.ndim else v for k, v in weights.items()}
            model.load_state_dict(cut)
            optimizer.load_state({k: v[part] if is_expert(k) and v.ndim else v for k, v in tensors.items()}, values)
        for step in steps:
            feed(optimizer, rank_gradients(layout, step)[mesh.rank])
            assert optimizer.step(0.01)
            norms.append(optimizer.grad_norm)
        return model.state_dict(), norms, optimizer.state(), [m.numel() for m in optimizer.masters.values()]

    return run_on_threads(layout, work)


def same_weights(layout, ranks, model, **tolerance):
    for rank, (state, *_) in enumerate(ranks):
        for name, want in model.state_dict().items():
            torch.testing.assert_close(state[name], want[held(layout, rank)] if is_expert(name) else want, **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", [ZeroOptimizer, RankOptimizer])
def test_steps_equal_those_of_one_process(layout, kind):
    for config in (OptimConfig(), OptimConfig(layer_decay=0.5, clip=0.1)):
        model, _, norms = train_one(layout, config=config)
        ranks = train_ranks(layout, kind, config=config)
        same_weights(layout, ranks, model, rtol=1e-6, atol=1e-8)  # the clipping norm is float32
        assert all(one[1] == pytest.approx(norms, rel=1e-6) for one in ranks)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sliced_and_whole_state_take_the_same_steps(layout):
    sliced, whole = (train_ranks(layout, kind, torch.float32) for kind in (ZeroOptimizer, RankOptimizer))
    for a, b in zip(sliced, whole, strict=True):
        for name in a[0]:
            torch.testing.assert_close(a[0][name], b[0][name], rtol=2e-6, atol=1e-7)


def test_state_is_a_slice_of_everything_once():
    layout = LAYOUTS["EP 2, 3 replicas"]
    sizes = [sum(one[3]) for one in train_ranks(layout, steps=range(1))]
    total = sum(p.numel() for p in small().parameters())
    assert total <= sum(sizes) <= total + 4 * layout.world and max(sizes) == min(sizes)


@pytest.mark.parametrize("config", [OptimConfig(), OptimConfig(moments="bf16")], ids=["fp32", "bf16 moments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_goes_over_to_other_numbers_of_ranks_and_to_one_process(dtype, config):
    """One step on one process, two more on ranks; and the state that ranks save is that of one process."""
    layout = LAYOUTS["EP 2, 2 replicas"]
    model, optimizer, _ = train_one(layout, dtype, config, steps=1)
    tensors, values = optimizer.state()
    start = (model.state_dict(), {k: v.clone() for k, v in tensors.items()}, values)
    ranks = train_ranks(layout, dtype=dtype, config=config, steps=(1, 2), start=copy.deepcopy(start))
    model, optimizer, _ = train_one(layout, dtype, config, steps=3)
    limit = {"rtol": 2**-7 if torch.bfloat16 in (dtype, tensors["exp_avg/embed"].dtype) else 1e-5, "atol": 1e-6}
    same_weights(layout, ranks, model, **limit)
    wanted, _ = optimizer.state()
    for rank, (_, _, (found, _), _) in enumerate(ranks):
        assert found.keys() == wanted.keys()
        for key, want in wanted.items():
            want = want[held(layout, rank)] if is_expert(key) and want.ndim else want
            assert found[key].dtype == want.dtype and found[key].shape == want.shape
            torch.testing.assert_close(found[key], want, **limit)


def test_a_bad_gradient_on_one_rank_moves_nobody():
    layout = LAYOUTS["EP 4"]

    def work(mesh):
        model = slice_of(small(torch.float32), held(layout, mesh.rank))
        before = copy.deepcopy(model.state_dict())
        optimizer = ZeroOptimizer(model, mesh=mesh)
        feed(optimizer, rank_gradients(layout, 0)[mesh.rank])
        if mesh.rank == 1:
            model.model.layers[0].mlp.experts.down_proj.grad[0, 0, 0] = torch.nan
        moved = optimizer.step(0.01)
        return moved, all(torch.equal(before[k], v) for k, v in model.state_dict().items()), optimizer.adamw.state

    assert [one[:2] for one in run_on_threads(layout, work)] == [(False, True)] * 4


def test_slices_of_a_wrong_rank_are_seen(monkeypatch):
    layout = LAYOUTS["EP 2, 2 replicas"]
    model, *_ = train_one(layout)
    real = zero.Bucket.mine

    def next_one(self, tensors):
        return self.flatten(tensors).chunk(self.peers.size)[self.peers.rank - 1].clone()

    monkeypatch.setattr(zero.Bucket, "mine", next_one)
    with pytest.raises(AssertionError):
        same_weights(layout, train_ranks(layout), model, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(zero.Bucket, "mine", real)
    same_weights(layout, train_ranks(layout), model, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("change, message", [
    (lambda tensors: tensors.update({"exp_avg/who": torch.zeros(1)}), "unexpected \\['exp_avg/who'\\]"),
    (lambda tensors: tensors.update({"exp_avg/embed": torch.zeros(3)}), "exp_avg/embed: got torch.float32 \\(3,\\)"),
    (lambda tensors: tensors.update({"exp_avg/embed": torch.zeros(7, 5).half()}), "exp_avg/embed: got torch.float16"),
])  # fmt: skip
def test_state_that_does_not_fit_is_refused(change, message):
    _, optimizer, _ = train_one(Layout(1), torch.float32, steps=1)
    tensors, values = optimizer.state()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        train_ranks(Layout(1), dtype=torch.float32, steps=(), start=(small(torch.float32).state_dict(), tensors, values))
