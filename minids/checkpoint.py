"""Checkpoints in the published format, in and out.

The problem: the 671B model is 163 files, 91,991 tensors and 689 GB. Nobody has that twice in memory, so a checkpoint is
read tensor by tensor into a model that was built empty, and written a shard at a time from the model as it lies.

A folder holds `config.json`, `model-00001-of-000163.safetensors`, ... and `model.safetensors.index.json`, which names
the file of each tensor. `plan` (minids/published.py) lists the tensors, minids/shards.py finds them in the files,
`replace_folder` (minids/folder.py) puts a whole folder in place at once.

Simplification: one process reads or writes the whole model.
"""

import json
import math
import re
import warnings
from collections import defaultdict
from functools import lru_cache, reduce
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minids.config import ModelConfig
from minids.folder import carry_over, replace_folder, restore_interrupted
from minids.fp8.quantize import BLOCK, dequantize, quantize_block, scale_shape
from minids.model.check import check_device
from minids.model.transformer import Transformer
from minids.published import Entry, entries_of, plan
from minids.shards import CONFIG, INDEX, CheckpointError, Header, is_checkpoint, open_shard, read_headers, some

__all__ = ["CheckpointError", "is_checkpoint", "load", "plan", "save"]

FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
          "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip
MODEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- saving ---------------------------------------------------------------------------------------------------------


def save(model: Transformer, folder: str | Path, fp8: bool = False, max_shard_bytes: int = 5 * 2**30,
         dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """Writes a checkpoint folder that other software reads as DeepSeek's.

    The new folder is complete and on disk before it takes the place of an old one (see `replace_folder`); a folder
    that is no checkpoint is never replaced. Files beside the old checkpoint's own, such as a tokenizer, are kept.
    Memory: one shard beside the model, and nothing where the dtype stays as it is on the CPU.

    Args:
        model: on any device.
        folder: where to; parents are made.
        fp8: quantise the linears to E4M3 with 128 x 128 blocks.
        max_shard_bytes: a shard holds at most so much, or a single larger tensor.
        dtype: of the unquantised tensors; default: bfloat16 with fp8, else the model's own.

    Raises:
        FileExistsError: the folder exists and is no checkpoint. ValueError: an argument out of range, or, with fp8,
        NaN or infinity in a weight (named).
    """
    own = model.state_dict()["model.embed_tokens.weight"].dtype
    dtype = dtype or (torch.bfloat16 if fp8 else own)
    if dtype not in SAVED_DTYPES:
        raise ValueError(f"dtype: got {dtype}, allowed are {', '.join(map(str, SAVED_DTYPES))}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, allowed is a positive number")
    state = model.state_dict()
    shards = _pack(entries_of(model, fp8, dtype), max_shard_bytes)
    with replace_folder(folder, is_checkpoint, "checkpoint (config.json and safetensors)") as partial:
        weight_map = {}
        for i, shard in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):06d}.safetensors"
            save_file(_shard_tensors(shard, state), partial / file, metadata={"format": "pt"})
            weight_map |= {entry.name: file for entry in shard}
        total = sum(entry.bytes for shard in shards for entry in shard)
        _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(partial / CONFIG, _config_json(model.cfg, fp8, dtype))
        carry_over(folder, partial, _is_checkpoint_file)


def _pack(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Fills shards in order; a weight and its scales stay together."""
    shards, size = [[]], 0
    for entry in entries:
        need = entry.bytes
        if entry.dtype == torch.float8_e4m3fn:
            need += 4 * math.prod(scale_shape(entry.shape))
        if not entry.is_scale and shards[-1] and size + need > max_shard_bytes:
            shards.append([])
            size = 0
        size += 0 if entry.is_scale else need
        shards[-1].append(entry)
    return shards


def _shard_tensors(shard: list[Entry], state: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for entry in shard:
        weight = state[entry.source][entry.part]
        if entry.dtype == torch.float8_e4m3fn:
            try:
                q, scale_inv = quantize_block(weight)
            except ValueError as error:
                raise ValueError(f"cannot save {entry.name} in FP8: {error}") from None
            tensors[entry.name], tensors[f"{entry.name}_scale_inv"] = q.cpu(), scale_inv.cpu()
        elif not entry.is_scale:
            weight = weight.to("cpu", entry.dtype).contiguous()
            tensors[entry.name] = weight.clone() if entry.is_copy else weight  # safetensors stores no aliases
    return tensors


def _config_json(cfg: ModelConfig, fp8: bool, dtype: torch.dtype) -> dict:
    values = cfg.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    values.pop("dtype", None)  # the newer name of torch_dtype; a leftover of the folder the model was loaded from
    values.pop("quantization_config", None)
    return values | ({"quantization_config": FP8_CONFIG} if fp8 else {})


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _is_checkpoint_file(name: str) -> bool:
    return name in (CONFIG, INDEX) or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name) is not None


# ---- loading --------------------------------------------------------------------------------------------------------


def load(folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None,
         mtp: bool | str = "auto") -> Transformer:  # fmt: skip
    """Reads a checkpoint folder, published, saved by transformers or by `save`, into a new model.

    The model is built without storage, then filled tensor by tensor; FP8 weights are dequantised one at a time on the
    target device. Only safetensors are read.

    Args:
        folder: with config.json and model.safetensors.index.json (or a single model.safetensors).
        dtype: of the model; None: the widest that is stored, and bfloat16 for FP8. The bias stays float32.
        device: torch's default device if None.
        mtp: True: the MTP modules must be there. False: they are left out. "auto": as the config says, but a
            checkpoint without a single MTP tensor (transformers saves such ones) loads without MTP, with a warning.

    Raises:
        CheckpointError: a file missing or damaged, or tensors missing, unexpected, or of the wrong shape or dtype
        (all listed in one error), or an MTP layer whose embedding or head is no copy of the main one.
    """
    folder = Path(folder)
    if mtp not in (True, False, "auto"):
        raise ValueError(f"mtp: got {mtp!r}, allowed are True, False and 'auto'")
    if dtype is not None and dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, allowed are {', '.join(map(str, MODEL_DTYPES))}")
    device = torch.get_default_device() if device is None else check_device(device)
    restore_interrupted(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    cfg = ModelConfig.from_json(folder / CONFIG)
    stored = read_headers(folder)
    fp8 = _check_quantization(folder, cfg.quantization_config)
    cfg, stored = _choose_mtp(folder, cfg, stored, mtp)
    with torch.device("meta"), _default_dtype(dtype or _stored_dtype(stored)):
        model = Transformer(cfg)
    wanted = _check_tensors(folder, entries_of(model, fp8, torch.bfloat16), stored, cfg)
    model.to_empty(device=device)
    if cfg.tie_word_embeddings:  # storage given out parameter by parameter has parted them
        model.lm_head.weight = model.model.embed_tokens.weight
    _fill(model, folder, wanted, stored)
    return model


def _check_quantization(folder: Path, quantization: dict | None) -> bool:
    """Whether the config promises FP8; raises for a format that we cannot decode."""
    if not quantization:
        return False
    for key, value in FP8_CONFIG.items():
        found = quantization.get(key, value if key == "fmt" else None)
        if key != "activation_scheme" and found != value:  # how activations are scaled is no matter of the weights
            raise CheckpointError(f"{folder / CONFIG}: quantization_config.{key}={found!r}, allowed is {value!r}")
    return True


def _choose_mtp(folder: Path, cfg: ModelConfig, stored: dict[str, Header], mtp: bool | str):
    """The config and headers with or without the MTP layers, by the rule in `load`."""
    depth = cfg.num_nextn_predict_layers
    main = {name: header for name, header in stored.items() if _layer(name) < cfg.num_hidden_layers}
    has_mtp = len(main) < len(stored)
    if mtp is True and not (depth and has_mtp):
        raise CheckpointError(f"{folder}: mtp=True, but num_nextn_predict_layers={depth} and "
                              f"{len(stored) - len(main)} MTP tensors are stored")  # fmt: skip
    if mtp is False:
        return cfg.replace(num_nextn_predict_layers=0), main
    if depth and not has_mtp:
        warnings.warn(f"{folder}: config.json says num_nextn_predict_layers={depth}, but no MTP tensor is stored; "
                      "the model is loaded without MTP modules", stacklevel=3)  # fmt: skip
        return cfg.replace(num_nextn_predict_layers=0), main
    return cfg, stored


def _layer(name: str) -> int:
    """The N of model.layers.N, or -1."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _stored_dtype(stored: dict[str, Header]) -> torch.dtype:
    """bfloat16 for FP8, else the widest dtype of all tensors but the always-FP32 bias."""
    kinds = {h.dtype for name, h in stored.items() if not name.endswith("e_score_correction_bias")}
    if "F8_E4M3" in kinds:
        return torch.bfloat16
    dtypes = [DTYPES[kind] for kind in kinds if kind in DTYPES]
    return reduce(torch.promote_types, dtypes) if dtypes else torch.bfloat16


def _check_tensors(folder: Path, entries: list[Entry], stored: dict[str, Header], cfg: ModelConfig) -> list[Entry]:
    """The entries to read. Raises one error that lists everything missing, unexpected or of wrong shape or dtype.

    Weights of an FP8 checkpoint may be stored unquantised; then they have no scales. MTP copies may be left out, and
    so may a tied head, which may also be there.
    """
    is_fp8 = {name for name, header in stored.items() if header.dtype == "F8_E4M3"}
    entries = [e for e in entries if not e.is_scale or e.name.removesuffix("_scale_inv") in is_fp8]
    if cfg.tie_word_embeddings and "lm_head.weight" in stored:
        source = "model.embed_tokens.weight"
        shape = next(entry.shape for entry in entries if entry.name == source)
        entries.append(Entry("lm_head.weight", shape, torch.bfloat16, source))
    expected = {entry.name: entry for entry in entries}
    wrong = defaultdict(list)
    for name, entry in expected.items():
        if name in stored:
            header, allowed = stored[name], _allowed_dtypes(entry)
            if header.shape != tuple(entry.shape):
                wrong["wrong shape"].append(f"{name}: found {header.shape}, expected {tuple(entry.shape)}")
            if header.dtype not in allowed:
                wrong["wrong dtype"].append(f"{name}: found {header.dtype}, allowed {', '.join(allowed)}")
        elif not entry.is_copy:
            wrong["missing"].append(f"{name} {tuple(entry.shape)}")
    # Old exports of transformers store the rotary frequencies, which follow from the config.
    extra = [name for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    wrong["unexpected"] = [f"{name} {stored[name].shape}" for name in extra]
    if any(wrong.values()):
        lines = [f"\n  {kind} ({len(items)}): {some(items)}" for kind, items in wrong.items() if items]
        raise CheckpointError(f"{folder}: the tensors are not those of config.json:{''.join(lines)}")
    return [entry for entry in entries if entry.name in stored]


def _allowed_dtypes(entry: Entry) -> list[str]:
    if entry.is_scale:
        return ["F32"]
    return [kind for kind in DTYPES if kind != "F8_E4M3" or entry.dtype == torch.float8_e4m3fn]


@torch.no_grad()
def _fill(model: Transformer, folder: Path, wanted: list[Entry], stored: dict[str, Header]) -> None:
    """Copies shard after shard into the model; the experts go straight to their rows of the stacked tensors."""
    state = model.state_dict()
    opened = lru_cache(maxsize=2)(lambda file: open_shard(folder / file))  # a weight's scales may lie in another file
    # Copies last: they are compared with what was loaded. Everything else in the order of the files.
    for entry in sorted(wanted, key=lambda e: (e.is_copy, stored[e.name].file)):
        if entry.is_scale:
            continue
        target = state[entry.source][entry.part]
        value = opened(stored[entry.name].file).get_tensor(entry.name).to(target.device)
        if value.dtype == torch.float8_e4m3fn:
            scale = f"{entry.name}_scale_inv"
            scale_inv = opened(stored[scale].file).get_tensor(scale).to(target.device)
            value = dequantize(value, scale_inv, dtype=target.dtype)
        if not entry.is_copy:
            target.copy_(value)
        elif not torch.equal(target, value.to(target.dtype)):
            raise CheckpointError(f"{folder}: {entry.name} differs from {entry.source}, which this model uses in its "
                                  "place; mtp=False loads the main model alone")  # fmt: skip


class _default_dtype:
    """Builds parameters in a dtype, and gives torch its default back."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self):
        self.previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.previous)
