import pytest

from minids.data import BytePairTokenizer, Document, train_tokenizer

WORDS = "def return import class self for in range print value index list number string text model token layer".split()


def make_documents(count: int, words: int = 60) -> list[Document]:
    """Distinct documents of code-like lines, by arithmetic and not by chance."""
    documents = []
    for n in range(count):
        lines = [
            f"{WORDS[(n * 7 + i * 3) % len(WORDS)]} {WORDS[(n + i * i) % len(WORDS)]}({n}, {i}):" for i in range(words)
        ]
        documents.append(Document(f"made/{n}.py", f"# document {n}\n" + "\n".join(lines) + "\n"))
    return documents


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return make_documents(40)


@pytest.fixture(scope="session")
def tokenizer(documents) -> BytePairTokenizer:
    return train_tokenizer([document.text for document in documents], vocab_size=360)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MINIDS_CACHE", str(tmp_path / "cache"))
