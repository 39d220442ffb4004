"""Replacing a folder as a whole, so that a crash leaves the old one or the new one, never half of each.

The problem: a checkpoint is many files, and the process may be killed between any two of them. The new folder is
therefore written under a temporary name beside the old one, flushed to the disk, and renamed when it is complete:

    write  .NAME.partial      rename  NAME -> .NAME.previous      rename  .NAME.partial -> NAME      remove  .NAME.previous

Killed during the write: NAME is untouched, and the next writer clears the partial folder. Killed between the renames:
NAME is missing for a moment, and `restore_interrupted`, which every reader and writer calls first, renames
.NAME.previous back. Killed after them: the next writer clears the leftover.

Simplification: one writer at a time.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def _beside(folder: str | Path) -> tuple[Path, Path, Path]:
    """The folder itself (links followed), its partial and its previous sibling."""
    folder = Path(folder).resolve()
    return folder, folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.previous")


def restore_interrupted(folder: str | Path) -> None:
    """Puts the old folder back if a writer was killed between its two renames."""
    folder, _, previous = _beside(folder)
    if not folder.exists() and previous.is_dir():
        previous.rename(folder)


@contextmanager
def replace_folder(folder: str | Path, may_replace: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """Gives an empty folder to write into, which takes the folder's place when the block ends without an exception.

    Args:
        folder: to make or to replace; parents are made.
        may_replace: says of an existing folder with files in it whether it is one of ours.
        what: what such a folder holds, for the error message.

    Raises:
        FileExistsError: the folder exists and is something else; nothing has been touched then.
    """
    restore_interrupted(folder)
    folder, partial, previous = _beside(folder)
    if folder.exists() and not (folder.is_dir() and (may_replace(folder) or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists and holds no {what}: it is not overwritten; choose another folder")
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            open_to_others(path)
            _flush(path)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        _flush(folder.parent)
    except BaseException:
        restore_interrupted(folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def carry_over(old: str | Path, new: Path, is_replaced: Callable[[str], bool]) -> None:
    """Gives the new folder the old one's other files, as hard links where the file system has them."""
    for path in sorted(Path(old).iterdir()) if Path(old).is_dir() else ():
        if is_replaced(path.name) or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def open_to_others(path: Path) -> None:
    """Gives a safetensors file the mode that the umask asks for: safetensors 0.8 writes 0600, which a class cannot read."""
    if path.suffix == ".safetensors" and path.stat().st_mode & 0o777 == 0o600:
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def _flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
