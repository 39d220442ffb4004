"""The whole model: document masks through every part, recomputation, tied heads, dtypes, initialisation, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.model.attention import LatentCache
from minids.model.transformer import document_positions

CFG = ModelConfig.preset("toy", vocab_size=50, initializer_range=0.1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(CFG)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_packed_documents_equal_documents_alone(lengths, seed):
    torch.manual_seed(seed)
    model = Transformer(CFG)
    documents = [torch.randint(0, 50, (1, n)) for n in lengths]
    ids = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)  # ids may come back
    packed = model(torch.cat(documents, 1), document_ids=ids)
    alone = [model(document) for document in documents]
    torch.testing.assert_close(packed.logits, torch.cat([o.logits for o in alone], 1), atol=2e-5, rtol=1e-4)
    start = 0
    for n, out in zip(lengths, alone, strict=True):
        if n > 1:  # positions whose token i+1 lies in the same document
            torch.testing.assert_close(packed.mtp_logits[0][:, start : start + n - 1], out.mtp_logits[0],
                                       atol=2e-5, rtol=1e-4)
        start += n


def test_positions_and_mask_by_hand():
    positions, mask = document_positions(torch.tensor([[7, 7, 3, 3, 3, 7]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0],
                                         [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]


def test_document_mask_off_keeps_attention_and_masks_mtp_labels(model):
    rows, ids = torch.randint(0, 50, (1, 9)), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    plain = model(rows[:, :-1], labels=rows[:, 1:])
    unmasked = model(rows[:, :-1], labels=rows[:, 1:], document_ids=ids, document_mask=False)
    masked = model(rows[:, :-1], labels=rows[:, 1:], document_ids=ids)
    torch.testing.assert_close(unmasked.loss, plain.loss)
    assert abs(masked.loss - plain.loss) > 1e-4 and unmasked.mtp_loss < plain.mtp_loss  # two labels fewer, same divisor


def test_recompute_gives_the_same_gradients(model):
    rows = torch.randint(0, 50, (2, 17))
    found = []
    for recompute in (False, True):
        model.zero_grad()
        out = model(rows[:, :-1], labels=rows[:, 1:], recompute=recompute)
        (out.loss + out.mtp_loss).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert out.loads().sum() == 3 * 2 * 16 * 4 + 2 * 15 * 4  # counted once, though run twice
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=0, rtol=0, msg=name)


def test_absorbed_equals_naive_in_value_and_gradient(model):
    tokens = torch.randint(0, 50, (2, 11))
    weight = model.main_layers[1].self_attn.kv_b_proj.weight
    found = [(out.logits, torch.autograd.grad(out.logits.square().sum(), weight)[0])
             for out in (model(tokens), model(tokens, absorb=True))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_cache_holds_the_normed_latent_and_one_rotated_key(model):
    tokens = torch.randint(0, 50, (2, 7))
    cache = LatentCache(CFG, 2, 16)
    with torch.no_grad():
        model(tokens, cache=cache)
        x = model.main_layers[0].input_layernorm(model.model.embed_tokens(tokens))
        attention = model.main_layers[0].self_attn
        c, k = attention.kv_a_proj_with_mqa(x).split([32, 16], -1)
        torch.testing.assert_close(cache.data[0, :, :7, :32], attention.kv_a_layernorm(c))
        torch.testing.assert_close(cache.data[0, :, :7, 32:].norm(dim=-1), k.norm(dim=-1))
    assert cache.data.shape == (4, 2, 16, 48) and cache.data[:, :, 7:].abs().max() == 0
    assert cache.data[:, 0, 0].numel() * 2 == CFG.kv_bytes_per_token()


def test_initialisation():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("toy", initializer_range=0.006))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif p.numel() > 1000:
            assert abs(p.std().item() / 0.006 - 1) < 0.1 and abs(p.mean().item()) < 0.001, name
    torch.manual_seed(0)
    again = Transformer(ModelConfig.preset("toy", initializer_range=0.006))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_tied_head_is_one_parameter():
    model = Transformer(CFG.replace(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows = torch.randint(0, 50, (1, 5))
    model(rows[:, :-1], labels=rows[:, 1:]).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_bf16_and_autocast_are_near_float32(model):
    rows = torch.randint(0, 50, (2, 33))
    full = model(rows[:, :-1], labels=rows[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(rows[:, :-1], labels=rows[:, 1:])
    low = Transformer(CFG)
    low.load_state_dict(model.state_dict())
    low = low.to(torch.bfloat16)(rows[:, :-1], labels=rows[:, 1:])
    for out in (cast, low):
        assert out.loss.dtype == torch.float32 and abs(out.loss - full.loss) < 0.02
        out.loss.backward()


@pytest.mark.parametrize("arguments, message", [
    (dict(tokens=torch.zeros(4, dtype=torch.int64)), r"tokens of shape \(4,\)"),
    (dict(tokens=torch.zeros(1, 4)), r"torch.float32: allowed is \(B, T\) int64"),
    (dict(tokens=torch.zeros(1, 0, dtype=torch.int64)), r"tokens of shape \(1, 0\)"),
    (dict(tokens=torch.zeros(1, 2049, dtype=torch.int64)), "2049 tokens: allowed are max_position_embeddings=2048"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 3, dtype=torch.int64)), r"labels of shape"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4)), "torch.float32: allowed is .* int64"),
    (dict(tokens=torch.tensor([[1, 50]])), "tokens from 1 to 50: allowed are 0 to 49"),
    (dict(tokens=torch.full((1, 4), -1)), "tokens from -1 to -1: allowed are 0 to"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), labels=torch.full((1, 4), -1)), "labels from -1 to -1"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), cache=LatentCache(CFG, 1, 8), n_valid=torch.tensor([5])),
     "n_valid from 5 to 5: allowed are 0 to 4"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), cache=LatentCache(CFG, 1, 8), n_valid=torch.tensor([-1])),
     "n_valid from -1 to -1"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), document_ids=torch.zeros(1, 6)), r"document_ids of shape \(1, 6\)"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), cache=LatentCache(CFG, 2, 8)), "cache of 2 rows"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), n_valid=torch.tensor([2])), "together with a cache"),
    (dict(tokens=torch.zeros(1, 4, dtype=torch.int64), cache=LatentCache(CFG, 1, 3)), "holds 3 tokens a row"),
])  # fmt: skip
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(arguments.pop("tokens"), **arguments)


def test_cache_refuses_lengths_the_model_does_not_have():
    with pytest.raises(ValueError, match="max_length=2049: allowed is 1 to max_position_embeddings=2048"):
        LatentCache(CFG, 1, 2049)
