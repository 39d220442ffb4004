"""Sources of text: what is read, in which order, and what is said when it cannot be."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.data import corpus as corpus_module
from minids.data.corpus import CorpusError, draw, list_units, read_corpus

ROOT = Path(__file__).parents[2]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options) -> dict[str, str]:
    return {document.origin: document.text for document in read_corpus("folder", path, **options)}


def test_stdlib_is_the_standard_library_without_tests():
    units = list_units("stdlib")
    origins = [unit.origin for unit in units]
    assert origins == sorted(set(origins))
    assert {"stdlib/json/decoder.py", "stdlib/argparse.py"} <= set(origins)
    assert not [
        o for o in origins if {"test", "tests", "site-packages", "encodings", "__pycache__"} & set(o.split("/"))
    ]
    assert sum(unit.size for unit in units) > 5_000_000


def test_stdlib_documents_are_the_files():
    documents = {document.origin: document.text for document in read_corpus("stdlib", max_bytes=300_000)}
    assert sum(len(text.encode()) for text in documents.values()) <= 300_000
    root = Path(sysconfig.get_path("stdlib"))
    for origin, text in documents.items():
        assert (root / origin.removeprefix("stdlib/")).read_bytes() == text.encode()


def test_packages_hold_sources_and_prose_of_what_is_installed():
    origins = {unit.origin for unit in list_units("packages")}
    assert {"packages/pytest/__init__.py", "packages/numpy/__init__.py"} <= origins
    assert {Path(origin).suffix.lower() for origin in origins} <= {".py", ".md", ".rst", ".txt"}
    assert any(origin.endswith(".txt") for origin in origins)


def test_folder_reads_text_in_order_and_skips_hidden_and_foreign_files(tmp_path):
    write(tmp_path / "b.txt", "bé\r\n")
    write(tmp_path / "a" / "z.py", b"\xef\xbb\xbfx = 1")
    write(tmp_path / ".git" / "config.txt", "hidden")
    write(tmp_path / "photo.jpg", b"\xff\xd8")
    assert read(tmp_path) == {"b.txt": "bé\r\n", "a/z.py": "x = 1"}
    assert list(read(tmp_path)) == list(read(tmp_path))


def test_a_single_file_is_a_corpus(tmp_path):
    assert read(write(tmp_path / "book.txt", "once")) == {"book.txt": "once"}


def test_undecodable_bytes_survive_as_surrogates(tmp_path):
    (document,) = read_corpus("folder", write(tmp_path / "latin.txt", b"caf\xe9"))
    assert document.text.encode("utf-8", "surrogateescape") == b"caf\xe9"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=60), st.integers(1, 200), st.booleans())
def test_every_jsonl_line_belongs_to_exactly_one_block(tmp_path_factory, texts, block, ends_with_newline):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    content = "\n".join(json.dumps({"text": text, "id": n}) for n, text in enumerate(texts))
    write(path, content + "\n" * ends_with_newline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "JSONL_BLOCK", block)
        assert [document.text for document in read_corpus("folder", path)] == texts


def test_jsonl_field_blank_lines_and_origin(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"body": "one"}\n\n{"body": "two", "n": 2}\n')
    documents = read(path, text_field="body")
    assert list(documents.values()) == ["one", "two"]
    offsets = [int(origin.split("@")[1]) for origin in documents]
    assert [path.read_bytes()[offset:].splitlines()[0] for offset in offsets] == path.read_bytes().split(b"\n")[0:3:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "x", "id": 1}', "no field 'text' (text_field); the fields are id, txt"),
        ('{"text": 7}', "field 'text' is a int, not a string"),
        ('{"text": "x"', "not valid JSON"),
        ('["text"]', "a JSON object is expected, this is a list"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_file_and_line(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(corpus_module, "JSONL_BLOCK", 10)  # the line number has to hold in later blocks as well
    path = write(tmp_path / "x.jsonl", '{"text": "good"}\n' * 4 + line + "\n")
    with pytest.raises(CorpusError) as error:
        read_corpus("folder", tmp_path)
    assert f"{path}, line 5: " in str(error.value) and message in str(error.value)


def write_parquet(path: Path, columns: dict, **options) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_rows_of_all_row_groups(tmp_path):
    texts = [f"row {n} é" for n in range(10)]
    write_parquet(tmp_path / "x.parquet", {"text": texts, "id": list(range(10))}, row_group_size=4)
    assert read(tmp_path) == {f"x.parquet:{n}": text for n, text in enumerate(texts)}


def test_parquet_faults_are_named(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"text": ["a", None], "id": [1, 2]})
    with pytest.raises(CorpusError, match="row 1: column 'text' is null"):
        read_corpus("folder", path)
    with pytest.raises(CorpusError, match="no column 'body'.*columns are id, text"):
        read_corpus("folder", path, text_field="body")
    with pytest.raises(CorpusError, match="column 'id' is of type int64, not string"):
        read_corpus("folder", path, text_field="id")
    with pytest.raises(CorpusError, match="not a Parquet file"):
        read_corpus("folder", write(tmp_path / "y.parquet", "text"))


def test_without_pyarrow_the_error_names_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CorpusError, match="needs the package pyarrow: pip install pyarrow"):
        read_corpus("folder", path)


def test_importing_the_room_stays_light():
    code = (
        "import sys, minids.data; print([m for m in ('torch', 'pyarrow', 'tyro', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("books",), "corpus='books': allowed are stdlib, packages, folder"),
        (("folder",), "corpus='folder' with path=None"),
        (("stdlib", "/tmp"), "corpus='stdlib' with path='/tmp'"),
        (("folder", "/no/such/place"), "path='/no/such/place': no such file or folder"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(CorpusError) as error:
        read_corpus(*arguments)
    assert message in str(error.value)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match=r"no documents; files that are read end in .*\.jsonl.*\.txt"):
        read_corpus("folder", tmp_path)
    write(tmp_path / "x.jsonl", "\n\n")
    with pytest.raises(CorpusError, match="no documents in them"):
        read_corpus("folder", tmp_path)
    write(tmp_path / "x.txt", "twelve bytes")
    with pytest.raises(CorpusError, match="none of its documents fits in max_bytes=11"):
        read_corpus("folder", tmp_path, max_bytes=11)


def test_compressed_and_foreign_files_are_refused(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", b"\x1f\x8b")
    for place in (path, tmp_path):
        with pytest.raises(CorpusError, match=r"x\.jsonl\.gz: \.gz files are not read; unpack it"):
            read_corpus("folder", place)
    with pytest.raises(CorpusError, match=r"suffix '\.jpg' is not read"):
        read_corpus("folder", write(tmp_path / "x.jpg", b""))


def test_max_bytes_is_a_seeded_choice_spread_over_the_corpus(tmp_path):
    for n in range(200):
        write(tmp_path / f"{n:03}.txt", f"{n:03}" * 100)
    choices = [list(read(tmp_path, max_bytes=6000, seed=seed)) for seed in (0, 0, 1)]
    assert choices[0] == choices[1] == sorted(choices[0])
    assert choices[0] != choices[2]
    assert all(len(choice) == 20 for choice in choices)
    # 20 of 200 at random all lie in the first half once in two million times.
    assert any(name >= "100.txt" for name in choices[0]) and any(name < "100.txt" for name in choices[0])


def test_max_bytes_chooses_among_jsonl_blocks_and_row_groups(tmp_path):
    write(tmp_path / "x.jsonl", "".join(json.dumps({"text": f"{n:05}" * 40}) + "\n" for n in range(4000)))
    documents = read_corpus("folder", tmp_path, max_bytes=100_000)
    assert 99_000 <= sum(document.n_bytes for document in documents) <= 100_000
    write_parquet(tmp_path / "x.parquet", {"text": [f"{n:05}" * 40 for n in range(4000)]}, row_group_size=100)
    (tmp_path / "x.jsonl").unlink()
    rows = [int(document.origin.split(":")[1]) for document in read_corpus("folder", tmp_path, max_bytes=100_000)]
    assert rows == sorted(rows) and len(rows) == 500 and rows != list(range(500))


def test_draw_is_uniform_and_fixed():
    values = [draw(3, "shuffle", str(n).encode()) for n in range(2000)]
    assert all(0 <= value < 1 for value in values) and len(set(values)) == 2000
    assert abs(sum(values) / 2000 - 0.5) < 0.03  # 4.6 standard deviations
    assert draw(3, "shuffle", b"x") != draw(3, "fim", b"x") != draw(4, "fim", b"x")
    assert draw(0, "shuffle", b"x") == (0x5CFF216403AF140B >> 11) / 2**53  # printf 0:shuffle:x | b2sum -l 64
