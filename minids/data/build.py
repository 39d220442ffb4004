"""The whole way from a corpus to rows of tokens, with a cache for the two slow steps.

    read -> filter -> split and shuffle -> train BPE (cached) -> FIM and encode (cached) -> pack

The tokenizer is trained on training documents only. Cached files are named by the hash of the documents and of every
setting they depend on, so a changed corpus or setting makes a new file and never reads a stale one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .cache import cache_folder, cache_key, write_atomically
from .corpus import CORPORA, Document, read_corpus
from .filters import filter_documents
from .packing import PackedRows, PackingError, Stream, encode_stream, split_documents
from .tokenizer import MIN_VOCAB_SIZE, BytePairTokenizer, TokenizerError, train_tokenizer

CACHE_VERSION = 1  # raise it when the same settings come to mean other tokens


@dataclass(frozen=True)
class DataConfig:
    """What to read, how to encode it and how to split it. Refuses impossible values with a ValueError."""

    corpus: Literal["stdlib", "packages", "folder"] = "stdlib"
    """Sources of Python's standard library, texts of all installed packages, or the folder at `path`."""
    path: str | None = None
    """For corpus folder: a folder, or a file, of text, JSONL or Parquet."""
    text_field: str = "text"
    """The JSONL field or Parquet column that holds the text."""
    max_bytes: int | None = 12_000_000
    """At most this many bytes of text, a seeded choice of documents. None: all of it (it has to fit in memory)."""
    min_chars: int = 64
    """Shorter documents are dropped."""
    vocab_size: int = 4096
    """Size of the vocabulary to train (V3: 128K). Not used when `tokenizer` is given."""
    tokenizer: str | None = None
    """A published tokenizer.json (or a folder with one) to use in place of a trained one."""
    fim_rate: float = 0.1
    """Share of training documents in fill-in-the-middle order (V3: 0.1)."""
    split_rate: float = 0.0
    """Share of tokens joining punctuation and line breaks that training sees split in two (V3: rate unpublished)."""
    valid_fraction: float = 0.03
    """Share of the text that is held out, in whole documents."""
    seed: int = 0
    """Of the choice, the order and the split of documents, of FIM and of the order of rows."""
    cache_dir: str | None = None
    """Where tokenizers and tokens are kept. None: $MINIDS_CACHE, else ~/.cache/minids."""

    def __post_init__(self):
        checks = {
            "corpus": (self.corpus in CORPORA, f"one of {', '.join(CORPORA)}"),
            "path": ((self.path is not None) == (self.corpus == "folder"), "given with corpus='folder', and only then"),
            "max_bytes": (self.max_bytes is None or self.max_bytes >= 1, "at least 1, or None"),
            "min_chars": (self.min_chars >= 1, "at least 1"),
            "vocab_size": (
                self.vocab_size >= MIN_VOCAB_SIZE,
                f"at least {MIN_VOCAB_SIZE} (256 bytes, 5 special tokens)",
            ),
            "fim_rate": (0 <= self.fim_rate <= 1, "from 0 to 1"),
            "split_rate": (0 <= self.split_rate <= 1, "from 0 to 1"),
            "valid_fraction": (0 < self.valid_fraction < 1, "between 0 and 1"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"DataConfig.{name}={getattr(self, name)!r}: allowed is {allowed}")


@dataclass
class Data:
    """Text ready for training. `stats` holds counts only and can be written as JSON; see `build_data`."""

    tokenizer: BytePairTokenizer
    train: PackedRows
    valid: PackedRows
    stats: dict[str, Any]


def build_data(config: DataConfig, sequence_length: int, progress: bool = True) -> Data:
    """Read, filter, split, tokenize and pack a corpus into rows of sequence_length + 1 tokens.

    stats: documents_read, bytes_read, documents_kept, bytes_kept, dropped (count by reason), vocab_size,
    bytes_per_token (validation text), cached (which of tokenizer and tokens came from the cache), and for train and
    valid: documents, fim_documents, bytes, tokens, rows, dropped_tokens. Raises ValueError (CorpusError,
    TokenizerError, PackingError) or OSError (cache) before any slow work where the fault can be known.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length}: at least 1")
    published = BytePairTokenizer.load(config.tokenizer) if config.tokenizer else None
    if published and config.fim_rate and not published.has_fim:
        raise PackingError(f"fim_rate={config.fim_rate}: {config.tokenizer} has no FIM tokens; set fim_rate to 0")
    cache = cache_folder(config.cache_dir)
    read = read_corpus(config.corpus, config.path, config.text_field, config.max_bytes, config.seed)
    kept, dropped = filter_documents(read, config.min_chars)
    train_documents, valid_documents = split_documents(kept, config.valid_fraction, config.seed)
    if published is None:
        tokenizer, tokenizer_cached = _trained(train_documents, config.vocab_size, cache, progress)
    else:
        tokenizer, tokenizer_cached = published, False
    settings = {"fim_rate": config.fim_rate, "split_rate": config.split_rate, "seed": config.seed}
    train_stream, train_cached = _encoded(train_documents, tokenizer, settings, cache, progress)
    plain = dict(settings, fim_rate=0.0, split_rate=0.0)
    valid_stream, valid_cached = _encoded(valid_documents, tokenizer, plain, cache, progress)
    train = _packed("train", train_stream, sequence_length, config.seed)
    valid = _packed("valid", valid_stream, sequence_length, config.seed)
    stats = {
        "documents_read": len(read),
        "bytes_read": _bytes(read),
        "documents_kept": len(kept),
        "bytes_kept": _bytes(kept),
        "dropped": dropped,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": _bytes(valid_documents) / (len(valid.tokens) - 2 * len(valid_documents)),
        "cached": {"tokenizer": tokenizer_cached, "tokens": train_cached and valid_cached},
        "train": _count(train_documents, train_stream, train),
        "valid": _count(valid_documents, valid_stream, valid),
    }
    return Data(tokenizer, train, valid, stats)


def _bytes(documents: Sequence[Document]) -> int:
    return sum(document.n_bytes for document in documents)


def _packed(split: str, stream: Stream, sequence_length: int, seed: int) -> PackedRows:
    try:
        return PackedRows(stream.tokens, stream.starts, sequence_length, seed)
    except PackingError as error:
        raise PackingError(f"{split}: {error}") from None


def _count(documents: Sequence[Document], stream: Stream, rows: PackedRows) -> dict[str, int]:
    return {
        "documents": len(documents),
        "fim_documents": stream.fim_documents,
        "bytes": _bytes(documents),
        "tokens": len(stream.tokens),
        "rows": rows.n_rows,
        "dropped_tokens": rows.dropped_tokens,
    }


def _trained(
    documents: Sequence[Document], vocab_size: int, cache: Path, progress: bool
) -> tuple[BytePairTokenizer, bool]:
    texts = sorted(document.digest.hex() for document in documents)  # sorted: BPE does not see the order
    path = cache / "tokenizers" / f"{cache_key(CACHE_VERSION, vocab_size, texts)}.json"
    if path.exists():
        try:
            return BytePairTokenizer.load(path), True
        except TokenizerError:  # damaged on disk: made again
            pass
    tokenizer = train_tokenizer((document.text for document in documents), vocab_size, progress)
    tokenizer.save(path)
    return tokenizer, False


def _encoded(
    documents: Sequence[Document], tokenizer: BytePairTokenizer, settings: dict, cache: Path, progress: bool
) -> tuple[Stream, bool]:
    texts = [document.digest.hex() for document in documents]
    path = cache / "tokens" / f"{cache_key(CACHE_VERSION, tokenizer.backend.to_str(), settings, texts)}.safetensors"
    if (stream := _load_stream(path)) is not None:
        return stream, True
    stream = encode_stream(documents, tokenizer, progress=progress, **settings)
    tensors = {"tokens": stream.tokens, "starts": stream.starts, "fim_documents": np.array(stream.fim_documents)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    return stream, False


def _load_stream(path: Path) -> Stream | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            tokens, starts, n_fim = (file.get_tensor(name) for name in ("tokens", "starts", "fim_documents"))
    except SafetensorError:  # damaged on disk: made again
        return None
    return Stream(tokens, starts, int(n_fim))
