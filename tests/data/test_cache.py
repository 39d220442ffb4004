"""Atomic writes: a reader sees the old file or the new one, never a part."""

import pytest

from minids.data.cache import cache_folder, cache_key, write_atomically


def test_readers_keep_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "sub" / "x.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))
    with open(path) as reader:  # a rename leaves this file as it was; writing in place would change it
        write_atomically(path, lambda temporary: temporary.write_text("new text"))
        assert (reader.read(), path.read_text()) == ("old", "new text")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    def half(temporary):
        temporary.write_text("ha")
        raise RuntimeError("disk full")

    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folder_is_argument_then_variable_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIDS_CACHE", str(tmp_path / "variable"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("MINIDS_CACHE")
    assert cache_folder() == tmp_path / "home" / ".cache" / "minids"
    assert (tmp_path / "home" / ".cache" / "minids").is_dir()


def test_keys_tell_parts_apart():
    keys = [
        cache_key("ab", "c"),
        cache_key("a", "bc"),
        cache_key(1, 2),
        cache_key(12),
        cache_key({"a": 1}),
        cache_key([]),
    ]
    assert len(set(keys)) == 6
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})
