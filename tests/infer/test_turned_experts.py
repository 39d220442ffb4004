"""Turned experts (model/moe_decode.py) are the same sum, are made only where they pay, and never go stale."""

import pytest
import torch

from minids import ModelConfig, Transformer
from minids.model import moe_decode
from minids.model.attention import LatentCache
from minids.model.moe import MoE
from minids.model.moe_decode import PAYS, Turned, bags, turned


def layer_of(seed: int = 0, **overrides) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(ModelConfig.preset("toy", vocab_size=50, hidden_size=16, moe_intermediate_size=8, **overrides))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    return moe


def one_by_one(moe: MoE, x: torch.Tensor, routing) -> torch.Tensor:
    """sum_k g_k W_down (silu(W_gate x) * W_up x), one token and expert at a time, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(routing.weights[token], routing.indices[token], strict=True):
            gate, up = (moe.experts.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight.double() * (moe.experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 2, 16])
@torch.no_grad()
def test_bags_follow_the_formula(tokens):
    moe = layer_of(tokens)
    x = torch.randn(tokens, 2 * 16)[:, ::2]  # not contiguous
    routing = moe.gate(x)
    got = bags(x, routing, Turned(moe.experts.gate_up_proj, moe.experts.down_proj))
    torch.testing.assert_close(got.double(), one_by_one(moe, x, routing), rtol=1e-4, atol=1e-4)


def long_cache(rows: int = 8, dtype=torch.float32) -> LatentCache:
    return LatentCache(ModelConfig.preset("toy", vocab_size=50), batch=rows, max_length=PAYS // rows, dtype=dtype)


def test_they_are_made_only_where_they_pay(monkeypatch):
    experts = layer_of().experts
    weights = experts.gate_up_proj, experts.down_proj
    assert turned(*weights, long_cache(), 1) is None  # gradients are on
    with torch.no_grad():
        cache = long_cache()
        made = turned(*weights, cache, 1)
        assert made is not None and turned(*weights, cache, 1) is made
        cache.filled = 60
        assert turned(*weights, cache, 1) is made and turned(*weights, cache, 2) is None  # too few tokens are to come
        assert turned(*weights, None, 1) is None
        assert turned(*(w.bfloat16() for w in weights), long_cache(dtype=torch.bfloat16), 1) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert turned(*weights, cache, 1) is None
        monkeypatch.setattr(moe_decode, "LARGE", 10)
        assert turned(*weights, cache, 1) is None
    with torch.inference_mode():
        assert turned(*(w.clone() for w in weights), long_cache(), 1) is None  # these would not tell of a change


def change_in_place(experts) -> None:
    experts.down_proj.mul_(1.5)


def change_data(experts) -> None:
    experts.gate_up_proj.data = experts.gate_up_proj.data * 1.5


def change_parameter(experts) -> None:
    experts.down_proj = torch.nn.Parameter(experts.down_proj * 1.5)


def load_other(experts) -> None:
    experts.load_state_dict({name: value * 1.5 for name, value in experts.state_dict().items()})


@pytest.mark.parametrize("change", [change_in_place, change_data, change_parameter, load_other])
@torch.no_grad()
def test_they_never_outlive_their_weights(change):
    """The weights change in the middle of a text: the next step is the new model's."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("toy", vocab_size=50, initializer_range=0.1))
    rows, tokens = 8, torch.randint(0, 50, (8, 1))
    cache = LatentCache(model.cfg, batch=rows, max_length=PAYS // rows + 4)
    model(torch.randint(0, 50, (rows, 4)), cache=cache)
    model(tokens, cache=cache)
    layer = max(cache.turned)
    made = cache.turned[layer]
    assert set(cache.turned) == {block.index for block in model.main_layers if block.is_moe}
    change(model.model.layers[layer].mlp.experts)
    twin = LatentCache(model.cfg, batch=rows, max_length=cache.filled + 1)  # too short to turn anything for
    twin.data, twin.filled, twin.lengths = cache.data[:, :, : cache.filled + 1].clone(), cache.filled, cache.lengths
    got, expected = model(tokens, cache=cache).logits, model(tokens, cache=twin).logits
    assert cache.turned[layer] is not made and not twin.turned
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
