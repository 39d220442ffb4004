"""The three kinds of text: what they are, and that rows, split and counts hold together."""

import numpy as np
import pytest

from minids.experiments.domains import KINDS, build_domains, split_source, train_bpe

SOURCE = '''
"""{}"""
import os


def f(x):
    """Short."""
    return x  # a comment


class A:
    """{}"""
'''.format("A long story. " * 30, "Another one. " * 30)


@pytest.fixture(scope="module")
def domains():
    return build_domains(32, 512, 30_000)


def test_code_and_prose_are_taken_apart():
    code, prose = split_source(SOURCE)
    assert code == "import os\n\ndef f(x):\n    return x\n\nclass A:\n    pass"
    assert [text[:7] for text in prose] == ["A long ", "Another"]
    assert split_source("def broken(:") == ("", [])


def test_rows_are_of_one_length_number_and_vocabulary(domains):
    for rows in (domains.train, domains.valid):
        assert len({r.shape for r in rows.values()}) == 1 and tuple(rows) == KINDS
        assert all(r.shape[1] == 33 and r.dtype == np.int64 and 0 <= r.min() and r.max() < 512 for r in rows.values())
    for kind in KINDS:
        assert domains.counts[kind]["characters"] == 30_000
        assert not set(map(bytes, domains.train[kind])) & set(map(bytes, domains.valid[kind]))


def test_it_is_the_same_every_time(domains):
    again = build_domains(32, 512, 30_000)
    assert all(np.array_equal(again.train[kind], domains.train[kind]) for kind in KINDS)


def test_the_kinds_are_told_apart_by_their_tokens(domains):
    """Unigram counts of the first half classify the rows of the second half: the kinds differ."""
    def counts(rows):
        return np.stack([np.bincount(row, minlength=512) for row in rows])

    half = {kind: len(rows) // 2 for kind, rows in domains.train.items()}
    model = np.stack([np.log((counts(domains.train[k][: half[k]]).sum(0) + 0.1) / half[k]) for k in KINDS])
    for place, kind in enumerate(KINDS):
        guess = (counts(domains.train[kind][half[kind] :]) @ model.T).argmax(1)
        assert (guess == place).mean() > 0.8


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="characters=20 of each kind fill 0 rows of 64 tokens"):
        build_domains(64, 512, 20)


def test_bpe_returns_the_text():
    tokenizer = train_bpe(["def f(x): return x"] * 3, 300)
    assert tokenizer.decode(tokenizer.encode("été = f(1)\n").ids) == "été = f(1)\n"
