"""A model made FP8 from outside: same parameters, every linear of the published FP8 set, nothing else; and checkpoints."""

import copy

import pytest
import torch
from torch import nn

from minids import ModelConfig, Transformer
from minids.checkpoint import load, save
from minids.fp8 import Fp8Linear, Fp8Recipe, dequantize, quantize_block, to_fp8
from minids.fp8.attention import Fp8MLA, Heads
from minids.fp8.feedforward import Fp8Experts, Fp8MLP
from minids.fp8.products import Simulated
from minids.fp8.recipe import RECIPES
from minids.fp8.saved import Again, Source
from minids.infer import generate
from minids.model.layers import RMSNorm
from minids.published import plan
from minids.train.optim import OptimConfig, Optimizer

TINY = dict(hidden_size=160, num_hidden_layers=2, intermediate_size=144, moe_intermediate_size=48, vocab_size=300,
            num_attention_heads=2, q_lora_rank=32, kv_lora_rank=16, n_routed_experts=8, num_experts_per_tok=2,
            num_nextn_predict_layers=1)  # fmt: skip


def model_and_rows(seed=0, **changes):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.preset("toy", **{**TINY, **changes}))
    return model, torch.randint(0, 300, (2, 41), generator=torch.Generator().manual_seed(seed))


def gradients(model, rows, **options):
    model.zero_grad()
    out = model(rows[:, :-1], labels=rows[:, 1:], **options)
    (out.loss + 0.3 * out.mtp_loss).backward()
    return out.loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_parameters_keep_names_order_identity_and_bits():
    model, _ = model_and_rows()
    before = dict(model.named_parameters())
    bits = {name: p.detach().clone() for name, p in before.items()}
    names = list(model.state_dict())
    assert to_fp8(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before) and list(model.state_dict()) == names
    assert all(after[name] is before[name] and torch.equal(after[name], bits[name]) for name in before)


@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_what_is_fp8_is_what_is_published_in_fp8(q_lora_rank, monkeypatch):
    """Every weight that a training step quantises, against the plan of the published checkpoint, MTP layer included."""
    model, rows = model_and_rows(q_lora_rank=q_lora_rank)
    seen, weight = [], Simulated.weight
    monkeypatch.setattr(Simulated, "weight", lambda self, w: seen.append(w.untyped_storage().data_ptr()) or weight(self, w))
    gradients(to_fp8(model), rows)
    found = {name for name, p in model.named_parameters() if p.data_ptr() in seen}
    published = {e.source for e in plan(model.cfg) if e.dtype == torch.float8_e4m3fn}
    assert found == published and any(".2.self_attn" in name for name in found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_and_gradients_stay_close_and_finite(recipe):
    model, rows = model_and_rows()
    loss, grads = gradients(model, rows)
    ours, found = gradients(to_fp8(model, recipe), rows)
    assert 0 < abs(ours - loss) < 0.01 * loss
    assert all(g.isfinite().all() and g.any() == grads[name].any() for name, g in found.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputing_changes_no_bit(recipe):
    model, rows = model_and_rows()
    twin = copy.deepcopy(model)
    loss, grads = gradients(to_fp8(model, Fp8Recipe.named(recipe, recompute=False)), rows)
    for options in ({}, {"recompute": True}):
        other = to_fp8(copy.deepcopy(twin), recipe)
        again, found = gradients(other, rows, **options)
        assert again == loss and all(torch.equal(found[name], grads[name]) for name in grads)


def test_heads_made_again_for_a_fused_attention_change_no_bit_and_are_not_kept(monkeypatch):
    """The way of CUDA, on one row, of whose heads the CPU's attention keeps views."""
    model, rows = model_and_rows()
    twin, sizes = copy.deepcopy(model), []
    loss, grads = gradients(to_fp8(model, Fp8Recipe.named("v3", recompute=False)), rows[:1])
    monkeypatch.setattr("minids.fp8.attention.is_fused", lambda x: True)
    pack = Heads.pack
    monkeypatch.setattr(Heads, "pack", lambda self, t: sizes.append(type(pack(self, t))) or pack(self, t))
    for options in ({}, {"recompute": True}):
        sizes.clear()
        again, found = gradients(to_fp8(copy.deepcopy(twin)), rows[:1], **options)
        assert again == loss and all(torch.equal(found[name], grads[name]) for name in grads)
        assert sizes.count(tuple) >= 3 * 3  # q, k and v of three layers


def test_what_many_read_is_made_again_once_a_pass():
    """q_a_proj and kv_a_proj_with_mqa read one norm, routed and shared experts another: backward computes each once."""
    calls, found = [], []

    class Counted(RMSNorm):
        def forward(self, x, delta=None, residual=False):
            calls.append(self)
            return super().forward(x, delta, residual)

        def _residual(self, x, delta):
            total = x if delta is None else x + delta
            return total, RMSNorm.forward(self, total)

    model, rows = model_and_rows(num_nextn_predict_layers=0)
    norms = [norm for layer in model.main_layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in norms:
        norm.__class__ = Counted
    loss = to_fp8(model, "v3")(rows[:, :-1], labels=rows[:, 1:]).loss
    for _ in range(2):  # two passes through one graph
        calls.clear()
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert sorted(map(id, calls)) == sorted(map(id, norms))
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_again_forgets_when_the_last_reader_has_asked():
    made, one = [], torch.ones(())
    again = Again(lambda t: made.append(1) or 2 * t)
    for _ in range(3):
        assert Source(again, one).read() is one
    for turn in (1, 2):
        assert again(one, lambda x: x + 1, "more") == 3 and again(one) == 2
        assert again.made.keys() == {None, "more"} and len(made) == turn
        assert again(one, lambda x: x - 1, "more") == 3  # found, not made
        assert not again.made


def test_recomputing_keeps_less():
    def kept(recompute):
        model, rows = model_and_rows()
        model, sizes = to_fp8(model, Fp8Recipe.named("v3", recompute=recompute)), {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(rows[:, :-1], labels=rows[:, 1:])
        return sum(sizes.values()), out

    (less, _), (more, out) = kept(True), kept(False)
    cfg = ModelConfig.preset("toy", **TINY)
    numbers = cfg.num_attention_heads * (2 * cfg.qk_head_dim + cfg.v_head_dim)  # q, k and v of a token
    tokens = 2 * (2 * 40 + 39)  # of two main layers and an MTP module
    assert more - less > 4 * numbers * tokens and out.loss.isfinite()


def test_training_goes_down_and_a_resumed_model_is_the_same():
    model, rows = model_and_rows()
    to_fp8(model)
    optimizer = Optimizer(model, OptimConfig(moments="bf16"), 2)
    losses = []
    for _ in range(12):
        out = model(rows[:, :-1], labels=rows[:, 1:])
        (out.loss + 0.3 * out.mtp_loss).backward()
        optimizer.accumulate()
        optimizer.step(3e-3)
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_a_nan_in_a_weight_makes_the_loss_nan_and_the_step_is_skipped():
    model, rows = model_and_rows()
    to_fp8(model)
    optimizer = Optimizer(model)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 0, 0] = torch.nan
    before = model.lm_head.weight.detach().clone()
    out = model(rows[:, :-1], labels=rows[:, 1:])
    out.loss.backward()
    assert out.loss.isnan() and not optimizer.step(1e-3) and torch.equal(model.lm_head.weight, before)


def test_a_trained_model_saved_in_fp8_loads_bit_for_bit(tmp_path):
    """What is on disk is q and scales of the FP32 weights by the public quantiser; what is loaded is their product."""
    model, rows = model_and_rows()
    to_fp8(model)
    optimizer = Optimizer(model)
    for _ in range(2):
        gradients(model, rows)
        optimizer.step(1e-2)
    save(model, tmp_path / "fp8", fp8=True)
    loaded = load(tmp_path / "fp8", dtype=torch.float32).state_dict()
    state, entries = model.state_dict(), plan(model.cfg)
    quantised = [e for e in entries if e.dtype == torch.float8_e4m3fn]
    assert len(quantised) > 60 and any(e.name.startswith("model.layers.2.") for e in quantised)  # the MTP layer too
    for e in quantised:
        assert torch.equal(loaded[e.source][e.part], dequantize(*quantize_block(state[e.source][e.part]))), e.name
    for e in entries:
        if e.dtype == torch.bfloat16 and not e.is_copy:
            assert torch.equal(loaded[e.source][e.part], state[e.source][e.part].bfloat16().float()), e.name
    again = to_fp8(load(tmp_path / "fp8", dtype=torch.float32))
    one, two = (float(m(rows[:, :-1], labels=rows[:, 1:]).loss) for m in (model, again))
    assert one == pytest.approx(two, rel=1e-3)  # the linears have the same q; head and embedding were rounded to BF16


def test_generation_and_evaluation_work():
    model, rows = model_and_rows()
    to_fp8(model).eval()
    assert len(generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=4, temperature=0)[0]) == 4
    with torch.no_grad():
        assert model(rows, mtp=False).logits.isfinite().all()


def test_modules_are_replaced_everywhere():
    model = to_fp8(model_and_rows()[0])
    kinds = {name.rpartition(".")[2]: type(m) for name, m in model.named_modules()}
    assert kinds["self_attn"] is Fp8MLA and kinds["experts"] is Fp8Experts and kinds["shared_experts"] is Fp8MLP
    assert isinstance(model.model.layers[0].mlp, Fp8MLP) and type(model.lm_head) is not Fp8Linear
    wide = [name for name, m in model.named_modules() if isinstance(m, Fp8Linear) and m.wide_input]
    assert len(wide) == 3 and all(name.endswith("o_proj") for name in wide)
    assert not isinstance(model.model.layers[2].eh_proj, Fp8Linear)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="got a Linear, expected a model with at least one Block"):
        to_fp8(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="fp8 = 'v9'"):
        to_fp8(model_and_rows()[0], "v9")
    with pytest.raises(TypeError, match="model.embed_tokens.weight is torch.bfloat16, expected float32"):
        to_fp8(model_and_rows()[0].bfloat16())
    with pytest.raises(ValueError, match="computes in FP8 already"):
        to_fp8(to_fp8(model_and_rows()[0]))
