"""SwiGLU nets and stacked experts in FP8: against loops over experts and groups, exactly where sums have one order."""

import pytest
import torch
import torch.nn.functional as F
from fp8_references import quantize_loops

from minids import ModelConfig
from minids.fp8 import feedforward, linear
from minids.fp8.feedforward import Fp8Experts, Fp8MLP
from minids.fp8.operands import Operand
from minids.fp8.products import Simulated
from minids.fp8.real import RealBlocks
from minids.fp8.recipe import RECIPES
from minids.model.layers import MLP
from minids.model.moe import Experts
from minids.model.router import Routing

N, D, E, K = 150, 160, 6, 2


def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.08)
    return module


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) * torch.randn(N, 1, generator=generator).exp()
    return x.requires_grad_(), torch.randn(N, D, generator=generator)


def route(seed=2, experts=(0, 1, 2, 4, 5)):
    """Each token to two of the given experts: expert 3 gets nothing. Gate values are a leaf, to read their gradient."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.stack([torch.randperm(len(experts), generator=generator)[:K] for _ in range(N)])
    indices = torch.tensor(experts)[choice]
    weights = torch.rand(N, K, generator=generator).requires_grad_()
    return Routing(weights, indices, None, torch.bincount(indices.flatten(), minlength=E))


def quantized(x, rows, columns, powers=False):
    return quantize_loops(x.detach(), rows, columns, powers)[0]


def slow_swiglu(x_rows, dy_rows, w_gate, w_up, w_down, g=None):
    """y, dx and the three weight gradients of one net from what it received: the equations, group by group. x_rows and
    dy_rows are quantised 1 x 128 already. Gate and up share tiles of z, as they lie side by side."""
    width, g = len(w_gate), torch.ones(len(x_rows), 1) if g is None else g
    gate, up, down = (quantized(w, 128, 128) for w in (w_gate, w_up, w_down))
    both = torch.cat([gate, up])
    z = x_rows @ both.t()
    h = F.silu(z[:, :width]) * z[:, width:] * g
    y = quantized(h, 1, 128) @ down.t()
    kept = quantized(z, 1, 128).requires_grad_()
    g = g.detach().clone().requires_grad_()
    h = F.silu(kept[:, :width]) * kept[:, width:] * g
    dh = dy_rows @ down
    dz, dg = torch.autograd.grad(h, (kept, g), dh)
    d_down = quantized(dy_rows, 128, 1).t() @ quantized(h, 128, 1)
    d_both = quantized(dz, 128, 1).t() @ quantized(x_rows, 128, 1)
    return y, quantized(dz, 1, 128) @ both, d_both[:width], d_both[width:], d_down, dg


def near(ours, theirs):
    """Equal but for the order of FP32 additions, and for what a last bit moves where a number is rounded to FP8: one in a
    thousand of the numbers, by 2^-3 of its size."""
    assert ours.shape == theirs.shape
    assert float((ours.detach() - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("width", [48, 128, 200])
def test_the_dense_net_is_its_equations(width):
    mlp = fill(MLP(D, width))
    x, dy = inputs()
    net = Fp8MLP.of(mlp, "v3")
    y = net(x)
    y.backward(dy)
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    dy_columns = quantized(dy, 128, 1)
    wanted = slow_swiglu(quantized(x, 1, 128), quantized(dy, 1, 128), *(w.detach() for w in weights))
    near(y, wanted[0])
    near(x.grad, wanted[1])
    for weight, reference in zip(weights[:2], wanted[2:4], strict=True):
        near(weight.grad, reference)
    z = quantized(quantized(x, 1, 128) @ torch.cat([quantized(w, 128, 128) for w in weights[:2]]).t(), 1, 128)
    h = F.silu(z[:, :width]) * z[:, width:]
    near(weights[2].grad, dy_columns.t() @ quantized(h, 128, 1))  # a dense layer's dy is not dispatched: quantised itself


@pytest.mark.parametrize("width", [48, 128])
def test_stacked_experts_are_a_loop_over_experts(width):
    cfg = ModelConfig.preset("toy", hidden_size=D, moe_intermediate_size=width, n_routed_experts=E, n_group=1, topk_group=1,
                             num_experts_per_tok=K)  # fmt: skip
    experts = fill(Experts(cfg))
    x, dy = inputs()
    routing = route()
    out = Fp8Experts.of(experts, "v3")(x, routing)
    out.backward(dy)
    x_rows, dy_rows = quantized(x, 1, 128, True), quantized(dy, 1, 128, True)  # dispatched with powers of two
    wanted, dx = torch.zeros(N, D), torch.zeros(N, D)
    d_gate_up, d_down, d_weights = (torch.zeros_like(t) for t in (experts.gate_up_proj, experts.down_proj, routing.weights))
    for e in range(E):
        token, place = (routing.indices == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate, up = experts.gate_up_proj[e].detach().chunk(2)
        g = routing.weights.detach()[token, place].unsqueeze(1)
        y, dx_e, *grads, dg = slow_swiglu(x_rows[token], dy_rows[token], gate, up, experts.down_proj[e].detach(), g)
        wanted.index_add_(0, token, y)
        dx.index_add_(0, token, dx_e)
        d_gate_up[e], d_down[e], d_weights[token, place] = torch.cat(grads[:2]), grads[2], dg.squeeze(1)
    near(out, wanted)
    near(x.grad, dx)
    near(experts.gate_up_proj.grad, d_gate_up)
    near(experts.down_proj.grad, d_down)
    near(routing.weights.grad, d_weights)
    assert not experts.gate_up_proj.grad[3].any() and not experts.down_proj.grad[3].any()  # nobody came


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_tokens_at_one_expert_and_none_at_the_others(recipe):
    cfg = ModelConfig.preset("toy", hidden_size=D, moe_intermediate_size=48, n_routed_experts=E, n_group=1, topk_group=1,
                             num_experts_per_tok=K)  # fmt: skip
    experts = fill(Experts(cfg))
    x, dy = inputs()
    few = route(experts=(2, 4))
    Fp8Experts.of(experts, recipe)(x, few).backward(dy)
    assert x.grad.isfinite().all() and experts.down_proj.grad.isfinite().all()
    assert [e for e in range(E) if experts.down_proj.grad[e].any()] == [2, 4]


def test_filling_slots_reach_no_sum_over_tokens(monkeypatch):
    """The last token, which filling slots repeat, is made enormous: scales of blocks that hold copies of it must not move,
    so that experts which it does not visit get the same weight gradients."""
    cfg = ModelConfig.preset("toy", hidden_size=D, moe_intermediate_size=48, n_routed_experts=E, n_group=1, topk_group=1,
                             num_experts_per_tok=K)  # fmt: skip
    experts, (x, dy), routing = fill(Experts(cfg)), inputs(), route()
    others = [e for e in range(E) if e not in routing.indices[-1].tolist()]
    found = []
    for size in (1.0, 1e6):
        experts.zero_grad()
        big_x, big_dy = x.detach().clone(), dy.clone()
        big_x[-1] *= size
        big_dy[-1] *= size
        Fp8Experts.of(experts, "v3")(big_x.requires_grad_(), routing).backward(big_dy)
        found.append([p.grad[others].clone() for p in experts.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_forward_lies_within_the_formats_bound_of_the_fp32_twin():
    """Through SwiGLU with |silu'| < 1.1: |h - h'| <= 1.1 dz_gate |z_up| + |silu(z_gate)| dz_up + 1.1 dz_gate dz_up."""
    from fp8_references import once, product_bound, rounding

    mlp = fill(MLP(D, 128))
    x, _ = inputs()
    x = x.detach()
    ours = Fp8MLP.of(mlp, "v3")(x).detach().double()
    theirs = mlp(x).detach().double()
    gate, up, down = (p.weight.detach().double() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    x = x.double()
    z = [x @ w.t() for w in (gate, up)]
    dz = [product_bound(x, once(x, 1, 128), w.t(), once(w, 128, 128).t()) for w in (gate, up)]
    h = F.silu(z[0]) * z[1]
    dh = 1.1 * dz[0] * z[1].abs() + F.silu(z[0]).abs() * dz[1] + 1.1 * dz[0] * dz[1]
    largest = (h.abs() + dh).amax(1, keepdim=True)
    dh = dh + rounding(h.abs() + dh, largest / 448)
    bound = product_bound(h, dh, down.t(), once(down, 128, 128).t())
    assert ((ours - theirs).abs() <= bound).all()
    assert (ours - theirs).abs().max() > 1e-4 * theirs.abs().max()  # and FP8 was at work


@pytest.mark.parametrize("recipe", ["v3", "v3_ue8m0"])
def test_the_real_engine_agrees(recipe, monkeypatch):
    cfg = ModelConfig.preset("toy", hidden_size=256, moe_intermediate_size=128, n_routed_experts=E, n_group=1, topk_group=1,
                             num_experts_per_tok=K)  # fmt: skip
    experts, mlp, routing = fill(Experts(cfg)), fill(MLP(256, 128)), route()
    x = torch.randn(N, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dy, found = torch.randn(N, 256, generator=torch.Generator().manual_seed(1)), []
    for engine in (Simulated, RealBlocks):
        for module in (feedforward, linear):
            monkeypatch.setattr(module, "engine_for", lambda recipe, device, width=0, engine=engine: engine(recipe))
        x.grad = routing.weights.grad = None
        experts.zero_grad()
        mlp.zero_grad()
        (Fp8Experts.of(experts, recipe)(x, routing) + Fp8MLP.of(mlp, recipe)(x)).backward(dy)
        found.append([x.grad, routing.weights.grad, *(p.grad for p in (*experts.parameters(), *mlp.parameters()))])
    for theirs, ours in zip(*found, strict=True):
        near(ours, theirs)


def test_only_small_numbers_are_kept():
    """A byte a number of x and z and of the weights' copies, scales, and the gate values: no h, no y."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.untyped_storage().nbytes())
        return tensor

    mlp, (x, _) = fill(MLP(D, 128)), inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = Fp8MLP.of(mlp, "v3")(x)
    sizes = {dtype: sum(s for d, s in kept.values() if d == dtype) for dtype, _ in kept.values()}
    assert sizes[torch.float8_e4m3fn] == N * D + N * 2 * 128 + 3 * 128 * D
    assert set(sizes) == {torch.float8_e4m3fn, torch.float32} and sizes[torch.float32] < 10_000  # scales
    assert y.requires_grad


def test_operands_gather_their_scales():
    x = torch.arange(1, 7.0).view(3, 2)
    rows = Simulated(RECIPES["v3"]).rows(x).gather(torch.tensor([2, 0, 2]))
    assert isinstance(rows, Operand) and torch.equal(rows.dequantize(), quantized(x, 1, 128)[[2, 0, 2]])
    whole = Simulated(RECIPES["tensor"]).rows(x).gather(torch.tensor([1, 1]))
    assert torch.equal(whole.dequantize(), quantized(x, 3, 2)[[1, 1]])
