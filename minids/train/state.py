"""The run folder: checkpoints that survive a kill at any moment, and a resume that continues bit for bit.

    runs/toy/
      run.json              the settings of the run; a resume must agree with them
      tokenizer.json
      metrics.jsonl, loss.png, sample.txt
      latest                name of the newest complete checkpoint: "step-400"
      step-400/             config.json + model*.safetensors in the published format, tokenizer.json, and
        trainer.safetensors optimizer moments, FP32 masters, generator states
        trainer.json        step, tokens, data position, loss scale, length of metrics.jsonl, ...

The problem: a process may die between any two instructions. The order that keeps the folder valid throughout:
write everything into `step-N.tmp`, force it to the disk, rename it to `step-N` (atomic), then replace `latest`
(atomic), and only then delete old checkpoints. At every instant `latest` names a complete folder or does not exist.

Why the exact state is saved beside the weights: AdamW's moments and the masters are not functions of the weights, and
a generator that restarts repeats its numbers. Nothing is pickled: tensors go to safetensors, the rest to JSON.

Simplifications: one process writes one folder, and writing blocks the training step.

Source: none in the papers; the report only says that no rollback was needed (arXiv 2412.19437, section 1).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minids.folder import open_to_others

OWN_FILES = ("run.json", "tokenizer.json", "metrics.jsonl", "loss.png", "sample.txt", "latest")


def fsync_path(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    fsync_path(temporary)
    os.replace(temporary, path)
    fsync_path(path.parent)


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in out.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(out: str | Path) -> Path | None:
    """The checkpoint that a resume or `generate` should read, or None if the run has none yet."""
    out = Path(out)
    pointer = out / "latest"
    if pointer.exists():
        target = out / pointer.read_text().strip()
        if not (target / "trainer.json").exists():
            raise FileNotFoundError(f"{pointer} names {target.name!r}, which is not a checkpoint; there are "
                                    f"{[p.name for p in checkpoints(out)]}")
        return target
    # Killed between the first rename and the first pointer: the folder is complete, since it has its final name.
    return checkpoints(out)[-1] if checkpoints(out) else None


def check_folder(out: Path, settings: dict, resume: bool, overwrite: bool, free: set[str]) -> Path | None:
    """Whether a run may start in `out`; returns the checkpoint to resume from (None: start at step 0). Writes nothing.

    `settings` are the nested settings of the run, to be saved as run.json; `free` names the top-level ones that a
    resumed run may change. Raises FileExistsError, FileNotFoundError or ValueError.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: the one continues the run, the other deletes it")
    run_file = out / "run.json"
    if resume:
        if not run_file.exists():
            raise FileNotFoundError(f"--resume: {out} holds no run (no run.json); start it without --resume")
        _check_same(_read_json(run_file), settings, free)
        return latest_checkpoint(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; give a folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(f"--out {out} is not empty: give --resume to continue the run in it, --overwrite to "
                                  "delete that run and start anew, or another folder")
        if not run_file.exists():
            raise FileExistsError(f"--overwrite: {out} is not empty and holds no run (no run.json), so nothing in it "
                                  "is deleted; give another folder")
    _check_writable(out)
    return None


def _check_writable(out: Path) -> None:
    # Before an hour of reading data, and not after it. What mkdir will meet: the nearest parent that is there.
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise FileExistsError(f"--out {out}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: {there} cannot be written to; give another folder")


def open_folder(out: Path, settings: dict, resume: bool) -> None:
    """After `check_folder`: clear what a killed writer left, or what an older run left, and write run.json."""
    for leftover in _temporaries(out):
        _remove(leftover)
    if resume:
        return
    # `latest` goes first and run.json last: a kill on the way leaves a folder that --overwrite still accepts.
    for path in [out / "latest", *checkpoints(out), *(out / n for n in OWN_FILES[::-1])]:
        _remove(path)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "run.json", json.dumps(settings, indent=2, default=str) + "\n")


def _temporaries(out: Path) -> list[Path]:
    # The hidden ones are left by a writer of the published format that was killed inside step-N.tmp's making.
    return [*out.glob("step-*.tmp"), *out.glob(".step-*.tmp.*"), *(out / f"{n}.tmp" for n in OWN_FILES)]


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # Deleting a folder takes many steps; under its final name a half-deleted one would pass for a checkpoint.
    doomed = path if ".tmp" in path.name else path.with_name(path.name + ".old.tmp")
    if doomed != path:
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
    shutil.rmtree(doomed)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _check_same(old: dict, new: dict, free: set[str]) -> None:
    new = json.loads(json.dumps(new, default=str))  # tuples become lists, as in the file
    old, new = ({k: v for k, v in _flatten(t).items() if k.split(".")[0] not in free} for t in (old, new))
    none = object()
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k, none) != new.get(k, none)]
    if differing:
        lines = [f"  {k}: the run has {old.get(k)!r}, now {new.get(k)!r}" for k in differing]
        raise ValueError("--resume: the settings differ from those of the run, so it would not be the same run:\n"
                         + "\n".join(lines))


def save_checkpoint(out: Path, step: int, write_model: Callable[[Path], None], tensors: dict[str, Tensor],
                    values: dict, keep: int) -> Path:
    """Write checkpoint `step-N` as the module docstring says, move `latest` to it and keep the last `keep`.

    `write_model(folder)` writes the published format (and what else belongs to it); `tensors` and `values` are the
    trainer's exact state. Returns the folder.
    """
    final, temporary = out / f"step-{step}", out / f"step-{step}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    write_model(temporary)
    # A view or a shared storage is refused by safetensors; a clone is always plain.
    save_file({k: v.detach().cpu().clone() for k, v in tensors.items()}, temporary / "trainer.safetensors")
    (temporary / "trainer.json").write_text(json.dumps(values, indent=1) + "\n")
    for path in [*temporary.rglob("*"), temporary]:
        open_to_others(path)
        fsync_path(path)
    if final.exists():  # left by a run that was killed before `latest` moved here
        _remove(final)
    os.rename(temporary, final)
    fsync_path(out)
    write_atomic(out / "latest", final.name + "\n")
    done = checkpoints(out)
    for old in done[: max(0, done.index(final) + 1 - keep)]:
        _remove(old)
    return final


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, values) that `save_checkpoint` was given. Raises ValueError or FileNotFoundError, naming the file."""
    tensors = folder / "trainer.safetensors"
    try:
        return load_file(tensors), _read_json(folder / "trainer.json")
    except SafetensorError as error:
        raise ValueError(f"{tensors}: truncated, or no safetensors file ({error})") from None


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: truncated, or no JSON ({error})") from None


def rng_state() -> tuple[dict[str, Tensor], dict]:
    """States of the generators of torch (CPU, every CUDA device), numpy and random, as tensors and JSON values."""
    tensors = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is what we save
    version, internal, gauss = random.getstate()
    values = {"numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
              "python": [version, list(internal), gauss]}
    return tensors, values


def set_rng_state(tensors: dict[str, Tensor], values: dict) -> None:
    """Take over what `rng_state` returned."""
    torch.set_rng_state(tensors["rng/torch"])
    for i in range(torch.cuda.device_count()):
        if f"rng/cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng/cuda{i}"], i)
    kind, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
