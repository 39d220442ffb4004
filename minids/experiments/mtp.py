"""Does multi-token prediction pay? The same small model with and without, at equal tokens and at equal compute.

Five arms, each from the same weights and over the same order of rows of Python source for each seed:

    plain              no MTP
    plain, longer      no MTP, as many more tokens as one MTP module costs in FLOPs
    MTP, D = 1         V3's module, lambda 0.3, then 0.1
    MTP, D = 2         two modules in a causal chain
    parallel, D = 2    two heads that both read the main model's state and see no later token [2404.19737]

What is kept of a run, all on held-out text and with the text's own tokens as input (N counted positions):

    valid       nats a token of the main model, which is what is kept for inference
    mtp_valid   nats a token of each depth
    agree       share of positions at which depth k and the main model, k positions on, have the same best token: the
                draft that greedy speculation accepts
    overlap     mean of sum_v min(p_v, q_v), p the main model's distribution and q the depth's: the draft that sampling
                accepts
    both        share at which depths 1 and 2 agree with the main model: the second draft counts only after the first

Simplifications: a million parameters, 400 thousand tokens, one learning rate for all; accepted shares are of human
text, not of the model's own. The parallel heads are V3's modules without their token, so that sizes are equal; the
paper's heads are plain layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minids.config import ModelConfig
from minids.data import DataConfig, PackedRows
from minids.experiments.balance import append_line, read_lines, rounded, write_atomic
from minids.model.loss import IGNORE
from minids.model.mtp import mtp_labels
from minids.model.transformer import Transformer
from minids.train.seeds import MODEL, RECIPE
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.step import split_rows, validation_loss
from minids.train.trainer import Trainer

VOCAB = 1024
# name -> (depth, heads in parallel, whose FLOPs the budget is)
ARMS = {
    "plain": (0, False, 0),
    "plain, longer": (0, False, 1),
    "MTP, D = 1": (1, False, 1),
    "MTP, D = 2": (2, False, 2),
    "parallel, D = 2": (2, True, 2),
}


@dataclasses.dataclass
class MTPConfig:
    """Train one small model with and without MTP, at equal tokens and at equal FLOPs."""

    out: Path = Path("runs/mtp")
    """Folder for runs.jsonl, mtp.json and the figures; those of the course are in figures/mtp."""
    seeds: int = 5
    """Runs of each arm."""
    tokens: int = 400_000
    """Tokens of a run; the longer arm takes more."""
    max_bytes: int = 4_000_000
    """Bytes of Python source to train on and to validate with."""
    draw_only: bool = False
    """Train nothing: print the table and draw the figures of the mtp.json in the folder."""

    def __post_init__(self) -> None:
        for name, low in {"seeds": 1, "tokens": 16_000, "max_bytes": 100_000}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least {low}")


# ---- cost -------------------------------------------------------------------------------------------------------------


def module_flops(cfg: ModelConfig, length: int, depth: int = 1) -> float:
    """Training FLOPs a token of the MTP module at ``depth``: 6 a parameter that is multiplied, the shared head again,
    and causal attention, over the ``length - depth`` positions that it has of each row."""
    d, positions = cfg.hidden_size, length - depth
    layer = cfg.layer_parameters(cfg.is_moe_layer(cfg.num_hidden_layers), activated=True)
    pair = 2 * cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    each = 6 * (layer + 2 * d * d + 3 * d + cfg.vocab_size * d) + 3 * pair * positions / 2
    return each * positions / length


def training_flops(cfg: ModelConfig, length: int) -> float:
    """Training FLOPs a token, MTP modules included."""
    depths = range(1, cfg.num_nextn_predict_layers + 1)
    return cfg.flops_per_token(length) + sum(module_flops(cfg, length, depth) for depth in depths)


# ---- one run ----------------------------------------------------------------------------------------------------------


def settings(arm: str, seed: int, config: MTPConfig, folder: Path) -> TrainConfig:
    """The run's configuration; the text's tokens are cached in ``folder`` for all runs."""
    depth, _, paid = ARMS[arm]
    model = (*MODEL, f"num_nextn_predict_layers={depth}")
    data = DataConfig(max_bytes=config.max_bytes, vocab_size=VOCAB, cache_dir=str(folder / "cache"))
    build = TrainConfig(out=folder / f"{list(ARMS).index(arm)}-{seed}", model=model, seed=seed, data=data,
                        recipe=RecipeConfig(tokens=config.tokens, **RECIPE), micro_batch=8, eval_rows=10_000)  # fmt: skip
    cfg, length = build.model_config(VOCAB), build.recipe.sequence_length
    ratio = (training_flops(cfg.replace(num_nextn_predict_layers=paid), length)
             / training_flops(cfg.replace(num_nextn_predict_layers=depth), length))  # fmt: skip
    build.recipe.tokens = round(config.tokens * ratio / length) * length
    return build


def in_parallel(model: Transformer) -> None:
    """Turn the chain into heads side by side: every module reads the main model's state and a token of zeros."""
    trunk = []

    def detach_from_chain(module, inputs):
        hidden, embedded, context = inputs
        if module is model.mtp_modules[0]:
            trunk[:] = [hidden]
        return trunk[0][:, : hidden.shape[1]], torch.zeros_like(embedded), context

    for module in model.mtp_modules:
        module.register_forward_pre_hook(detach_from_chain)


@torch.no_grad()
def acceptance(model: Transformer, rows: PackedRows, count: int, batch: int = 8) -> dict:
    """``mtp_valid``, ``agree``, ``overlap`` (a value a depth) and ``both`` of the module docstring, over ``count`` rows.
    Positions whose label lies in another document do not count."""
    model.eval()
    depths = model.cfg.num_nextn_predict_layers
    sums, n = torch.zeros(3, depths, dtype=torch.float64), torch.zeros(depths, dtype=torch.float64)
    both = counted = 0
    for start in range(0, count, batch):
        inputs, labels, ids = split_rows(*rows.batch(start, min(batch, count - start)), False, "cpu")
        out = model(inputs, document_ids=ids, document_mask=False)
        main, found = out.logits, []
        for k, logits in enumerate(out.mtp_logits, start=1):
            wanted = mtp_labels(labels, k, ids)
            keep, target = wanted != IGNORE, main[:, k:]
            same = (logits.argmax(-1) == target.argmax(-1)) & keep
            losses = -logits.log_softmax(-1).gather(-1, wanted.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            overlap = torch.minimum(logits.softmax(-1), target.softmax(-1)).sum(-1)
            sums[:, k - 1] += torch.stack([(value * keep).sum() for value in (losses, same, overlap)]).double()
            n[k - 1] += keep.sum()
            found.append((same, keep))
        if depths > 1:
            (first, _), (second, keep) = found[0], found[1]
            both += int((first[:, : second.shape[1]] & second).sum())
            counted += int(keep.sum())
    result = dict(zip(("mtp_valid", "agree", "overlap"), (sums / n).tolist(), strict=True))
    return result | ({"both": both / counted} if depths > 1 else {})


def start_alike(model: Transformer, seed: int) -> None:
    """Give the main model the weights of the plain arm of this seed, whatever modules stand behind it."""
    torch.manual_seed(seed)
    plain = Transformer(model.cfg.replace(num_nextn_predict_layers=0))
    model.load_state_dict(plain.state_dict() | {
        name: tensor for name, tensor in model.state_dict().items() if name not in plain.state_dict()})  # fmt: skip


def one_run(arm: str, seed: int, config: MTPConfig, folder: Path) -> dict:
    """Train, and return what is kept."""
    begin = time.perf_counter()
    trainer = Trainer.start(settings(arm, seed, config, folder))
    start_alike(trainer.model, seed)
    trainer.data.train.seed = seed  # the order of rows alone
    if ARMS[arm][1]:
        in_parallel(trainer.model)
    recipe, losses = trainer.config.recipe.build(), []
    while recipe.next_batch(trainer.progress.tokens):
        losses.append(trainer.step()["loss"])
    trainer.log.close()
    model, valid = trainer.model, trainer.data.valid
    found = acceptance(model, valid, valid.n_rows) if model.mtp_modules else {}
    flops = trainer.progress.tokens * training_flops(model.cfg, recipe.sequence_length)
    return {"key": f"{arm}/{seed}", "arm": arm, "seed": seed, "tokens": trainer.progress.tokens, "flops": flops,
            "valid": validation_loss(model, valid, trainer.config), **found, "losses": losses[9::10],
            "seconds": time.perf_counter() - begin}  # fmt: skip


# ---- all runs ---------------------------------------------------------------------------------------------------------


def jobs_of(config: MTPConfig) -> Iterator[tuple[str, int]]:
    """(arm, seed), seed by seed, so that a part of it is the whole experiment with fewer seeds."""
    return ((arm, seed) for seed in range(config.seeds) for arm in ARMS)


def run(config: MTPConfig) -> dict:
    """The experiment, or what is left of it; returns what mtp.json holds. Finished runs are lines of runs.jsonl."""
    if config.draw_only:
        return show(json.loads((config.out / "mtp.json").read_text(encoding="utf-8")), config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    path, header = config.out / "runs.jsonl", {"tokens": config.tokens, "max_bytes": config.max_bytes}
    finished = read_lines(path, header)
    if not finished:
        path.unlink(missing_ok=True)
        append_line(path, header)
    done = {line["key"] for line in finished}
    todo = [job for job in jobs_of(config) if f"{job[0]}/{job[1]}" not in done]
    with tempfile.TemporaryDirectory() as folder:
        for arm, seed in tqdm(todo, unit="run", disable=bool(os.environ.get("CI"))):
            line = rounded(one_run(arm, seed, config, Path(folder)))
            append_line(path, line)
            print(f"{arm}, seed {seed}: valid {line['valid']:.4f}, {line['seconds']:.0f} s", flush=True)
    lines = {line["key"]: line for line in read_lines(path, header)}
    command = f"python -m minids experiment mtp --seeds {config.seeds} --tokens {config.tokens}"
    result = {"command": command, "python": platform.python_version(), "torch": torch.__version__.split("+")[0],
              **header, "runs": [lines[f"{arm}/{seed}"] for arm, seed in jobs_of(config)]}  # fmt: skip
    write_atomic(config.out / "mtp.json", json.dumps(result) + "\n")
    return show(result, config.out)


def show(result: dict, out: Path) -> dict:
    """Print the table and draw the figures."""
    from minids.plots import mtp as plots

    print(table(result["runs"]))
    for name in ("with_and_without", "accepted_by_depth"):
        temporary = out / f"{name}.png.tmp"
        getattr(plots, name)(result).savefig(temporary, format="png")
        os.replace(temporary, out / f"{name}.png")
    return result


def differences(runs: list[dict], arm: str, against: str) -> list[float]:
    """Validation loss of ``arm`` less that of ``against``, seed by seed (nats a token)."""
    base = {line["seed"]: line["valid"] for line in runs if line["arm"] == against}
    return [line["valid"] - base[line["seed"]] for line in runs if line["arm"] == arm and line["seed"] in base]


def table(runs: list[dict]) -> str:
    """Means over seeds, as Markdown; accepted shares for each depth."""
    lines = ["| arm | tokens | TFLOP | valid | agree | overlap | both |", "|---|--:|--:|--:|--:|--:|--:|"]
    for arm in ARMS:
        found = [line for line in runs if line["arm"] == arm]
        if not found:
            continue
        spread = statistics.stdev(line["valid"] for line in found) if len(found) > 1 else 0.0
        cells = [arm, f"{found[0]['tokens']:,}", f"{found[0]['flops'] / 1e12:.2f}",
                 f"{statistics.mean(line['valid'] for line in found):.3f} +- {spread:.3f}"]  # fmt: skip
        for name in ("agree", "overlap"):
            cells.append(" ".join(f"{_mean(values):.3f}" for values in zip(*(line.get(name, []) for line in found),
                                                                         strict=True)))  # fmt: skip
        both = [line["both"] for line in found if "both" in line]
        lines.append("| " + " | ".join([*cells, f"{_mean(both):.3f}" if both else ""]) + " |")
    return "\n".join(lines)


def _mean(values: Tensor | list | tuple) -> float:
    return statistics.mean(values)
