"""The passes between FP8 products: kernels against the operations they replace, bit for bit where those are FP32."""

import pytest
import torch

from minids import ModelConfig
from minids.fp8 import feedforward, gated, linear, products, turned
from minids.fp8.operands import Operand, keep_12_bits, quantize
from minids.fp8.products import Simulated
from minids.fp8.real import RealBlocks
from minids.kernels.quantize import quantize_tile_t
from minids.model.layers import MLP, swiglu_backward, swiglu_forward
from minids.model.linear import Linear
from minids.model.moe import Dispatch, Experts
from minids.model.router import Routing

SCALES = ["fp32", "ue8m0"]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Kernels in the interpreter too, where references would be chosen."""
    monkeypatch.setenv("MINIDS_KERNELS", "triton")


def numbers(device, *shape, seed=0, dtype=torch.float32):
    """Rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        x *= torch.randn(*shape[:-1], 1, generator=generator).mul(3).exp()
        x[..., 1, :] = 0
    return x.to(dtype).to(device)


def same(ours, theirs, name=""):
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
        bits = torch.uint8 if theirs.dtype == torch.float8_e4m3fn else theirs.dtype
        assert torch.equal(ours.contiguous().view(bits), theirs.contiguous().view(bits)), name
    elif isinstance(theirs, tuple):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            same(a, b, f"{name}.{i}")
    else:
        assert ours == theirs, name


def transposed(x, scale):
    """What a Wgrad reads of (M, C): the reference."""
    return quantize_tile_t(x, scale=scale, backend="torch")


def plan(device, chosen, slots_of, slots):
    """Slots of a few experts' blocks with holes; ``chosen`` K."""
    choice = torch.full((slots,), slots_of, dtype=torch.int64)
    free = torch.randperm(slots, generator=torch.Generator().manual_seed(1))[:slots_of].sort().values
    choice[free] = torch.randperm(slots_of, generator=torch.Generator().manual_seed(2))
    slot = torch.empty(slots_of, dtype=torch.int64)
    slot[choice[free]] = free
    token = (choice // chosen).clamp_max(slots_of // chosen - 1)
    return Dispatch(choice.to(device), token.to(device), slot.view(-1, chosen).to(device), torch.zeros(0))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(3, 144, 272), (128, 256), (2, 256, 384), (48, 16)])
def test_weights_both_ways(kernel, scale, shape):
    w = numbers(kernel, *shape)
    found, back = turned.weight_both(w, scale)
    wanted = quantize(w, (128, 128), scale)
    same(found[:2], wanted[:2])
    same(back[:2], (wanted.q.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn), wanted.scale_inv.mT.contiguous()))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(130, 192), (256, 300), (1, 64)])
def test_columns_again_from_fp8_rows(kernel, scale, shape):
    rows = quantize(numbers(kernel, max(shape[0], 2), shape[1])[-shape[0] :], (1, 128), scale)
    found = turned.columns(Operand(rows.q, rows.scale_inv, (1, 128)), scale)
    same(tuple(found), transposed(rows.dequantize(), scale))
    assert found.q.stride(0) % 16 == 0 and found.scale_inv.stride(0) == 1


@pytest.mark.parametrize("scale", SCALES)
def test_slots_are_gathered_and_holes_are_zero(kernel, scale):
    n, c, chosen, m = 37, 192, 3, 256
    rows = quantize(numbers(kernel, n, c), (1, 128), "ue8m0")
    where = plan(kernel, chosen, n * chosen, m)
    found = turned.slots(rows, where)
    wide = rows.dequantize()[where.token_M].masked_fill((where.choice_M >= n * chosen)[:, None], 0.0)
    same(found.dequantize(), wide)
    same(tuple(turned.columns(rows, scale, where)), transposed(wide, scale))
    assert found.scale_inv.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [40, 130])
def test_o_projs_input_is_kept_in_twelve_bits(kernel, dtype, m):
    x = numbers(kernel, m, 256, dtype=dtype)
    x[0, 3] = 2.0**-120
    operand, kept = turned.keep_wide(x)
    wanted = keep_12_bits(x, (1, 128))
    same(operand[:2], quantize(x, (1, 128), "ue8m0")[:2])
    same(tuple(kept), tuple(wanted))
    same(tuple(turned.wide_columns(kept)), transposed(wanted.dequantize(), "ue8m0"))


def test_what_is_not_finite_is_told(kernel):
    x = torch.ones(4, 256, device=kernel)
    x[1, 200] = torch.inf
    operand, kept = turned.keep_wide(x)
    for found in (operand.scale_inv, kept.scale_inv):
        assert found.isnan().tolist() == [[False, False], [False, True], [False, False], [False, False]]
    assert turned.wide_columns(kept).scale_inv.isnan().flatten().tolist() == [False] * 128 + [True] * 128


def close(ours, theirs):
    """What operands mean that were rounded from nearly the same FP32: scales may differ in their last bit, and one number
    in a thousand by a step of E4M3, at most 2^-3 of its size."""
    difference = (ours - theirs).abs()
    assert ours.shape == theirs.shape and bool((difference <= 0.13 * theirs.abs() + 1e-6).all())
    assert float((difference > 1e-5 * theirs.abs()).float().mean()) < 1e-3


def meant(found, group=(1, 128)):
    return Operand(found.q.contiguous(), found.scale_inv.contiguous(), group).dequantize()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("m", [150, 256])
def test_swiglu_between_products(kernel, scale, weighted, m):
    f = 256
    z = torch.randn(m, 2 * f, generator=torch.Generator().manual_seed(3)).to(kernel)
    dh = torch.randn(m, f, generator=torch.Generator().manual_seed(4)).to(kernel)
    weight = torch.rand(m, 1, generator=torch.Generator().manual_seed(5)).to(kernel) if weighted else None
    h, kept = gated.gated(z, weight, scale)
    close(meant(h), quantize(swiglu_forward(z, None, weight), (1, 128), scale).dequantize())
    same(kept[:2], quantize(z, (1, 128), scale)[:2])

    dz, dz_t, h_t, d_weight = gated.gated_backward(dh, kept, weight, scale)
    wide = kept.dequantize()
    wanted, _, d_wanted = swiglu_backward(dh, wide, None, weight)
    close(meant(dz), quantize(wanted, (1, 128), scale).dequantize())
    for ours, theirs in ((dz_t, wanted), (h_t, swiglu_forward(wide, None, weight))):
        close(meant(ours), quantize(theirs.t().contiguous(), (1, 128), scale).dequantize())
    if weighted:
        torch.testing.assert_close(d_weight, d_wanted, rtol=1e-5, atol=1e-5)
    else:
        assert d_weight is None


def test_rows_beyond_the_last_block_stay_among_themselves(kernel):
    """What an unfilled end of the slots holds, NaN say, changes no other row and no other block of 128."""
    f, m = 128, 256
    z, dh = (torch.randn(m, n, generator=torch.Generator().manual_seed(n)).to(kernel) for n in (2 * f, f))
    weight = torch.rand(m, 1).to(kernel)
    clean = gated.gated_backward(dh, gated.gated(z, weight, "fp32")[1], weight, "fp32")
    z[128:], dh[128:] = torch.nan, torch.inf
    dirty = gated.gated_backward(dh, gated.gated(z, weight, "fp32")[1], weight, "fp32")
    same(tuple(t[:128] for t in dirty[0][:2]), tuple(t[:128] for t in clean[0][:2]))
    for ours, theirs in zip(dirty[1:3], clean[1:3], strict=True):
        same(ours.q[:, :128], theirs.q[:, :128])
        same(ours.scale_inv[:, 0], theirs.scale_inv[:, 0])
    same(dirty[3][:128], clean[3][:128])


def passes(device):
    """Each pass between products, on rows that fill no last block of 128 and slots with holes: what it hands on."""
    n, c, chosen = 150, 256, 2
    x, w = numbers(device, n, c), numbers(device, 2, 256, 128)
    rows, where = quantize(x, (1, 128), "ue8m0"), plan(device, chosen, n * chosen, 512)
    z, dh, gates = numbers(device, n, 2 * c), numbers(device, n, c, seed=1), numbers(device, n, 1, seed=2).abs()
    yield "weights", lambda: turned.weight_both(w, "fp32")
    yield "other weights", lambda: turned.weight_both(w[:, :144].contiguous(), "fp32")
    yield "columns", lambda: turned.columns(rows, "fp32")
    yield "columns of slots", lambda: turned.columns(rows, "fp32", where)
    yield "slots", lambda: turned.slots(rows, where)
    yield "o_proj", lambda: turned.keep_wide(x)
    yield "o_proj again", lambda: turned.wide_columns(turned.keep_wide(x)[1])
    yield "SwiGLU", lambda: gated.gated(z, gates, "fp32")
    yield "SwiGLU backward", lambda: gated.gated_backward(dh, gated.gated(z, gates, "fp32")[1], gates, "fp32")


def tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for item in found for t in tensors(item)] if isinstance(found, tuple) else []


@pytest.mark.parametrize("name", [name for name, _ in passes("cpu")])
def test_every_number_that_is_handed_on_was_written(kernel, name, monkeypatch):
    """Whatever fresh memory holds: NaN in all of it, and once more zeros, give the same bits."""
    new_empty, found = torch.Tensor.new_empty, []
    for byte in (0x7F, 0x00):

        def filled(self, *size, byte=byte, **rest):
            made = new_empty(self, *size, **rest)
            made.view(torch.uint8).fill_(byte if made.dtype.itemsize == 1 or not byte else 0xFF)
            return made

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", filled)
            found.append([t.contiguous() for t in tensors(dict(passes(kernel))[name]())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def wide_in_fp32(operand):
    wide = operand.dequantize(torch.float32)
    return wide.flatten(-3, -2) if operand.joined else wide


def multiply_in_fp32(a, b, ends=None):
    """`products.multiply`, which would round to BF16 on a GPU."""
    if ends is None:
        return a @ b
    stops = [0, *ends.tolist()]
    blocks = list(zip(stops[:-1], stops[1:], strict=True))
    if b.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in blocks])
    return torch.cat([a[i:j] @ w for (i, j), w in zip(blocks, b, strict=True)])


@pytest.mark.parametrize("recipe", ["v3", "v3_ue8m0"])
def test_whole_layers_by_kernels_are_the_simulated_ones(kernel, recipe, monkeypatch):
    """Experts, a dense net and o_proj, forward and backward. Apart: the order of FP32 sums (on a GPU 14 bits of 128 of
    them), about 2^-13; and where the result is quantised for a second product, a number in a hundred that this moves to
    the neighbour, which is 2^-3 to 2^-4 away: 0.01. A group or a scale that was wrong would be ten times that."""
    monkeypatch.setattr(products, "_wide", wide_in_fp32)
    monkeypatch.setattr(products, "multiply", multiply_in_fp32)
    sizes = dict(hidden_size=256, moe_intermediate_size=128, n_routed_experts=6, n_group=1, topk_group=1)
    experts = Experts(ModelConfig.preset("toy", **sizes))
    layers = {"experts": experts, "mlp": MLP(256, 128), "o_proj": Linear(256, 128)}
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        for p in layer.to(kernel).parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.08)
    x = torch.randn(150, 256, generator=generator).to(kernel).requires_grad_()
    indices = torch.tensor([0, 1, 2, 4, 5])[torch.rand(150, 5, generator=generator).argsort(1)[:, :2]].to(kernel)
    weights = torch.rand(150, 2, generator=generator).to(kernel).requires_grad_()
    routing = Routing(weights, indices, None, torch.bincount(indices.flatten(), minlength=6))
    grads = [torch.randn(150, n, generator=generator).to(kernel) for n in (256, 256, 128)]
    leaves, found = [x, weights, *(p for layer in layers.values() for p in layer.parameters())], []
    for engine in (Simulated, RealBlocks):
        for module in (feedforward, linear):
            monkeypatch.setattr(module, "engine_for", lambda recipe, device, width=0, engine=engine: engine(recipe))
        outs = [feedforward.Fp8Experts.of(experts, recipe)(x, routing), feedforward.Fp8MLP.of(layers["mlp"], recipe)(x),
                linear.Fp8Linear.of(layers["o_proj"], recipe, wide_input=True)(x)]  # fmt: skip
        found.append([*outs, *torch.autograd.grad(outs, leaves, grads)])
    for i, (theirs, ours) in enumerate(zip(*found, strict=True)):
        once = i in (2, len(leaves) + 2) or kernel == "cpu"  # o_proj and its weight's gradient: one product
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-3 if once else 2e-2), i
    assert not found[1][6][3].any() and found[1][6][2].any()  # nobody chose expert 3
