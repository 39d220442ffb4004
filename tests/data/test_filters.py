"""The quality filter: each reason by an example of it, and that good text passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids.data import Document, filter_documents
from minids.data.filters import is_binary

GOOD = "def area(width, height):\n\treturn width * height\f\r\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\0" + GOOD * 50, "binary"),
        (GOOD * 50 + "\udce9", "binary"),  # a byte that was not UTF-8
        ("\x01\x02" + GOOD, "binary"),
        ("\ufffd" * 2 + GOOD, "binary"),
        ("x = 1", "short"),
        (" " * 100 + "x = 1" + "\n" * 100, "short"),
        ("", "short"),
    ],
)
def test_one_reason_each(text, reason):
    kept, dropped = filter_documents([Document("a", text), Document("b", GOOD)], min_chars=20)
    assert [document.origin for document in kept] == ["b"]
    assert dropped == {"binary": 0, "short": 0, "duplicate": 0} | {reason: 1}


def test_the_first_of_equal_texts_stays():
    documents = [Document(str(n), GOOD + str(n % 3)) for n in range(10)]
    kept, dropped = filter_documents(documents, min_chars=20)
    assert [document.origin for document in kept] == ["0", "1", "2"]
    assert dropped == {"binary": 0, "short": 0, "duplicate": 7}


def test_a_little_dirt_and_any_script_are_no_junk():
    assert not is_binary("\x1b" + "a" * 99) and is_binary("\x1b" + "a" * 98)
    assert not is_binary("数据 Данные بيانات 🐳\n" * 3)


@given(st.lists(st.text(max_size=30), max_size=30), st.integers(1, 10))
def test_kept_and_dropped_are_all(texts, min_chars):
    documents = [Document(str(n), text) for n, text in enumerate(texts)]
    kept, dropped = filter_documents(documents, min_chars)
    assert len(kept) + sum(dropped.values()) == len(documents)
    assert len({document.text for document in kept}) == len(kept)
    assert all(len(document.text.strip()) >= min_chars for document in kept)
    again, nothing = filter_documents(kept, min_chars)
    assert again == kept and not any(nothing.values())
