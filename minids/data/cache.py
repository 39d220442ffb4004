"""Files that are dear to make and cheap to keep: named by the hash of all that they depend on, written atomically."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path


def cache_folder(folder: str | Path | None = None) -> Path:
    """The given folder, else the environment variable MINIDS_CACHE, else ~/.cache/minids; made if it is not there.

    Raises OSError if it cannot be written.
    """
    path = Path(folder or os.environ.get("MINIDS_CACHE") or "~/.cache/minids").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise OSError(f"cache_dir={str(path)!r}: {error}; name another folder by cache_dir or MINIDS_CACHE") from None
    return path


def cache_key(*parts) -> str:
    """32 hex digits that stand for the parts: anything that JSON can spell."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name in the same folder, then rename: readers see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
