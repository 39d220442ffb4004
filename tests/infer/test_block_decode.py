"""One token in each of many rows (model/block_decode.py): the same function as the layer, and never a stale fold."""

import copy

import pytest
import torch

from minids import ModelConfig, Transformer
from minids.fp8 import to_fp8
from minids.model import block_decode
from minids.model.block import Context
from minids.model.cache import LatentCache

YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
ROWS = 32


def small_model(seed: int = 0, **changes) -> Transformer:
    """A dense layer and a MoE layer; norms that are not 1 and biases that are not 0, so that one left out must show."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, initializer_range=0.15,
                 kv_lora_rank=12, q_lora_rank=None, max_position_embeddings=64, rope_scaling=None, intermediate_size=24,
                 moe_intermediate_size=8, num_nextn_predict_layers=0)  # fmt: skip
    model = Transformer(ModelConfig.preset("toy", **{**shape, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
        for gate in model.routers():
            gate.e_score_correction_bias.uniform_(-0.2, 0.2)
    return model


def filled(model: Transformer, ragged: bool) -> LatentCache:
    """ROWS rows of six tokens, or of one to six."""
    cache = LatentCache(model.cfg, batch=ROWS, max_length=12)
    n_valid = torch.arange(ROWS) % 6 + 1 if ragged else None
    with torch.no_grad():
        model(torch.randint(0, 50, (ROWS, 6)), cache=cache, n_valid=n_valid)
    return cache


def step(model: Transformer, cache: LatentCache, joined: bool, dtype=None):
    """One decoding step on a copy of the cache, all folds and new latents with it: (output, cache)."""
    twin = copy.copy(cache)
    twin.data, twin.folded, twin.turned = cache.data.clone(), dict(cache.folded), {}
    tokens = torch.arange(ROWS).unsqueeze(1)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if not joined:
            patch.setattr(block_decode, "applies", lambda *args: False)
        return model(tokens, cache=twin), twin


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("changes", [
    {}, {"q_lora_rank": 16}, {"n_shared_experts": 0}, {"n_shared_experts": 2}, {"rope_scaling": YARN},
    {"first_k_dense_replace": 2}, {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 2.0},
])  # fmt: skip
def test_joined_layers_are_the_layers(ragged, changes):
    model = small_model(**changes)
    cache = filled(model, ragged)
    (plain, plain_cache), (joined, joined_cache) = step(model, cache, False), step(model, cache, True)
    assert {key for key in joined_cache.folded if key[1] == "block"} == {(0, "block"), (1, "block")}
    torch.testing.assert_close(joined.logits, plain.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined_cache.data, plain_cache.data, rtol=1e-5, atol=1e-5)
    assert len(joined.routing) == len(plain.routing) == (0 if changes.get("first_k_dense_replace") == 2 else 1)
    for ours, theirs in zip(joined.routing, plain.routing, strict=True):
        assert torch.equal(ours.indices.sort(-1).values, theirs.indices.sort(-1).values)
        assert torch.equal(ours.load, theirs.load)
        torch.testing.assert_close(ours.weights.sort(-1).values, theirs.weights.sort(-1).values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-6)


def test_a_fold_never_outlives_its_weights():
    """Each weight of a dense and of a MoE layer in turn is changed in the middle of a text."""
    model = small_model(q_lora_rank=16)
    cache = filled(model, ragged=True)
    names = [name for name, _ in model.model.layers.named_parameters()]
    assert len(names) == 27
    for name in names:
        cache.folded = step(model, cache, True)[1].folded
        with torch.no_grad():
            weight = model.model.layers.get_parameter(name)
            kept = weight.clone()
            weight.copy_(weight.flip(0) + 0.1)
            (plain, _), (joined, _) = step(model, cache, False), step(model, cache, True)
            torch.testing.assert_close(joined.logits, plain.logits, rtol=1e-5, atol=1e-5, msg=name)
            weight.copy_(kept)
    made = step(model, cache, True)[1].folded
    again = copy.copy(cache)
    again.folded = made
    assert step(model, again, True)[1].folded == made  # nothing changed: nothing is made


def test_where_it_applies():
    model = small_model()
    block, cache = model.model.layers[1], filled(model, ragged=False)
    context, rows = Context(cache.rope[:, :1], cache=cache, absorb=True), torch.zeros(ROWS, 1, 32)
    assert not block_decode.applies(block, rows, context)  # gradients are on
    with torch.no_grad():
        assert block_decode.applies(block, rows, context)
        assert not block_decode.applies(block, rows[:4], context)  # few rows have a better way
        assert not block_decode.applies(block, torch.zeros(ROWS, 2, 32), context)
        assert not block_decode.applies(block, rows.bfloat16(), context)
        assert not block_decode.applies(block, rows, Context(cache.rope[:, :1], cache=cache))
        assert not block_decode.applies(block.train(), rows, context)  # a balancing strategy may hang in the gate
        assert not block_decode.applies(to_fp8(small_model()).eval().model.layers[1], rows, context)
