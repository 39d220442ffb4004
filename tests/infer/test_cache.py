"""Naive, absorbed and cached attention are one function: logits of random models agree to 1e-5 in FP32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.model.attention import LatentCache

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


@st.composite
def models(draw) -> Transformer:
    """A random small model: any head sizes, groups, ranks, dense layers, shared experts, YaRN or not."""
    groups = draw(st.sampled_from([1, 2, 4]))
    sizes = st.sampled_from([4, 8, 12, 20])
    config = ModelConfig.from_dict(dict(
        vocab_size=50, hidden_size=32, num_hidden_layers=draw(st.integers(1, 3)),
        first_k_dense_replace=draw(st.integers(0, 1)), intermediate_size=40, moe_intermediate_size=draw(sizes),
        n_routed_experts=4 * groups, num_experts_per_tok=draw(st.integers(1, 4)), n_group=groups,
        topk_group=draw(st.integers(1, groups)), n_shared_experts=draw(st.integers(0, 2)),
        q_lora_rank=draw(st.sampled_from([None, 16])), kv_lora_rank=draw(sizes), qk_nope_head_dim=draw(sizes),
        qk_rope_head_dim=draw(st.sampled_from([2, 4, 8])), v_head_dim=draw(sizes),
        num_attention_heads=draw(st.integers(1, 4)), num_nextn_predict_layers=draw(st.integers(0, 1)),
        rope_scaling=draw(st.sampled_from([None, YARN])), max_position_embeddings=64, initializer_range=0.1,
    ))  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 1000)))
    return Transformer(config)


def no_cache(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, mtp=False).logits


@settings(max_examples=25, deadline=None)
@given(model=models(), batch=st.integers(1, 3), length=st.integers(1, 12))
@torch.no_grad()
def test_absorbed_equals_naive(model, batch, length):
    tokens = torch.randint(0, 50, (batch, length))
    naive, absorbed = (model(tokens, mtp=False, absorb=absorb).logits for absorb in (False, True))
    torch.testing.assert_close(absorbed, naive, **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(model=models(), batch=st.integers(1, 3), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=5), data=st.data())
@torch.no_grad()
def test_chunked_prefill_equals_the_whole(model, batch, cuts, data):
    """Chunks of any size, one token included, each naive or absorbed, give every position's logits."""
    tokens = torch.randint(0, 50, (batch, sum(cuts)))
    cache = LatentCache(model.cfg, batch=batch, max_length=sum(cuts))
    absorb = st.sampled_from([None, False, True])
    chunks = [model(part, cache=cache, absorb=data.draw(absorb)).logits for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), no_cache(model, tokens), **TOLERANCE)
    assert cache.lengths.tolist() == [sum(cuts)] * batch


@settings(max_examples=25, deadline=None)
@given(model=models(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), steps=st.integers(1, 4))
@torch.no_grad()
def test_ragged_batch_equals_each_row_alone(model, lengths, steps):
    """Right-padded prompts, then single tokens: every row's logits are those of its own text, whatever the padding."""
    batch, longest = len(lengths), max(lengths)
    prompts = torch.randint(0, 50, (batch, longest))  # what lies past a row's length is padding, and not zero
    new = torch.randint(0, 50, (batch, steps))
    cache = LatentCache(model.cfg, batch=batch, max_length=longest + steps)
    got = [model(prompts, cache=cache, n_valid=torch.tensor(lengths), last_only=True).logits]
    got += [model(new[:, i : i + 1], cache=cache, last_only=True).logits for i in range(steps)]
    for row, length in enumerate(lengths):
        text = torch.cat([prompts[row, :length], new[row]]).unsqueeze(0)
        expected = no_cache(model, text)[0, length - 1 :]
        torch.testing.assert_close(torch.cat(got, dim=1)[row], expected, **TOLERANCE)
    assert cache.lengths.tolist() == [length + steps for length in lengths]


@settings(max_examples=15, deadline=None)
@given(model=models(), chunks=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=4))
@torch.no_grad()
def test_ragged_chunks_equal_each_row_alone(model, chunks):
    """Rows that take different numbers of tokens in every chunk (prompts of unequal length, prefilled in pieces)."""
    total = sum(max(pair[0], pair[1]) for pair in chunks)
    texts = torch.randint(0, 50, (2, total))
    cache = LatentCache(model.cfg, batch=2, max_length=total)
    used, got = [0, 0], [[], []]
    for counts in chunks:
        width = max(counts)
        padded = torch.stack([torch.cat([texts[row, used[row] : used[row] + counts[row]],
                                         torch.full((width - counts[row],), 7)]) for row in range(2)])  # fmt: skip
        logits = model(padded, cache=cache, n_valid=torch.tensor(counts)).logits
        for row in range(2):
            got[row].append(logits[row, : counts[row]])
            used[row] += counts[row]
    for row in range(2):
        if used[row]:
            expected = no_cache(model, texts[row : row + 1, : used[row]])[0]
            torch.testing.assert_close(torch.cat(got[row]), expected, **TOLERANCE)


@torch.no_grad()
def test_rows_can_be_selected_in_any_order():
    torch.manual_seed(0)
    config = ModelConfig.preset("toy", vocab_size=50, num_hidden_layers=2)
    model, lengths = Transformer(config), [2, 6, 4]
    prompts, new = torch.randint(0, 50, (3, 6)), torch.randint(0, 50, (3, 1))
    cache = LatentCache(config, batch=3, max_length=8)
    model(prompts, cache=cache, n_valid=torch.tensor(lengths))
    whole = LatentCache(config, batch=3, max_length=8)
    model(prompts, cache=whole, n_valid=torch.tensor(lengths))
    cache.select(torch.tensor([2, 0]))
    assert cache.lengths.tolist() == [4, 2] and cache.filled == 4 and cache.ragged
    got = model(new[[2, 0]], cache=cache).logits
    torch.testing.assert_close(got, model(new, cache=whole).logits[[2, 0]], **TOLERANCE)
    cache.select(torch.tensor([0]))
    assert cache.filled == 5 and not cache.ragged


@torch.no_grad()
def test_the_cache_holds_the_latent_and_the_shared_key_and_nothing_else():
    config = ModelConfig.preset("toy", vocab_size=50)
    cache = LatentCache(config, batch=2, max_length=10)
    assert cache.data.shape == (config.num_hidden_layers, 2, 10, config.kv_lora_rank + config.qk_rope_head_dim)
    bytes_per_token = cache.data.to(torch.bfloat16).nbytes // 20
    assert bytes_per_token == config.kv_bytes_per_token()


@torch.no_grad()
def test_a_full_cache_refuses_more():
    config = ModelConfig.preset("toy", vocab_size=50)
    cache = LatentCache(config, batch=1, max_length=3)
    model = Transformer(config)
    model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="holds 3 tokens a row, 2 are filled: 2 more do not fit"):
        model(torch.tensor([[3, 4]]), cache=cache)
