"""MTP: labels by hand, the loss against its formula, tied embedding and head, no look into the future."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.model.mtp import mtp_labels

CFG = ModelConfig.preset("toy", vocab_size=50, num_nextn_predict_layers=2, num_hidden_layers=2, initializer_range=0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(CFG)


def test_labels_by_hand():
    """Two documents, A = a b c and B = d e f; rows carry the label of the last token too."""
    labels = torch.tensor([[11, 12, 20, 21, 22]])  # inputs 10 11 12 | 20 21, last label 22
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert mtp_labels(labels, 1).tolist() == [[12, 20, 21, 22]]
    assert mtp_labels(labels, 1, ids).tolist() == [[12, -100, -100, 22]]
    assert mtp_labels(labels, 2, ids).tolist() == [[-100, -100, -100]]
    assert mtp_labels(labels, 1, ids[:, :5]).tolist() == [[12, -100, -100, 22]]  # the last label's document is assumed
    ids[0, 5] = 2
    assert mtp_labels(labels, 1, ids).tolist() == [[12, -100, -100, -100]]
    with pytest.raises(ValueError, match="depth=5: allowed is 1 to 4"):
        mtp_labels(labels, 5)


@given(st.lists(st.integers(0, 2), min_size=4, max_size=12), st.integers(1, 3))
def test_labels_never_wrap_or_cross(ids, depth):
    """Against the definition: position i asks for token i+k+1, which must lie in i's run of ids, without a break."""
    row = torch.arange(100, 100 + len(ids))
    got = mtp_labels(row[None, 1:], depth, torch.tensor([ids])) if depth < len(ids) - 1 else None
    if got is None:
        return
    for i, label in enumerate(got[0].tolist()):
        inside = len(set(ids[i : i + depth + 2])) == 1
        assert label == (100 + i + depth + 1 if inside else -100)


def test_loss_is_the_papers(model):
    """[eq. 24, 25]: each depth divided by T although it has T - k terms; the mean over depths."""
    rows = torch.randint(0, 50, (3, 17))
    out, plain = model(rows[:, :-1], labels=rows[:, 1:]), model(rows[:, :-1])
    for k, (loss, logits) in enumerate(zip(out.mtp_losses, plain.mtp_logits, strict=True), start=1):
        assert logits.shape == (3, 16 - k, 50)
        total = F.cross_entropy(logits.flatten(0, 1), rows[:, k + 1 :].flatten(), reduction="sum")
        torch.testing.assert_close(loss, total / (3 * 16))
    torch.testing.assert_close(out.mtp_loss, sum(out.mtp_losses) / 2)
    torch.testing.assert_close(out.loss, F.cross_entropy(plain.logits.flatten(0, 1), rows[:, 1:].flatten()))


def test_module_by_hand(model):
    """Depth 1 rebuilt from its parts: embedding first, hidden second, then one block, its norm, the shared head."""
    tokens = torch.randint(0, 50, (1, 6))
    out, module = model(tokens), model.mtp_modules[0]
    embedded = model.model.embed_tokens(tokens[:, 1:])
    joined = torch.cat([module.enorm(embedded), module.hnorm(out.hidden[:, :-1])], -1)
    from minids.model.block import Block, Context
    from minids.model.rope import rope_table

    context = Context(rope_table(CFG, torch.arange(5)[None]))
    hidden, _ = Block.forward(module, module.eh_proj(joined), context)
    torch.testing.assert_close(model.lm_head(module.shared_head["norm"](hidden)), out.mtp_logits[0])


def test_no_look_into_the_future(model):
    """Depth k at i reads tokens up to i+k: changing token i+k+1 changes nothing at i."""
    tokens = torch.randint(0, 50, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 50
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a.logits[:, :8], b.logits[:, :8])
    for k in (1, 2):
        torch.testing.assert_close(a.mtp_logits[k - 1][:, : 8 - k], b.mtp_logits[k - 1][:, : 8 - k])
        assert (a.mtp_logits[k - 1][:, 8 - k] - b.mtp_logits[k - 1][:, 8 - k]).abs().max() > 1e-4


def test_embedding_and_head_are_the_main_models(model):
    names = [n for n, _ in model.named_parameters() if "embed_tokens" in n or "head" in n]
    assert names == ["model.embed_tokens.weight", "model.layers.2.shared_head.norm.weight",
                     "model.layers.3.shared_head.norm.weight", "lm_head.weight"]
    rows = torch.randint(0, 50, (2, 9))
    out = model(rows[:, :-1], labels=rows[:, 1:])
    for parameter in (model.lm_head.weight, model.model.embed_tokens.weight):
        assert torch.autograd.grad(out.mtp_loss, parameter, retain_graph=True)[0].abs().sum() > 0


def test_switch_for_the_normed_hidden_state():
    rows = torch.randint(0, 50, (2, 9))
    torch.manual_seed(0)
    after = Transformer(CFG)
    before = Transformer(CFG.replace(mtp_hidden_norm=False))
    before.load_state_dict(after.state_dict())
    # hnorm follows, so an RMS norm of weight 1 in front of it changes nothing but eps; other weights do
    for m in (after, before):
        m.model.norm.weight.data = torch.linspace(0.5, 2, 128)
    a, b = after(rows), before(rows)
    torch.testing.assert_close(a.logits, b.logits)
    assert (a.mtp_logits[0] - b.mtp_logits[0]).abs().max() > 1e-3


def test_routers_of_mtp_count_and_can_be_left_out(model):
    tokens = torch.randint(0, 50, (2, 8))
    assert len(model(tokens).routing) == len(model.routers()) == 3
    assert model(tokens).loads().sum(-1).tolist() == [2 * 8 * 4, 2 * 7 * 4, 2 * 6 * 4]
    short = model(tokens, mtp=False)
    assert len(short.routing) == 1 and short.mtp_logits == []
    assert len(model(tokens[:, :2]).mtp_logits) == 1 and model(tokens[:, :1]).mtp_logits == []
