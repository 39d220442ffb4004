"""From a corpus to rows, as the trainer does it: the default source, the cache, and settings that are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minids.data import BytePairTokenizer, Data, DataConfig, build_data, read_corpus

SMALL = DataConfig(max_bytes=400_000, vocab_size=600, fim_rate=0.4, seed=5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def data(cache) -> Data:
    return build_data(replace(SMALL, cache_dir=cache), sequence_length=64, progress=False)


def texts_of(data: Data, split: str) -> list[str]:
    """Texts from the tokens, PSM order undone."""
    rows, tokenizer, texts = getattr(data, split), data.tokenizer, []
    for part in np.split(rows.tokens, rows.starts[1:]):
        text = tokenizer.decode(part).removeprefix("<｜begin▁of▁sentence｜>").removesuffix("<｜end▁of▁sentence｜>")
        if text.startswith("<｜fim▁begin｜>"):
            prefix, rest = text.removeprefix("<｜fim▁begin｜>").split("<｜fim▁hole｜>")
            suffix, middle = rest.split("<｜fim▁end｜>")
            text = prefix + middle + suffix
        texts.append(text)
    return texts


def test_default_corpus_arrives_whole(data):
    train, valid = texts_of(data, "train"), texts_of(data, "valid")
    assert not set(train) & set(valid)
    read = {document.text for document in read_corpus("stdlib", max_bytes=400_000, seed=5)}
    kept = {text for text in read if len(text.strip()) >= 64}
    assert set(train) | set(valid) == kept and len(train) + len(valid) == len(kept)


def test_stats_are_the_counts(data):
    stats = json.loads(json.dumps(data.stats))
    assert stats["documents_kept"] == stats["documents_read"] - sum(stats["dropped"].values())
    assert stats["documents_kept"] == stats["train"]["documents"] + stats["valid"]["documents"]
    assert stats["bytes_kept"] == stats["train"]["bytes"] + stats["valid"]["bytes"] <= stats["bytes_read"] <= 400_000
    for split in ("train", "valid"):
        rows = getattr(data, split)
        assert stats[split]["tokens"] == len(rows.tokens) == rows.n_rows * 64 + 1 + stats[split]["dropped_tokens"]
        assert stats[split]["fim_documents"] == np.count_nonzero(rows.tokens == data.tokenizer.fim_begin_id)
        for special in (data.tokenizer.bos_id, data.tokenizer.eos_id):
            assert stats[split]["documents"] == np.count_nonzero(rows.tokens == special)
    assert stats["valid"]["fim_documents"] == 0 < stats["train"]["fim_documents"]
    assert stats["vocab_size"] == data.tokenizer.vocab_size == 600
    assert 1.5 < stats["bytes_per_token"] < 4


def test_second_build_reads_the_cache_and_is_equal(data, cache):
    again = build_data(replace(SMALL, cache_dir=cache), sequence_length=64, progress=False)
    assert again.stats["cached"] == {"tokenizer": True, "tokens": True}
    assert {**again.stats, "cached": 0} == {**data.stats, "cached": 0}
    for split in ("train", "valid"):
        for a, b in zip(getattr(again, split).batch(3, 7), getattr(data, split).batch(3, 7), strict=True):
            assert (a == b).all()
    assert again.tokenizer.backend.to_str() == data.tokenizer.backend.to_str()


def test_a_build_without_cache_is_equal(data, tmp_path):
    fresh = build_data(replace(SMALL, cache_dir=str(tmp_path)), sequence_length=64, progress=False)
    assert fresh.stats["cached"] == {"tokenizer": False, "tokens": False}
    assert (fresh.train.tokens == data.train.tokens).all() and (fresh.train.starts == data.train.starts).all()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture
def folder(tmp_path, documents):
    for document in documents:
        (tmp_path / "text" / document.origin).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / document.origin).write_text(document.text)
    return DataConfig(corpus="folder", path=str(tmp_path / "text"), vocab_size=300, valid_fraction=0.2)


def test_changes_are_seen_and_damage_is_repaired(folder, tmp_path):
    def cached(config):
        return build_data(config, 16, progress=False).stats["cached"]

    new, old = {"tokenizer": False, "tokens": False}, {"tokenizer": True, "tokens": True}
    assert (cached(folder), cached(folder)) == (new, old)
    assert cached(replace(folder, fim_rate=0.5)) == {"tokenizer": True, "tokens": False}
    assert cached(replace(folder, vocab_size=301)) == new
    for file in (tmp_path / "cache").rglob("*.*"):
        file.write_bytes(file.read_bytes()[:100])
    assert (cached(folder), cached(folder)) == (new, old)
    (tmp_path / "text" / "made" / "0.py").write_text(
        "a new text, long enough to be kept, in place of the old one here\n"
    )
    assert cached(folder) == new


def test_a_published_tokenizer_is_used_as_it_is(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "published" / "tokenizer.json")
    config = replace(folder, tokenizer=str(tmp_path / "published"))
    built = build_data(config, 16, progress=False)
    assert built.tokenizer.backend.to_str() == tokenizer.backend.to_str() and built.stats["vocab_size"] == 360
    assert not (tmp_path / "cache" / "tokenizers").exists()
    assert isinstance(BytePairTokenizer.load(config.tokenizer), BytePairTokenizer)


def test_faults_of_the_text_are_told(folder):
    with pytest.raises(ValueError, match=r"valid: \d+ tokens do not fill a row of sequence_length \+ 1 = 5001"):
        build_data(replace(folder, valid_fraction=0.02), 5000, progress=False)
    with pytest.raises(ValueError, match=r"0 document\(s\) after filtering"):
        build_data(replace(folder, min_chars=10**6), 16, progress=False)
    with pytest.raises(ValueError, match="sequence_length=0"):
        build_data(folder, 0, progress=False)


def test_a_cache_that_cannot_be_written_is_told_before_reading(tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = DataConfig(corpus="folder", path="/no/such/place", cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="cache_dir='.*file/cache': .*; name another folder by cache_dir or MINIDS_CACHE"):
        build_data(config, 16)


def test_fim_without_fim_tokens_is_refused_before_reading(tokenizer, tmp_path):
    description = json.loads(tokenizer.backend.to_str())
    description["added_tokens"] = description["added_tokens"][:2]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    config = DataConfig(corpus="folder", path="/no/such/place", tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="fim_rate=0.1: .* has no FIM tokens; set fim_rate to 0"):
        build_data(config, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "books"}, "DataConfig.corpus='books': allowed is one of stdlib, packages, folder"),
        ({"path": "x"}, "DataConfig.path='x': allowed is given with corpus='folder', and only then"),
        ({"corpus": "folder"}, "DataConfig.path=None"),
        ({"max_bytes": 0}, "DataConfig.max_bytes=0: allowed is at least 1, or None"),
        ({"min_chars": 0}, "DataConfig.min_chars=0: allowed is at least 1"),
        ({"vocab_size": 100}, "DataConfig.vocab_size=100: allowed is at least 261"),
        ({"fim_rate": 1.5}, "DataConfig.fim_rate=1.5: allowed is from 0 to 1"),
        ({"split_rate": -1}, "DataConfig.split_rate=-1"),
        ({"valid_fraction": 0.0}, "DataConfig.valid_fraction=0.0: allowed is between 0 and 1"),
        ({"seed": -1}, "DataConfig.seed=-1: allowed is at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**settings)
    assert message in str(error.value)
