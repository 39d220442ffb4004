"""The files of a checkpoint folder: which tensor lies where, of what shape and dtype, without reading any data.

A safetensors file begins with a JSON header of names, dtypes, shapes and offsets, and holds nothing that could run.
Pickled weights (.bin, .pt) are programs; they are never opened here.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: what is wrong with it, and where."""


@dataclass(frozen=True, slots=True)
class Header:
    """Where a tensor lies and what it is, without its data."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> dict[str, Header]:
    """The headers of all shards, checked against the index."""
    files, weight_map = _shard_files(folder)
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(f"{folder}: {INDEX} names {len(missing)} missing file(s): {some(missing)}")
    stored = {}
    for file in files:
        with open_shard(folder / file) as tensors:
            for name in tensors.keys():
                view = tensors.get_slice(name)
                stored[name] = Header(file, tuple(view.get_shape()), view.get_dtype())
    if lost := [n for n, file in weight_map.items() if n not in stored or stored[n].file != file]:
        raise CheckpointError(f"{folder}: {INDEX} names {len(lost)} tensor(s) that are not in their file: {some(lost)}")
    return stored


def _shard_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The safetensors files in order, and the index's map from tensor to file."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE], {}
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
        hint = f"; pickled weights ({some(pickles)}) can run code when opened and are never read" if pickles else ""
        raise CheckpointError(f"{folder}: found neither {INDEX} nor {SINGLE}{hint}")
    try:
        weight_map = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX}: no index with a weight_map ({error!r})") from None
    if strange := [f for f in weight_map.values() if not re.fullmatch(r"[^/\\]+\.safetensors", str(f))]:
        raise CheckpointError(f"{folder / INDEX}: not the name of a safetensors file beside it: {some(strange)}")
    return sorted(set(weight_map.values())), weight_map


def open_shard(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, or no safetensors file ({error})") from None


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder holds a config.json and safetensors under the published names."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and ((folder / INDEX).is_file() or (folder / SINGLE).is_file())


def some(items: Iterable, most: int = 20) -> str:
    """Up to `most` items, duplicates once, and how many more."""
    items = list(dict.fromkeys(map(str, items)))
    return ", ".join(items[:most]) + (f", ... and {len(items) - most} more" if len(items) > most else "")
