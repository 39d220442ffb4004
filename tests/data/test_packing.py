"""Split, FIM and rows: every token once, nothing in two splits, and a batch that depends on its arguments alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.data import Document, PackedRows
from minids.data.packing import PackingError, Stream, encode_stream, fim_cut, split_documents


def documents_of(stream: Stream) -> list[list[int]]:
    return [part.tolist() for part in np.split(stream.tokens, stream.starts[1:])]


@st.composite
def streams(draw):
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=20))
    n_tokens = sum(lengths)
    sequence_length = draw(st.integers(1, n_tokens - 1))
    starts = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    seed = draw(st.integers(0, 2**32))
    return PackedRows(np.arange(n_tokens, dtype=np.uint16), starts, sequence_length, seed), lengths


@given(streams())
def test_every_token_but_the_first_is_a_label_once(case):
    rows, lengths = case
    tokens, _ = rows.row(np.arange(rows.n_rows))
    labels, inputs = tokens[:, 1:].ravel(), tokens[:, :-1].ravel()
    n_tokens = sum(lengths)
    assert labels.tolist() == list(range(1, n_tokens - rows.dropped_tokens))
    assert inputs.tolist() == list(range(0, n_tokens - rows.dropped_tokens - 1))
    assert 0 <= rows.dropped_tokens < rows.sequence_length


@given(streams())
def test_document_ids_are_the_documents(case):
    rows, lengths = case
    expected = np.repeat(np.arange(len(lengths)), lengths)  # the naive form: one id a token
    tokens, document_ids = rows.row(np.arange(rows.n_rows))
    assert (document_ids == expected[tokens]).all()
    assert tokens.dtype == document_ids.dtype == np.int64
    assert tokens.shape == document_ids.shape == (rows.n_rows, rows.sequence_length + 1)


@given(streams(), st.data())
def test_batches_are_pure_and_cut_anywhere(case, data):
    rows, _ = case
    total = 3 * rows.n_rows
    once, _ = rows.batch(0, total)
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=5))) if total > 1 else []
    edges = [0, *cuts, total]
    fresh = PackedRows(rows.tokens, rows.starts, rows.sequence_length, rows.seed)
    spans = list(zip(edges, edges[1:], strict=False))
    parts = {begin: fresh.batch(begin, end - begin)[0] for begin, end in reversed(spans)}  # backwards: no hidden state
    assert (np.concatenate([parts[begin] for begin, _ in spans]) == once).all()


@given(streams())
def test_an_epoch_is_a_permutation_of_the_rows(case):
    rows, _ = case
    everything = sorted(map(tuple, rows.row(np.arange(rows.n_rows))[0].tolist()))
    for epoch in range(3):
        assert sorted(map(tuple, rows.batch(epoch * rows.n_rows, rows.n_rows)[0].tolist())) == everything


def test_epochs_and_seeds_have_their_own_order():
    def order(seed, epoch):
        rows = PackedRows(np.arange(1001, dtype=np.uint16), np.zeros(1, np.int64), 10, seed)
        return rows.batch(100 * epoch, 100)[0][:, 0].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert [value // 10 for value in order(0, 0)[:6]] == [11, 92, 3, 20, 13, 2]  # in every version of numpy


def test_impossible_rows_are_refused():
    tokens, starts = np.arange(10, dtype=np.uint16), np.zeros(1, np.int64)
    assert PackedRows(tokens, starts, 9).n_rows == 1
    with pytest.raises(PackingError, match=r"10 tokens do not fill a row of sequence_length \+ 1 = 11"):
        PackedRows(tokens, starts, 10)
    with pytest.raises(PackingError, match="sequence_length=0: at least 1"):
        PackedRows(tokens, starts, 0)
    for position, count in ((-1, 1), (0, 0)):
        with pytest.raises(PackingError, match=f"position={position}, rows={count}"):
            PackedRows(tokens, starts, 3).batch(position, count)
    for index in (-1, 3, np.array([0, 3])):
        with pytest.raises(PackingError, match="rows are 0 to 2"):
            PackedRows(tokens, starts, 3).row(index)


@settings(deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=50), min_size=2, max_size=30, unique=True),
    st.floats(0.01, 0.9),
    st.integers(0, 9),
)
def test_split_puts_each_document_in_one_place(texts, fraction, seed):
    documents = [Document(str(n), text) for n, text in enumerate(texts)]
    train, valid = split_documents(documents, fraction, seed)
    assert sorted(d.text for d in train + valid) == sorted(texts)
    assert train and valid
    assert len(valid) == 1 or sum(d.n_bytes for d in valid) <= fraction * sum(d.n_bytes for d in documents)
    assert split_documents(documents[::-1], fraction, seed) == (train, valid)


def test_split_is_shuffled_by_the_seed(documents):
    train, valid = split_documents(documents, 0.2, seed=0)
    assert 6 <= len(valid) <= 8
    other, _ = split_documents(documents, 0.2, seed=1)
    places = [documents.index(document) for document in train]
    assert places != sorted(places) and places != [documents.index(document) for document in other]


def test_one_document_cannot_be_split():
    with pytest.raises(PackingError, match=r"1 document\(s\) after filtering"):
        split_documents([Document("a", "text")], 0.1, 0)


def test_a_stream_is_bos_text_eos(documents, tokenizer):
    stream = encode_stream(documents, tokenizer)
    assert stream.tokens.dtype == np.uint16 and stream.fim_documents == 0
    for document, tokens in zip(documents, documents_of(stream), strict=True):
        assert (tokens[0], tokens[-1]) == (0, 1)
        assert tokens[1:-1] == tokenizer.encode(document.text)


def undo_fim(tokens: list[int], tokenizer) -> str:
    """The text of a document in PSM order, from its tokens alone."""
    assert tokens[0] == tokenizer.bos_id and tokens[1] == tokenizer.fim_begin_id and tokens[-1] == tokenizer.eos_id
    hole, end = tokens.index(tokenizer.fim_hole_id), tokens.index(tokenizer.fim_end_id)
    assert hole < end
    prefix, suffix, middle = tokens[2:hole], tokens[hole + 1 : end], tokens[end + 1 : -1]
    assert not set(prefix + suffix + middle) & {0, 1, 2, 3, 4}
    return tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(min_size=2, max_size=60), min_size=1, max_size=10),
    st.integers(0, 100),
    st.sampled_from([0.0, 1.0]),
)
def test_fim_can_be_undone(tokenizer, texts, seed, split_rate):
    made = [Document(str(n), text) for n, text in enumerate(texts)]
    stream = encode_stream(made, tokenizer, fim_rate=1.0, split_rate=split_rate, seed=seed)
    assert stream.fim_documents == len(made)
    assert [undo_fim(tokens, tokenizer) for tokens in documents_of(stream)] == texts


def test_fim_takes_its_share_of_documents_and_cuts_anywhere():
    made = [Document(str(n), f"{n:04}" * 25) for n in range(3000)]
    cuts = [cut for document in made if (cut := fim_cut(document, 0.1, seed=0))]
    assert len(cuts) == pytest.approx(300, abs=70)  # 4.3 standard deviations
    first, last = np.array(cuts).T
    assert (first <= last).all() and first.min() >= 0 and last.max() <= 100
    # The smaller and the larger of two uniform numbers lie at 1/3 and 2/3 on average.
    assert first.mean() == pytest.approx(33.3, abs=6) and last.mean() == pytest.approx(66.7, abs=6)
    assert Counter(fim_cut(d, 0.0, 0) for d in made) == {None: 3000}


def test_a_documents_fim_does_not_depend_on_its_neighbours(documents, tokenizer):
    together = documents_of(encode_stream(documents, tokenizer, fim_rate=0.5, split_rate=0.5, seed=3))
    alone = [encode_stream([d], tokenizer, fim_rate=0.5, split_rate=0.5, seed=3).tokens.tolist() for d in documents]
    assert together == alone
    assert {tokens[1] == tokenizer.fim_begin_id for tokens in together} == {True, False}


def test_fim_needs_fim_tokens(documents, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "fim_hole_id", None)
    with pytest.raises(PackingError, match="fim_rate=0.1: this tokenizer has no FIM tokens; set fim_rate to 0"):
        encode_stream(documents, tokenizer, fim_rate=0.1)
    assert encode_stream(documents, tokenizer).fim_documents == 0
