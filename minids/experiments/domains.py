"""Real text of three kinds that is on every machine with Python: code, prose and tables.

    code     the standard library's sources as `ast.unparse` prints them: no comments, no docstrings
    prose    what was taken out of them: docstrings of at least 200 characters; and Python's language reference, as
             `help()` holds it (pydoc_data.topics)
    tables   the Unicode character database, printed as CSV by `unicodedata` (characters with a name of their own), and the
             8-bit character maps of `encodings`

A row of training holds one kind only, so that what an expert does with each can be counted, and a batch mixes all three.
Every kind gives the same number of rows. The text differs a little between versions of Python; the counts are written
beside the results.

Shapes: n rows of T + 1 tokens.
"""

import ast
import encodings
import pkgutil
import random
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KINDS = ("code", "prose", "tables")
SKIP = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"))
LEAST_PROSE = 200  # characters of a docstring
TABLE_LINES = 40  # lines of a document of tables


@dataclass
class Domains:
    """Rows of tokens of each kind, int64 (n, T + 1)."""

    train: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]
    counts: dict[str, dict[str, int]]  # kind -> documents, characters, tokens


def sources() -> Iterator[str]:
    """The standard library's files, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIP & set(path.relative_to(root).parts):
            yield path.read_bytes().decode("utf-8", "ignore")


def split_source(text: str) -> tuple[str, list[str]]:
    """Code without docstrings, and the docstrings. ("", []) for what this Python cannot parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return "", []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc is not None:
                found.append(doc)
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree), [doc for doc in found if len(doc) >= LEAST_PROSE]


def reference() -> list[str]:
    """Python's language reference, a text a topic; empty where a distribution leaves it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def character_lines() -> Iterator[str]:
    """CSV of the Unicode database: code point, name, category, direction, width, decimal value."""
    for code in range(0x20, 0x1FBFF):
        char = chr(code)
        name = unicodedata.name(char, "")
        if name and f"{code:04X}" not in name:  # ideographs are named by their number: nothing to learn
            fields = [f"{code:04X}", name, unicodedata.category(char), unicodedata.bidirectional(char),
                      unicodedata.east_asian_width(char), str(unicodedata.decimal(char, ""))]  # fmt: skip
            yield ",".join(fields)


def codec_tables() -> Iterator[str]:
    """CSV of each 8-bit codec: codec, byte, code point, name."""
    for module in sorted(m.name for m in pkgutil.iter_modules(encodings.__path__)):
        if not module.startswith(("cp", "iso8859", "mac_", "koi8")):
            continue
        lines = []
        for byte in range(0x80, 0x100):
            try:
                char = bytes([byte]).decode(module)
            except (UnicodeDecodeError, LookupError):
                continue
            if len(char) == 1:
                lines.append(f"{module},{byte:02x},{ord(char):04x},{unicodedata.name(char, '').lower()}")
        if lines:
            yield "\n".join(lines)


def read_documents() -> dict[str, list[str]]:
    """All documents of each kind."""
    split = [split_source(text) for text in sources()]
    lines = list(character_lines())
    tables = ["\n".join(lines[i : i + TABLE_LINES]) for i in range(0, len(lines), TABLE_LINES)]
    return {
        "code": [code for code, _ in split if len(code) >= LEAST_PROSE],
        "prose": [doc for _, docs in split for doc in docs] + reference(),
        "tables": tables + list(codec_tables()),
    }


def train_bpe(texts: list[str], vocab_size: int):
    """Byte-level BPE, straight from `tokenizers`; id 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def build_domains(length: int, vocab_size: int, characters: int, valid_share: float = 0.08, seed: int = 0) -> Domains:
    """Up to ``characters`` of each kind as rows of ``length`` + 1 tokens. Raises ValueError if a kind fills no row."""
    documents = read_documents()
    for kind, texts in documents.items():
        random.Random(f"{seed}:{kind}").shuffle(texts)
        total, kept = 0, []
        for text in texts:
            total += len(text)
            kept.append(text[: len(text) - max(0, total - characters)])
            if total >= characters:
                break
        documents[kind] = kept
    tokenizer = train_bpe([text for kind in KINDS for text in documents[kind]], vocab_size)
    rows, counts = {}, {}
    for kind in KINDS:
        ids = np.concatenate([np.array([*e.ids, 0]) for e in tokenizer.encode_batch(documents[kind])])
        n = (len(ids) - 1) // length
        places = np.arange(n)[:, None] * length + np.arange(length + 1)
        rows[kind] = ids[places].astype(np.int64) if n else np.empty((0, length + 1), np.int64)
        counts[kind] = {"documents": len(documents[kind]), "characters": sum(map(len, documents[kind])), "tokens": len(ids)}
    least = min(map(len, rows.values()))
    held = max(1, int(least * valid_share))
    if least < 2:
        raise ValueError(f"characters={characters} of each kind fill {least} rows of {length} tokens: 2 are needed")
    # The first rows are held out: documents were shuffled, and at most one of them lies on both sides of the cut.
    return Domains({k: r[held:least] for k, r in rows.items()}, {k: r[:held] for k, r in rows.items()}, counts)
