"""Folded decoding (model/attention_decode.py) is the same function, applies where it should, and never goes stale."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.model import attention_decode
from minids.model.attention import MLA, LatentCache

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


def small_model(seed: int = 0, **overrides) -> Transformer:
    """Two layers, norms that are not 1: a norm's scale that is left out of the fold must show."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=50, num_hidden_layers=2, initializer_range=0.1, kv_lora_rank=12, q_lora_rank=16,
                 max_position_embeddings=64, rope_scaling=None)  # fmt: skip
    model = Transformer(ModelConfig.preset("toy", **{**shape, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def step(model: Transformer, cache: LatentCache, tokens: torch.Tensor, fold: bool) -> torch.Tensor:
    """One decoding step's logits on a copy of the cache, folds and all."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if not fold:
            patch.setattr(attention_decode, "applies", lambda *args: False)
        twin = copy.copy(cache)
        twin.data = cache.data.clone()
        return model(tokens, cache=twin).logits


def filled(model: Transformer, lengths: list[int]) -> LatentCache:
    cache = LatentCache(model.cfg, batch=len(lengths), max_length=max(lengths) + 4)
    n_valid = None if len(set(lengths)) == 1 else torch.tensor(lengths)
    with torch.no_grad():
        model(torch.randint(0, 50, (len(lengths), max(lengths))), cache=cache, n_valid=n_valid)
    return cache


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.one_of(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.just([5] * 12), st.just([1, 7] * 6)),
    rank=st.sampled_from([2, 12, 20]), query=st.sampled_from([None, 16]), scaling=st.sampled_from([None, YARN]),
    seed=st.integers(0, 1000), new=st.integers(1, 4),
)  # fmt: skip
def test_folded_equals_absorbed(lengths, rank, query, scaling, seed, new):
    """One token a row, and several: drafts that are verified are causal among themselves."""
    model = small_model(seed, kv_lora_rank=rank, q_lora_rank=query, rope_scaling=scaling)
    cache, tokens = filled(model, lengths), torch.randint(0, 50, (len(lengths), new))
    plain, folded = step(model, cache, tokens, fold=False), step(model, cache, tokens, fold=True)
    assert len(cache.folded) == model.cfg.num_hidden_layers
    torch.testing.assert_close(folded, plain, **TOLERANCE)


def other_state(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: value * 1.5 for name, value in model.state_dict().items()}


def train_a_step(model: Transformer) -> None:
    """With gradients, by an optimizer that writes in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    tokens = torch.randint(0, 50, (2, 6))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()


def each_weight_in_turn(change):
    """Applies ``change(module)`` to one projection, so that each of them is seen to be watched."""

    def apply(model: Transformer, name: str) -> None:
        with torch.no_grad():
            change(getattr(model.model.layers[1].self_attn, name))

    return apply


PROJECTIONS = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
IN_PLACE = each_weight_in_turn(lambda module: module.weight.copy_(module.weight.flip(0)))
NEW_DATA = each_weight_in_turn(lambda module: setattr(module.weight, "data", module.weight.data.flip(0)))
NEW_PARAMETER = each_weight_in_turn(lambda module: setattr(module, "weight", torch.nn.Parameter(module.weight.flip(0))))
CHANGES = {
    "training": train_a_step,
    "load_state_dict": lambda model: model.load_state_dict(other_state(model)),
    "load_state_dict, assigned": lambda model: model.load_state_dict(other_state(model), assign=True),
    "reset": lambda model: model.reset_parameters(),
    "to bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "the softmax scale": lambda model: [setattr(m, "scale", 0.5) for m in model.modules() if isinstance(m, MLA)],
    **{f"{name} in place": lambda model, name=name: IN_PLACE(model, name) for name in PROJECTIONS},
    **{f"{name}.data": lambda model, name=name: NEW_DATA(model, name) for name in PROJECTIONS},
    **{f"{name}, a new parameter": lambda model, name=name: NEW_PARAMETER(model, name) for name in PROJECTIONS},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fold_never_outlives_its_weights(change):
    """The weights change in the middle of a text: the next step is the new model's, by the same cache."""
    model = small_model()
    cache, tokens = filled(model, [5, 5]), torch.randint(0, 50, (2, 1))
    before = step(model, cache, tokens, fold=True)
    made = dict(cache.folded)
    assert step(model, cache, tokens, fold=True).equal(before) and cache.folded == made  # made once
    CHANGES[change](model)
    after, plain = step(model, cache, tokens, fold=True), step(model, cache, tokens, fold=False)
    torch.testing.assert_close(after, plain, **TOLERANCE)
    assert cache.folded[1, False] is not made[1, False] and (after - before).abs().max() > 1e-3


def test_few_and_many_tokens_have_a_fold_each():
    """As rows finish, or accept more or fewer drafts, both are used in turn and neither is made twice."""
    model = small_model()
    cache, tokens = filled(model, [4] * 12), torch.randint(0, 50, (12, 1))
    step(model, cache, tokens, fold=True)
    assert set(cache.folded) == {(0, True), (1, True)} and cache.folded[0, True].wide
    made = cache.folded[0, True]
    cache.select(torch.tensor([3]))
    torch.testing.assert_close(step(model, cache, tokens[3:4], fold=True), step(model, cache, tokens[3:4], fold=False),
                               **TOLERANCE)  # fmt: skip
    assert not cache.folded[0, False].wide and cache.folded[0, True] is made


def test_where_it_applies():
    model, one, two = small_model(), torch.zeros(3, 1, 64), torch.zeros(3, 22, 64)
    mla = model.model.layers[0].self_attn
    assert not attention_decode.applies(mla, one)  # gradients are on
    with torch.no_grad():
        assert attention_decode.applies(mla, one) and not attention_decode.applies(mla, two)
        with torch.autocast("cpu", torch.bfloat16):
            assert not attention_decode.applies(mla, one)
        assert not attention_decode.applies(mla, one.bfloat16())
        odd = small_model(kv_lora_rank=11, num_hidden_layers=1)
        assert not attention_decode.applies(odd.model.layers[0].self_attn, one)
        with torch.inference_mode():
            born_inside = small_model(num_hidden_layers=1)
        assert not attention_decode.applies(born_inside.model.layers[0].self_attn, one)


def test_the_published_model_is_not_folded():
    """At V3's size a fold would read a hundred million numbers more; at the size of this package's models it pays."""
    with torch.device("meta"):
        v3 = MLA(ModelConfig.preset("v3"))
    assert attention_decode.more_numbers(v3) > 50 * attention_decode.EXTRA
    assert attention_decode.more_numbers(small_model().model.layers[0].self_attn) < attention_decode.EXTRA


def test_nothing_is_added_to_the_state_dict():
    model = small_model()
    names = set(model.state_dict())
    cache = filled(model, [3])
    step(model, cache, torch.zeros(1, 1, dtype=torch.int64), fold=True)
    assert set(model.state_dict()) == names
