"""Fp8Linear: against loops exactly, against its FP32 twin within bounds of the format, and what it keeps."""

import pytest
import torch
from fp8_references import once, product_bound, quantize_loops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from minids.fp8 import Fp8Linear, Fp8Recipe, dequantize, quantize_block, quantize_tile
from minids.fp8 import linear as linear_module
from minids.fp8.operands import Operand, e5m6_codes, keep_12_bits, quantize
from minids.fp8.products import Simulated
from minids.fp8.real import RealBlocks
from minids.fp8.recipe import RECIPES
from minids.model.linear import Linear

SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**16))


def make(m, k, n, seed, recipe="v3", **changes):
    """A layer, its input with outlying rows and channels, and a gradient of its output."""
    generator = torch.Generator().manual_seed(seed)
    layer = Fp8Linear(k, n, recipe, **changes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n, k, generator=generator) * 0.05)
    x = torch.randn(m, k, generator=generator) * torch.randn(m, 1, generator=generator).exp()
    x[:, seed % k] *= 30
    return layer, x.requires_grad_(), torch.randn(m, n, generator=generator) * 1e-3


def products(layer, x, dy):
    """y, dx, dW."""
    x.grad = layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


# ---- operands -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(SHAPES, st.sampled_from(["fp32", "ue8m0"]))
def test_operands_are_the_public_quantisers(shape, scale):
    rows, columns, _, seed = shape
    x = make(rows, columns, 1, seed)[1].detach()
    for group, (q, s) in {(1, 128): quantize_tile(x, scale=scale), (128, 128): quantize_block(x, scale=scale)}.items():
        found = quantize(x, group, scale)
        assert torch.equal(found.q.view(torch.uint8), q.view(torch.uint8)) and torch.equal(found.scale_inv, s)
        assert torch.equal(found.dequantize(), dequantize(q, s, group))
    q, s = quantize_tile(x.t(), scale=scale)
    found = quantize(x, (128, 1), scale)
    assert torch.equal(found.q.view(torch.uint8), q.view(torch.uint8).t()) and torch.equal(found.scale_inv, s.t())


def test_every_code_is_dequantised_as_torch_casts_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.float().isnan()].view(1, -1)
    assert finite.numel() == 254
    found = Operand(finite, torch.ones(1, 2), (1, 128)).dequantize()
    assert torch.equal(found, finite.float()) and torch.equal(found.signbit(), finite.float().signbit())


def test_e5m6_codes_are_the_formats():
    from minids.fp8 import decode, encode

    every = decode(torch.arange(4096), "e5m6")
    numbers = every[every.isfinite()].sort().values
    random = torch.randn(10_000) * 2.0 ** torch.randint(-30, 14, (10_000,))
    x = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, random])  # every number, every tie
    x = x.clamp(numbers[0], numbers[-1])
    assert torch.equal(e5m6_codes(x).int(), encode(x, "e5m6").int() & 0xFFF)


@settings(deadline=None, max_examples=30)
@given(SHAPES)
def test_twelve_bits_are_kept_exactly(shape):
    m, k, _, seed = shape
    x = make(m, k, 1, seed)[1].detach()
    kept = keep_12_bits(x, (1, 128))
    q, s = quantize_tile(x, fmt="e5m6", scale="ue8m0")
    assert torch.equal(kept.dequantize(), dequantize(q, s, (1, 128), fmt="e5m6"))
    assert kept.low.numel() == m * k and kept.high.numel() == (m * k + 1) // 2  # 12 bits a number


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(bad):
    x = torch.ones(3, 300)
    x[1, 200] = bad
    for kept in (quantize(x, (1, 128)), keep_12_bits(x, (1, 128))):
        nan = kept.dequantize().isnan()
        assert nan[1, 128:256].all() and nan.sum() == 128


# ---- the three products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 130, 257), (200, 128, 96), (129, 300, 128)])
@pytest.mark.parametrize("recipe", ["v3", "v3_ue8m0"])
def test_products_are_those_of_explicit_loops(m, k, n, recipe):
    """Exactly: the reference's groups are found by loops, its products are the same FP32 products."""
    layer, x, dy = make(m, k, n, 1, recipe)
    y, dx, dw = products(layer, x, dy)
    powers = recipe == "v3_ue8m0"
    x, w = x.detach(), layer.weight.detach()
    x_rows, w_blocks = quantize_loops(x, 1, 128, powers)[0], quantize_loops(w, 128, 128, powers)[0]
    x_columns = quantize_loops(x_rows, 128, 1, powers)[0]  # from what was kept, not from x
    dy_rows, dy_columns = quantize_loops(dy, 1, 128, powers)[0], quantize_loops(dy, 128, 1, powers)[0]
    assert torch.equal(y, x_rows @ w_blocks.t())
    assert torch.equal(dx, dy_rows @ w_blocks)
    assert torch.equal(dw, dy_columns.t() @ x_columns)


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.sampled_from(["v3", "v3_ue8m0", "mx", "tensor"]), st.booleans())
def test_gradients_lie_within_the_formats_bounds_of_the_fp32_twin(shape, recipe, wide):
    m, k, n, seed = shape
    layer, x, dy = make(m, k, n, seed, recipe, wide_input=wide)
    twin = Linear(k, n)
    twin.weight = torch.nn.Parameter(layer.weight.detach().clone())
    found = products(layer, x, dy)
    exact = products(twin, x, dy)
    x, w, dy = x.detach().double(), layer.weight.detach().double(), dy.double()
    side = {"mx": 32, "tensor": 10**6}.get(recipe, 128)
    factor = 1.0 if recipe in ("v3", "tensor") else 2.0
    exact_factor = 2.0 if wide else factor  # o_proj's input has powers of two whatever the recipe

    def along(t, axis, f=factor):
        rows, columns = (1, side) if axis else (side, 1)
        return once(t, min(rows if recipe != "tensor" else side, t.shape[0]), min(columns if recipe != "tensor" else side,
                                                                                  t.shape[1]), f)  # fmt: skip

    w_side = (1, 32) if recipe == "mx" else (min(side, n), min(side, k))
    ew = once(w, *w_side, factor)
    ew_t = once(w, 32, 1, factor) if recipe == "mx" else ew
    ex = along(x, 1, exact_factor)
    if wide:  # kept in E5M6: half a unit of its last place, or of its subnormals', which lie 2^34 below the largest
        kept = torch.maximum(2.0**-7 * x.abs(), 2.0**-30 * x.abs().amax())
    else:
        kept = ex if recipe in ("v3", "v3_ue8m0") else torch.zeros_like(x)
    nearby = x.abs() + kept
    again = along(nearby, 0, exact_factor) if (wide or recipe != "tensor") else ex
    bounds = (
        product_bound(x, ex, w.t(), ew.t()),
        product_bound(dy, along(dy, 1), w, ew_t),
        product_bound(dy.t(), along(dy, 0).t(), x, kept + again),
    )
    for name, ours, theirs, bound in zip(("y", "dx", "dW"), found, exact, bounds, strict=True):
        assert ours.dtype == torch.float32
        excess = (ours.double() - theirs.double()).abs() / (bound + 1e-30)
        assert excess.max() <= 1, (name, float(excess.max()))


@pytest.mark.parametrize("recipe", ["v3", "v3_ue8m0"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_real_engine_has_the_q_and_scales_of_the_simulated_one(recipe, wide, monkeypatch):
    """Its kernels' references, here on the CPU: products differ by the order of FP32 additions alone."""
    layer, x, dy = make(200, 256, 384, 3, recipe, wide_input=wide)
    simulated = products(layer, x, dy)
    monkeypatch.setattr(linear_module, "engine_for", lambda recipe, device: RealBlocks(recipe))
    for ours, theirs in zip(products(layer, x, dy), simulated, strict=True):
        scale = theirs.abs().max()
        assert float((ours - theirs).abs().max() / scale) < 384 * 2.0**-23


# ---- what is kept ---------------------------------------------------------------------------------------------------


def kept_bytes(function):
    """Bytes of each dtype that autograd is given to keep, by storage."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    total = {}
    for dtype, size in seen.values():
        total[dtype] = total.get(dtype, 0) + size
    return out, total


def test_of_an_input_only_fp8_is_kept():
    layer, x, _ = make(256, 256, 128, 0)
    _, kept = kept_bytes(lambda: layer(x))
    assert kept == {torch.float8_e4m3fn: 256 * 256 + 128 * 256, torch.float32: 4 * (256 * 2 + 2)}


def test_of_a_wide_input_twelve_bits_are_kept():
    layer, x, _ = make(256, 256, 128, 0, wide_input=True)
    _, kept = kept_bytes(lambda: layer(x))
    assert kept[torch.uint8] == 256 * 256 * 3 // 2 and kept[torch.float8_e4m3fn] == 128 * 256


def test_a_shared_input_is_quantised_and_kept_once(monkeypatch):
    calls, rows = [], Simulated.rows
    monkeypatch.setattr(Simulated, "rows", lambda self, x, exact=False: calls.append(1) or rows(self, x, exact))
    (one, x, dy), (two, _, _) = make(64, 128, 96, 0), make(64, 128, 96, 1)
    alone = products(one, x, dy)[0], products(two, x, dy)[0]
    one.shared = two.shared = linear_module.SharedInput()
    calls.clear()
    (y_one, y_two), kept = kept_bytes(lambda: (one(x), two(x)))
    assert torch.equal(y_one, alone[0]) and torch.equal(y_two, alone[1])
    assert len(calls) == 1 and kept[torch.float8_e4m3fn] == 64 * 128 + 2 * 96 * 128
    one(x)
    with torch.no_grad():
        x.mul_(2)  # the same tensor with other numbers
    assert torch.equal(two(x), 2 * alone[1])


# ---- use ------------------------------------------------------------------------------------------------------------


def test_autocast_gives_its_dtype_and_fp32_weight_gradients():
    layer, x, dy = make(64, 128, 96, 0)
    plain = products(layer, x, dy)
    layer.weight.grad = x.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(dy.bfloat16())
    assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.weight.grad.dtype == torch.float32
    assert torch.equal(y, plain[0].bfloat16())  # the product itself is not BF16's
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_leading_dimensions_and_strides(recipe):
    layer, x, dy = make(60, 40, 24, 0, recipe)
    flat = products(layer, x, dy)
    for view in (lambda t: t.view(3, 4, 5, -1), lambda t: t.t().contiguous().t()):
        again = products(layer, view(x.detach()).clone(memory_format=torch.preserve_format).requires_grad_(), view(dy))
        for ours, theirs in zip(again, flat, strict=True):
            assert torch.equal(ours.reshape(theirs.shape), theirs)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    layer, x, dy = make(8, 16, 8, 0)
    monkeypatch.setattr(Simulated, "dgrad", None)
    layer(x.detach()).backward(dy)
    assert layer.weight.grad is not None
    monkeypatch.undo()
    monkeypatch.setattr(Simulated, "wgrad", None)
    layer.weight.requires_grad_(False)
    layer(x).backward(dy)
    assert x.grad is not None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_reach_the_loss_and_the_gradients(bad):
    layer, x, dy = make(8, 16, 8, 0)
    with torch.no_grad():
        x[3, 5] = bad
    y, _, dw = products(layer, x, dy)
    assert y[3].isnan().all() and not y[:3].isnan().any() and dw[:, 5].isnan().all()
    layer, x, dy = make(8, 16, 8, 0)
    dy[2, 3] = bad
    _, dx, dw = products(layer, x, dy)
    assert dx[2].isnan().all() and dw[3].isnan().all()


@pytest.mark.parametrize("x, error, message", [
    (torch.ones(4, 7), ValueError, r"x: got shape \(4, 7\), expected \(..., 8\)"),
    (torch.ones(0, 8), ValueError, r"at least one row"),
    (torch.ones(4, 8, dtype=torch.int64), TypeError, r"x: got dtype torch.int64"),
    (torch.ones(4, 8).to(torch.float8_e4m3fn), TypeError, r"16 bits or more"),
])  # fmt: skip
def test_bad_input_is_refused(x, error, message):
    with pytest.raises(error, match=message):
        Fp8Linear(8, 8)(x)


@pytest.mark.parametrize("changes, message", [
    ({"scaling": "row"}, "Fp8Recipe.scaling = 'row': must be one of block, tensor, mx"),
    ({"scale": "fp16"}, "Fp8Recipe.scale = 'fp16'"), ({"engine": "fast"}, "Fp8Recipe.engine = 'fast'"),
    ({"block": 0}, "Fp8Recipe.block = 0"), ({"bits": -1}, "Fp8Recipe.bits = -1"),
    ({"bits": 14, "promote_every": None}, "Fp8Recipe.promote_every = None: must be block = 128"),
    ({"engine": "real", "scaling": "mx"}, "must be simulated"), ({"bits": 14, "scaling": "mx"}, "Fp8Recipe.bits = 14"),
])  # fmt: skip
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Fp8Recipe.named("v3", **changes)


def test_unknown_recipes_and_engines_are_refused():
    with pytest.raises(ValueError, match="fp8 = 'v4': must be one of v3, v3_ue8m0"):
        Fp8Linear(8, 8, "v4")
    with pytest.raises(RuntimeError, match="engine = 'real' with tensors on cpu"):
        Fp8Linear(8, 8, Fp8Recipe.named("v3", engine="real"))(torch.ones(2, 8))
