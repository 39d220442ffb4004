"""Byte-level BPE: nothing is lost, nothing depends on order, and text never becomes a control token."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from minids.data import BytePairTokenizer, train_tokenizer
from minids.data.tokenizer import SPECIAL_NAMES, TokenizerError, combined_tokens, split_combined

ROOT = Path(__file__).parents[2]
SPELLINGS = [name for names in SPECIAL_NAMES.values() for name in names]


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("".join(SPELLINGS))
@example("  tab\t\r\n\r\n  \u2028é e\u0301 \u200d🏳️‍🌈 \x00 \uffff İ 数据1234567")
def test_round_trip_of_any_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens, skip_special=True) == text
    assert not {0, 1, 2, 3, 4} & set(tokens)


def test_ids_and_spellings_are_deepseeks(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id) == (2, 3, 4)
    assert tokenizer.decode(range(2)) == "<｜begin▁of▁sentence｜><｜end▁of▁sentence｜>"
    assert tokenizer.decode([2, 3, 4]) == "<｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜>"
    assert tokenizer.decode([0, *tokenizer.encode("x = 1"), 1], skip_special=True) == "x = 1"
    assert tokenizer.vocab_size == 360


def test_merges_are_the_most_frequent_pairs():
    # Worked by hand: aab x4, ab x3. (a, b) occurs 7 times, (a, a) 4 times, then (a, ab) 4 times.
    tokenizer = train_tokenizer(["aab,aab,aab,aab,ab,ab,ab"], vocab_size=261 + 2)
    # Each word takes the comma before it, so pairs with a comma count as well: (",", "a") stays below (a, b).
    assert tokenizer.decode([261]) == "ab"
    assert json.loads(tokenizer.backend.to_str())["model"]["merges"][0] == ["a", "b"]


def test_order_of_texts_and_process_do_not_matter(documents, tokenizer):
    texts = [document.text for document in documents]
    assert train_tokenizer(reversed(texts), 360).backend.to_str() == tokenizer.backend.to_str()
    code = (
        "import sys, json, hashlib; from minids.data import train_tokenizer;"
        "t = train_tokenizer(json.load(sys.stdin), 360); print(hashlib.sha256(t.backend.to_str().encode()).hexdigest())"
    )
    run = [
        subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert run[0].stdout == run[1].stdout


def test_batches_equal_single_encodings(documents, tokenizer):
    texts = [document.text for document in documents] + ["", SPELLINGS[0]]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_threads_are_off_after_a_batch(tokenizer, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer.encode_batch(["a", "b"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    tokenizer.encode_batch(["a", "b"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_fork_after_training_prints_no_warning():
    code = (
        "import os; from minids.data import train_tokenizer; t = train_tokenizer(['some text'] * 100, 270)\n"
        "t.encode_batch(['a b c'] * 100)\n"
        "if (pid := os.fork()) == 0: t.encode_batch(['a b c'] * 100); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    clean = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=60, cwd=ROOT
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "sub" / "tokenizer.json")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["tokenizer.json"]
    for place in (tmp_path / "sub", tmp_path / "sub" / "tokenizer.json"):
        loaded = BytePairTokenizer.load(place)
        assert loaded.encode("def value(index):\n") == tokenizer.encode("def value(index):\n")
        assert loaded.vocab_size == 360 and loaded.eos_id == 1 and loaded.has_fim


def test_transformers_reads_the_same_file(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "tokenizer.json")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "class Layer:\n    index = 12345  # naïve 数据\n"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.convert_tokens_to_ids("<｜fim▁hole｜>") == tokenizer.fim_hole_id


def test_published_layout_with_control_tokens_marked_ordinary(tokenizer, tmp_path):
    """As in DeepSeek's file: FIM and role tokens are not flagged as special, and ordinary added tokens follow them."""
    description = json.loads(tokenizer.backend.to_str())
    for token in description["added_tokens"][2:]:
        token["special"] = False
    backend = Tokenizer.from_str(json.dumps(description))
    backend.add_tokens([AddedToken(name, special=False) for name in ("<｜User｜>", "<think>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = BytePairTokenizer.load(tmp_path)
    assert loaded.vocab_size == 362
    text = "a" + "".join(SPELLINGS) + "<｜User｜>" + "b"
    assert not {0, 1, 2, 3, 4, 360} & set(loaded.encode(text)) and loaded.decode(loaded.encode(text)) == text
    assert loaded.encode("<think>x") == [361, *tokenizer.encode("x")]


def test_bad_tokenizer_files_are_named(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerError, match="tokenizer.json'?: no such file"):
        BytePairTokenizer.load(tmp_path)
    path.write_text('{"model": ')
    with pytest.raises(TokenizerError, match="not a tokenizer.json"):
        BytePairTokenizer.load(path)
    description = json.loads(tokenizer.backend.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] != 1]
    path.write_text(json.dumps(description))
    with pytest.raises(
        TokenizerError, match="tokenizer.json'?: no eos token; one of these is expected: <｜end▁of▁sentence｜>"
    ):
        BytePairTokenizer.load(path)


def test_without_fim_tokens_the_ids_are_none(tokenizer, tmp_path):
    description = json.loads(tokenizer.backend.to_str())
    description["added_tokens"] = description["added_tokens"][:2]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    loaded = BytePairTokenizer.load(tmp_path)
    assert loaded.fim_begin_id is loaded.fim_hole_id is loaded.fim_end_id is None and not loaded.has_fim


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="vocab_size=260: at least 261"):
        train_tokenizer(["text"], 260)
    assert train_tokenizer(["no pair twice"], 261).vocab_size == 261


def test_combined_tokens_join_signs_and_line_breaks(tokenizer):
    table = combined_tokens(tokenizer)
    (token,) = tokenizer.encode("):\n")
    assert token in table and [tokenizer.decode([part]) for part in table[token]] == ["):", "\n"]
    for token, parts in table.items():
        assert tokenizer.decode(parts) == tokenizer.decode([token])
        assert len(parts) >= 2 and not set(parts) & set(table)


def test_split_combined_keeps_the_text_at_any_rate(documents, tokenizer):
    table, text = combined_tokens(tokenizer), "".join(document.text for document in documents)
    tokens = tokenizer.encode(text)
    n_combined = sum(token in table for token in tokens)
    assert n_combined > 2000
    assert split_combined(tokens, table, 0.0, Random(0)) == tokens
    halves = split_combined(tokens, table, 0.5, Random(0))
    assert tokenizer.decode(halves) == text
    assert sum(token in table for token in halves) == pytest.approx(n_combined / 2, rel=0.1)  # 4.5 standard deviations
    assert not set(split_combined(tokens, table, 1.0, Random(0))) & set(table)
