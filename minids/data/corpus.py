"""Where the text comes from (V3 section 4.1; the paper names no sources, so we take what is on every machine).

A corpus is a list of `Document`s, each with its origin. Four kinds of source are read:

    stdlib     the .py files of Python's standard library, about 11 MB of code and English prose
    packages   the .py, .md, .rst and .txt files of every installed package
    folder     any folder (or file) of text, JSONL or Parquet

A source is first listed as `Unit`s, pieces that can be read on their own: a text file, a 64 KiB block of whole JSONL
lines, a Parquet row group. With `max_bytes`, units are taken in an order drawn from the seed until the cap is
reached, so that a small sample is spread over the whole corpus and a terabyte is never read to choose ten megabytes
of it.

Every random choice about a document is `draw(seed, purpose, name)`, a hash read as a number in [0, 1). It depends on
nothing but its arguments: not on the order of files, the number of documents or the version of a random generator.

Simplifications: documents are held in memory, so `max_bytes` has to fit there. Compressed files are refused, not
unpacked.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

CORPORA = ("stdlib", "packages", "folder")
CODE_SUFFIXES = frozenset(
    ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .rb .sh .sql .tex .html .css .toml .yaml .yml".split()
)
PROSE_SUFFIXES = frozenset((".md", ".rst", ".txt"))
JSONL_SUFFIXES = frozenset((".jsonl", ".ndjson"))
PARQUET_SUFFIXES = frozenset((".parquet",))
READABLE_SUFFIXES = CODE_SUFFIXES | PROSE_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES
COMPRESSED_SUFFIXES = frozenset((".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4"))

# Tests are more than half of the standard library, mostly tables of cases. `encodings` holds 120 generated character
# maps: 12% of what is left, nearly the same file each, and a small model spends itself on reciting them.
INSTALLED_SKIP = frozenset(("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"))
STDLIB_SKIP = INSTALLED_SKIP | {"encodings"}

JSONL_BLOCK = 64 * 1024  # bytes


class CorpusError(ValueError):
    """A corpus that cannot be read; the message names the file, the line where there is one, and what is allowed."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from: `stdlib/json/decoder.py`, `web.jsonl@4711` (byte) or `web.parquet:7` (row).

    Bytes that are not UTF-8 arrive as lone surrogates (Python's `surrogateescape`); the quality filter drops such
    documents.
    """

    origin: str
    text: str

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the text (not for its origin)."""
        return hashlib.blake2b(self.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    @cached_property
    def n_bytes(self) -> int:
        return len(self.text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Unit:
    """A piece of a corpus that can be read on its own.

    size: bytes; for Parquet, uncompressed and of all columns. whole: it is a single document of just that size.
    """

    origin: str
    size: int
    read: Callable[[], Iterator[Document]]
    whole: bool = False


def draw(seed: int, purpose: str, name: bytes) -> float:
    """A number in [0, 1), uniform over names, independent between purposes and seeds, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:".encode() + name, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def read_corpus(
    corpus: str = "stdlib",
    path: str | Path | None = None,
    text_field: str = "text",
    max_bytes: int | None = None,
    seed: int = 0,
) -> list[Document]:
    """Read the documents of a corpus, in an order that depends on the corpus alone.

    With `max_bytes` a seeded choice of documents whose UTF-8 texts together do not exceed it; a document that does
    not fit in what is left is passed over. Raises CorpusError when the source is missing, empty or malformed.
    """
    units = list_units(corpus, path, text_field)
    documents = list(_take(units, max_bytes, seed))
    if not documents:
        raise CorpusError(_nothing_found(corpus, path, units, max_bytes))
    return documents


def list_units(corpus: str, path: str | Path | None = None, text_field: str = "text") -> list[Unit]:
    """List a corpus without reading its texts, sorted by origin. Arguments as in `read_corpus`."""
    if corpus not in CORPORA:
        raise CorpusError(f"corpus={corpus!r}: allowed are {', '.join(CORPORA)}")
    if (corpus == "folder") != (path is not None):
        raise CorpusError(f"corpus={corpus!r} with path={path!r}: a path is given with corpus='folder', and only then")
    if corpus == "folder":
        return _folder_units(Path(path).expanduser(), text_field)
    if corpus == "stdlib":
        return _installed_units("stdlib", [sysconfig.get_path("stdlib")], frozenset((".py",)), STDLIB_SKIP)
    roots = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    return _installed_units("packages", roots, PROSE_SUFFIXES | {".py"}, INSTALLED_SKIP)


def _installed_units(name: str, roots: list[str], suffixes: frozenset[str], skip: frozenset[str]) -> list[Unit]:
    units = {}
    for root in map(Path, roots):
        for file in _walk(root, skip, tuple(suffixes)):
            origin = f"{name}/{file.relative_to(root).as_posix()}"
            units[origin] = _text_unit(origin, file)
    return [units[origin] for origin in sorted(units)]


def _folder_units(path: Path, text_field: str) -> list[Unit]:
    if not path.exists():
        raise CorpusError(f"path={str(path)!r}: no such file or folder")
    files = [path] if path.is_file() else _walk(path, frozenset(("__pycache__",)))
    root = path.parent if path.is_file() else path
    units: list[Unit] = []
    for file in files:
        origin, suffix = file.relative_to(root).as_posix(), file.suffix.lower()
        if suffix in JSONL_SUFFIXES:
            units.extend(_jsonl_units(origin, file, text_field))
        elif suffix in PARQUET_SUFFIXES:
            units.extend(_parquet_units(origin, file, text_field))
        elif suffix in READABLE_SUFFIXES:
            units.append(_text_unit(origin, file))
        elif suffix in COMPRESSED_SUFFIXES and (path.is_file() or Path(file.stem).suffix.lower() in READABLE_SUFFIXES):
            raise CorpusError(f"{file}: {suffix} files are not read; unpack it, or move it out of the folder")
        elif path.is_file():
            raise CorpusError(f"{file}: suffix {suffix!r} is not read; allowed are {_spell(READABLE_SUFFIXES)}")
    return units


def _walk(root: Path, skip: frozenset[str], suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """Files under a folder with one of `suffixes`, in a fixed order, not hidden and not in folders named in `skip`."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skip and not name.startswith("."))
        names = sorted(name for name in names if name.lower().endswith(suffixes) and not name.startswith("."))
        files.extend(Path(folder, name) for name in names)
    return [file for file in files if file.is_file()]


def _take(units: list[Unit], max_bytes: int | None, seed: int) -> Iterator[Document]:
    """All documents, or the seeded choice that fits in `max_bytes`; in the order of `units` either way."""
    if max_bytes is None:
        for unit in units:
            yield from unit.read()
        return
    chosen: dict[int, list[Document]] = {}
    left = max_bytes
    for number in sorted(
        range(len(units)), key=lambda i: draw(seed, "choose", units[i].origin.encode("utf-8", "replace"))
    ):
        # The last percent would cost a search through the whole corpus for ever smaller documents.
        if left < max_bytes // 100:
            break
        if units[number].whole and units[number].size > left:
            continue
        for document in units[number].read():
            if document.n_bytes <= left:
                chosen.setdefault(number, []).append(document)
                left -= document.n_bytes
    for number in sorted(chosen):
        yield from chosen[number]


def _text_unit(origin: str, file: Path) -> Unit:
    return Unit(origin, file.stat().st_size, partial(_read_text, origin, file), whole=True)


def _read_text(origin: str, file: Path) -> Iterator[Document]:
    # utf-8-sig: a byte order mark at the head of a file is no part of its text.
    yield Document(origin, file.read_bytes().decode("utf-8-sig", "surrogateescape"))


def _jsonl_units(origin: str, file: Path, text_field: str) -> list[Unit]:
    size = file.stat().st_size
    starts = range(0, size, JSONL_BLOCK)
    return [
        Unit(f"{origin}@{start}", min(JSONL_BLOCK, size - start), partial(_read_jsonl, origin, file, start, text_field))
        for start in starts
    ]


def _read_jsonl(origin: str, file: Path, start: int, text_field: str) -> Iterator[Document]:
    """Documents of the lines that begin in [start, start + JSONL_BLOCK): every line belongs to exactly one block."""
    with open(file, "rb") as stream:
        if start:  # skip the rest of a line that began in an earlier block
            stream.seek(start - 1)
            stream.readline()
        while (offset := stream.tell()) < start + JSONL_BLOCK and (line := stream.readline()):
            if line.strip():
                try:
                    yield Document(f"{origin}@{offset}", _json_text(line, text_field))
                except CorpusError as error:
                    raise CorpusError(f"{file}, line {_line_number(file, offset)}: {error}") from None


def _line_number(file: Path, offset: int) -> int:
    """Counted from 1; only when there is an error to report, as it reads everything before `offset`."""
    count = 1
    with open(file, "rb") as stream:
        while stream.tell() < offset:
            count += stream.read(min(1 << 22, offset - stream.tell())).count(b"\n")
    return count


def _json_text(line: bytes, text_field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise CorpusError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise CorpusError(f"a JSON object is expected, this is a {type(record).__name__}")
    if text_field not in record:
        raise CorpusError(f"no field {text_field!r} (text_field); the fields are {_spell(record)}")
    if not isinstance(record[text_field], str):
        raise CorpusError(f"field {text_field!r} is a {type(record[text_field]).__name__}, not a string")
    return record[text_field]


def _parquet_units(origin: str, file: Path, text_field: str) -> list[Unit]:
    parquet = _open_parquet(file)
    metadata, schema = parquet.metadata, parquet.schema_arrow
    if text_field not in schema.names:
        raise CorpusError(f"{file}: no column {text_field!r} (text_field); the columns are {_spell(schema.names)}")
    if str(schema.field(text_field).type) not in ("string", "large_string", "string_view"):
        raise CorpusError(f"{file}: column {text_field!r} is of type {schema.field(text_field).type}, not string")
    units, first_row = [], 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        units.append(
            Unit(f"{origin}@{first_row}", size, partial(_read_parquet, origin, file, group, first_row, text_field))
        )
        first_row += metadata.row_group(group).num_rows
    return units


def _read_parquet(origin: str, file: Path, group: int, first_row: int, text_field: str) -> Iterator[Document]:
    column = _open_parquet(file).read_row_group(group, columns=[text_field]).column(text_field)
    for row, value in enumerate(column, start=first_row):
        if not value.is_valid:
            raise CorpusError(f"{file}, row {row}: column {text_field!r} is null, not a string")
        yield Document(f"{origin}:{row}", value.as_py())


def _open_parquet(file: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(f"{file}: reading Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{file}: not a Parquet file ({error})") from None


def _nothing_found(corpus: str, path: str | Path | None, units: list[Unit], max_bytes: int | None) -> str:
    where = f"path={str(path)!r}" if corpus == "folder" else f"corpus={corpus!r}"
    if not units:
        return f"{where}: no documents; files that are read end in {_spell(READABLE_SUFFIXES)}"
    if max_bytes is None:
        return f"{where}: {len(units)} files or blocks, but no documents in them"
    return f"{where}: none of its documents fits in max_bytes={max_bytes}"


def _spell(names) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
