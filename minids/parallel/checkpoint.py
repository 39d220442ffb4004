"""A published checkpoint read and written by many ranks: each its own experts, nobody the whole [V3 section 3.2].

The problem: of V3's 689 GB a rank of 64 needs 30: its 4 experts a layer, and what is everywhere the same. A safetensors
file tells where each tensor lies without being read, and the experts are tensors of their own (``experts.E.up_proj``), so a
rank reads just those that it keeps, straight into the rows of its stacked tensors.

Writing goes the other way: every rank of the first replica writes files of its own experts, rank 0 also everything else and
the index. Which tensor goes to which file follows from the config, so nobody has to be asked. A checkpoint tells nothing of
the ranks that made it, and any number of ranks reads it.

A training run gathers the model on rank 0 instead (`ExpertParallel.gather_model`), where it is evaluated anyway.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minids import checkpoint
from minids.config import ModelConfig
from minids.folder import _beside, carry_over, replace_folder
from minids.fp8.quantize import dequantize
from minids.model.transformer import Transformer
from minids.parallel.dispatch import Wire
from minids.parallel.experts import is_expert, shard_experts
from minids.parallel.mesh import Mesh
from minids.published import Entry, entries_of, plan
from minids.shards import CONFIG, INDEX, Header, open_shard, read_headers
from minids.train.optim import Optimizer

KINDS = ("step", "exp_avg", "exp_avg_sq", "master")


def own_entries(entries: list[Entry], held: range) -> list[Entry]:
    """The entries whose tensors a rank with the experts ``held`` keeps, placed in its shorter stacks."""
    found = []
    for entry in entries:
        if not is_expert(entry.source):
            found.append(entry)
        elif entry.part[0] in held:
            found.append(replace(entry, part=(entry.part[0] - held.start, *entry.part[1:])))
    return found


def load(folder: str | Path, mesh: Mesh, dispatch: str = "two_hop", wire: Wire | None = None,
         dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Transformer:  # fmt: skip
    """Reads this rank's part of a checkpoint folder, published or saved by `minids.checkpoint.save`, into a new sharded
    model. Arguments as in `shard_experts` and `minids.checkpoint.load`; MTP modules as the config says, whose stored copies
    of embedding and head are not compared.

    Raises CheckpointError as there: for tensors missing or wrong anywhere in the folder, this rank's or not.
    """
    folder = Path(folder)
    cfg = ModelConfig.from_json(folder / CONFIG)
    stored = read_headers(folder)
    fp8 = checkpoint._check_quantization(folder, cfg.quantization_config)
    cfg, stored = checkpoint._choose_mtp(folder, cfg, stored, "auto")
    with torch.device("meta"):  # not by torch's default dtype, which is shared by threads
        model = Transformer(cfg).to(dtype or checkpoint._stored_dtype(stored))
    wanted = checkpoint._check_tensors(folder, entries_of(model, fp8, torch.bfloat16), stored, cfg)
    shard_experts(model, mesh, dispatch, wire)
    model.to_empty(device=device or torch.get_default_device())
    if cfg.tie_word_embeddings:  # storage given out parameter by parameter has parted them
        model.lm_head.weight = model.model.embed_tokens.weight
    fill(model, folder, own_entries(wanted, mesh.experts(cfg.n_routed_experts)), stored)
    return model


@torch.no_grad()
def fill(model: Transformer, folder: Path, entries: list[Entry], stored: dict[str, Header]) -> int:
    """Copies the tensors of ``entries`` into the model, FP8 ones dequantised; returns the bytes read."""
    state, read = model.state_dict(), 0
    for file in sorted({stored[entry.name].file for entry in entries}):
        with open_shard(folder / file) as shard:
            for entry in entries:
                if stored[entry.name].file != file or entry.is_scale or entry.is_copy:
                    continue
                target, value = state[entry.source][entry.part], shard.get_tensor(entry.name)
                read += value.nbytes
                if value.dtype == torch.float8_e4m3fn:
                    value = _dequantized(value, f"{entry.name}_scale_inv", folder, stored, target)
                target.copy_(value)
    return read


def _dequantized(value: Tensor, scale: str, folder: Path, stored: dict[str, Header], target: Tensor) -> Tensor:
    with open_shard(folder / stored[scale].file) as shard:  # it may lie in another file than its weight
        scale_inv = shard.get_tensor(scale)
    return dequantize(value.to(target.device), scale_inv.to(target.device), dtype=target.dtype)


def save(model: Transformer, mesh: Mesh, folder: str | Path, fp8: bool = False, max_shard_bytes: int = 5 * 2**30,
         dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """Writes a sharded model as `minids.checkpoint.save` writes a whole one, arguments and errors as there. All ranks call
    it, and see the folder; it takes its name when all have written."""
    dtype = dtype or (torch.bfloat16 if fp8 else model.state_dict()["model.embed_tokens.weight"].dtype)
    if dtype not in checkpoint.SAVED_DTYPES or max_shard_bytes < 1:
        raise ValueError(f"dtype={dtype}, max_shard_bytes={max_shard_bytes}: allowed are "
                         f"{', '.join(map(str, checkpoint.SAVED_DTYPES))}, and a positive number")  # fmt: skip
    files = plan_files(model.cfg, mesh.layout.ep, fp8, max_shard_bytes, dtype)
    with contextlib.ExitStack() as stack:
        partial = _beside(folder)[1]
        if mesh.rank == 0:
            what = "checkpoint (config.json and safetensors)"
            stack.enter_context(replace_folder(folder, checkpoint.is_checkpoint, what))
        _wait(mesh)  # the folder is there
        if mesh.rank < mesh.layout.ep:  # the first replica
            state, held = model.state_dict(), mesh.experts(model.cfg.n_routed_experts)
            for file, entries in files[mesh.rank].items():
                tensors = checkpoint._shard_tensors(own_entries(entries, held), state)
                save_file(tensors, partial / file, metadata={"format": "pt"})
        _wait(mesh)  # all files are
        if mesh.rank == 0:
            every = [(file, entry) for part in files for file, entries in part.items() for entry in entries]
            index = {"metadata": {"total_size": sum(entry.bytes for _, entry in every)},
                     "weight_map": {entry.name: file for file, entry in every}}  # fmt: skip
            checkpoint._write_json(partial / INDEX, index)
            checkpoint._write_json(partial / CONFIG, checkpoint._config_json(model.cfg, fp8, dtype))
            carry_over(folder, partial, checkpoint._is_checkpoint_file)
    _wait(mesh)  # it has its name


Files = dict[str, list[Entry]]


def plan_files(cfg: ModelConfig, ep: int, fp8: bool, max_shard_bytes: int, dtype: torch.dtype) -> list[Files]:
    """For each rank of an expert group: file -> the tensors that it writes to it, numbered as in the whole checkpoint."""
    each, parts = cfg.n_routed_experts // ep, [[] for _ in range(ep)]
    for entry in plan(cfg, fp8, dtype):
        parts[entry.part[0] // each if is_expert(entry.source) else 0].append(entry)
    packed = [checkpoint._pack(part, max_shard_bytes) for part in parts]
    total, number, found = sum(map(len, packed)), itertools.count(1), []
    for shards in packed:
        found.append({f"model-{next(number):05d}-of-{total:06d}.safetensors": shard for shard in shards})
    return found


def _wait(mesh: Mesh) -> None:
    """For all ranks."""
    device = "cuda" if mesh.device_mesh is not None and mesh.device_mesh.device_type == "cuda" else "cpu"
    mesh.peers["data"].all_reduce(torch.zeros(1, device=device))


def load_moments(optimizer: Optimizer, folder: Path, values: dict, held: range) -> None:
    """Takes over the optimizer's state from a run's checkpoint, experts' tensors cut to ``held`` while they are read.
    ``values``: trainer.json's "optimizer"."""
    tensors = {}
    with safe_open(folder / "trainer.safetensors", "pt") as file:
        there = {key.removeprefix("optimizer/") for key in file.keys() if key.startswith("optimizer/")}
        for key in sorted(there & {f"{kind}/{name}" for kind in KINDS for name in optimizer.params}):
            if is_expert(key) and not key.startswith("step/"):
                tensors[key] = file.get_slice(f"optimizer/{key}")[held.start : held.stop]
            else:
                tensors[key] = file.get_tensor(f"optimizer/{key}")
    optimizer.load_state(tensors, values)
