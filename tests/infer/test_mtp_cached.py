"""MTP over a cache is the uncached model's MTP, whatever the calls that the text arrives in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.model.cache import LatentCache

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


@st.composite
def models(draw) -> Transformer:
    """A random small model of depth 1 to 3, FP32; norms that are not 1, so that one left out must show."""
    config = ModelConfig.preset(
        "toy", vocab_size=50, hidden_size=32, num_hidden_layers=2, kv_lora_rank=12, intermediate_size=40,
        q_lora_rank=draw(st.sampled_from([None, 16])), num_nextn_predict_layers=draw(st.integers(1, 3)),
        mtp_hidden_norm=draw(st.booleans()), rope_scaling=draw(st.sampled_from([None, YARN])),
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 1000)))
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def check_row(model: Transformer, text: torch.Tensor, got: list[torch.Tensor]) -> None:
    """``got``: depth k's logits by token, (T, V); the model without a cache has token j = i + k at position i."""
    expected = model(text.unsqueeze(0)).mtp_logits
    assert len(expected) == min(len(text) - 1, model.cfg.num_nextn_predict_layers)
    for depth, logits in enumerate(expected, start=1):
        torch.testing.assert_close(got[depth - 1][depth:], logits[0], **TOLERANCE)


@settings(max_examples=40)
@given(model=models(), data=st.data(), chunks=st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6))  # fmt: skip
@torch.no_grad()
def test_ragged_chunks_equal_each_row_alone(model, data, chunks):
    """Three rows take different numbers of tokens a call, none included; calls of one token decode (folded or absorbed),
    others prefill, naive or absorbed."""
    total = sum(max(counts) for counts in chunks)
    texts = torch.randint(0, 50, (3, total))
    cache = LatentCache(model.cfg, batch=3, max_length=total, mtp=True)
    used, got = [0] * 3, [[[] for _ in model.mtp_modules] for _ in range(3)]
    for counts in chunks:
        width = max(counts)
        padded = torch.full((3, width), 7)
        for row in range(3):
            padded[row, : counts[row]] = texts[row, used[row] : used[row] + counts[row]]
        out = model(padded, cache=cache, n_valid=torch.tensor(counts), mtp=True,
                    absorb=data.draw(st.sampled_from([None, False, True])))  # fmt: skip
        assert len(out.routing) == len(model.routers())
        for row in range(3):
            used[row] += counts[row]
            for depth, logits in enumerate(out.mtp_logits):
                got[row][depth].append(logits[row, : counts[row]])
    for row in range(3):
        if used[row] > 1:
            check_row(model, texts[row, : used[row]], [torch.cat(parts) for parts in got[row]])


@settings(max_examples=20)
@given(model=models(), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6))
@torch.no_grad()
def test_rows_of_equal_length(model, cuts):
    """Without n_valid: the main layers need no mask, the MTP layers do."""
    texts = torch.randint(0, 50, (2, sum(cuts)))
    cache = LatentCache(model.cfg, batch=2, max_length=sum(cuts), mtp=True)
    outs = [model(part, cache=cache, mtp=True) for part in texts.split(cuts, dim=1)]
    for row in range(2 if sum(cuts) > 1 else 0):
        joined = [torch.cat([out.mtp_logits[k][row] for out in outs]) for k in range(len(model.mtp_modules))]
        check_row(model, texts[row], joined)


@torch.no_grad()
def test_selected_rows_go_on_with_their_own_past():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("toy", vocab_size=50, num_nextn_predict_layers=2, initializer_range=0.1))
    texts, lengths = torch.randint(0, 50, (3, 9)), [2, 6, 4]
    cache = LatentCache(model.cfg, batch=3, max_length=9, mtp=True)
    model(texts[:, :6], cache=cache, n_valid=torch.tensor(lengths), mtp=True)
    cache.select(torch.tensor([2, 0]))
    more = torch.stack([texts[2, 4:7], texts[0, 2:5]])
    got = model(more, cache=cache, mtp=True).mtp_logits
    for place, (row, length) in enumerate([(2, 4), (0, 2)]):
        expected = model(texts[row : row + 1, : length + 3]).mtp_logits
        for depth in (1, 2):
            torch.testing.assert_close(got[depth - 1][place], expected[depth - 1][0, length - depth :], **TOLERANCE)


def test_a_cache_without_room_for_mtp_is_refused():
    model = Transformer(ModelConfig.preset("toy", vocab_size=50))
    with pytest.raises(ValueError, match=r"mtp=True with a cache made without the MTP layers"):
        model(torch.tensor([[1, 2]]), cache=LatentCache(model.cfg, 1, 8), mtp=True)
