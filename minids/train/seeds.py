"""Lucky and unlucky seeds: how far apart do runs end that differ in nothing but chance?

The problem: a paper reports that change X lowers the loss by 0.01. A run has two seeds, one for the weights at the
start and one for the order of the data, and its own rounding errors. Unless the spread they cause is known, 0.01 may
be X or may be luck. So the same small model is trained over and over:

    init      another draw of the weights, the same order of rows
    order     the same weights, another order of the same rows
    both      both seeds change together: what two people who repeat a run get
    <change>  one thing changed, with the seeds of `both`: paired runs, whose differences the seeds leave less noisy

One of the changes is none: a smaller micro-batch, which is the same mathematics in another order of summation.

Simplifications: every choice of documents, split, tokenizer and FIM stays as it is; a million parameters and 200
thousand tokens a run. The committed figures are made by `python -m minids.train.seeds --workers 16`: 84 runs of about
half a minute on one core each. Another Python has another standard library and so slightly other losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from minids.data import DataConfig
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.state import write_atomic
from minids.train.step import validation_loss
from minids.train.trainer import Trainer

MODEL = ("hidden_size=96", "num_hidden_layers=3", "intermediate_size=256", "moe_intermediate_size=64", "q_lora_rank=48",
         "kv_lora_rank=24", "qk_nope_head_dim=24", "qk_rope_head_dim=8", "v_head_dim=24", "initializer_range=0.02")
RECIPE = {"sequence_length": 128, "batch": 8, "batch_start": 2, "lr": 4e-3, "warmup_steps": 10}
# name -> (settings of the run, of its recipe, of its optimizer) that differ from the baseline
CHANGES: dict[str, tuple[dict, dict, dict]] = {
    "micro-batches of 2, not 8": ({"micro_batch": 2}, {}, {}),
    "no MTP": ({"model": (*MODEL, "num_nextn_predict_layers=0")}, {}, {}),
    "no balancing bias": ({}, {"gamma": 0.0}, {}),
    "no weight decay": ({}, {}, {"weight_decay": 0.0}),
    "layer-wise rates, x 0.8": ({}, {}, {"layer_decay": 0.8}),
    "half the peak rate": ({}, {"lr": 2e-3}, {}),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: which group it belongs to, and its two seeds."""

    group: str
    init: int
    order: int


def jobs(seeds: int, paired: int) -> Iterator[Job]:
    """`seeds` runs each for init, order and both; `paired` runs for every change. Group `both` holds the baseline."""
    for seed in range(seeds):
        yield Job("both", seed, seed)
        yield Job("init", seed, 0)
        yield Job("order", 0, seed)
    for name in CHANGES:
        for seed in range(paired):
            yield Job(name, seed, seed)


def settings(job: Job, folder: Path, tokens: int) -> TrainConfig:
    """The configuration of a run in `folder`, whose cache of tokens is shared by all."""
    run, recipe, optim = CHANGES.get(job.group, ({}, {}, {}))
    config = TrainConfig(
        name="seeds", out=folder / f"{job.group.replace('/', '-')}-{job.init}-{job.order}", model=MODEL, seed=job.init,
        data=DataConfig(max_bytes=2_000_000, vocab_size=1024, cache_dir=str(folder / "cache")),
        recipe=RecipeConfig(tokens=tokens, **{**RECIPE, **recipe}), micro_batch=8, eval_rows=10_000)  # all rows
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **optim), **run)


def one_run(work: tuple[Job, Path, int]) -> dict:
    """Train, and return the losses (nats a token) and the balance of a run."""
    job, folder, tokens = work
    torch.set_num_threads(1)
    trainer = Trainer.start(settings(job, folder, tokens))
    trainer.data.train.seed = job.order  # the order of rows alone; the documents and their FIM stay
    recipe, losses, violations = trainer.config.recipe.build(), [], []
    while recipe.next_batch(trainer.progress.tokens):
        record = trainer.step()
        losses.append(record["loss"])
        violations.append(record["maxvio_mean"])
    trainer.log.close()
    tail = len(violations) // 4
    valid = validation_loss(trainer.model, trainer.data.valid, trainer.config)
    return {**dataclasses.asdict(job), "valid": valid, "maxvio": sum(violations[-tail:]) / tail,
            "losses": [round(x, 3) for x in losses] if job.group == "both" else []}


def sweep(seeds: int, paired: int, tokens: int, workers: int, folder: Path) -> list[dict]:
    """All runs, on `workers` processes of one thread each."""
    work = [(job, folder, tokens) for job in jobs(seeds, paired)]
    first = one_run(work[0])  # fills the cache that the others read
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        rest = pool.imap(one_run, work[1:])
        bar = tqdm(rest, total=len(work), initial=1, unit="run", disable=bool(os.environ.get("CI")))
        return [first, *bar]


def main() -> None:
    """Train the same small model many times and write how it ended each time."""
    parser = argparse.ArgumentParser(prog="python -m minids.train.seeds", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("figures/pretraining/seeds.json"), help="the file to write")
    parser.add_argument("--seeds", type=int, default=12, help="runs for each kind of seed (default 12)")
    parser.add_argument("--paired", type=int, default=8, help="runs for each change (default 8)")
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens of a run (default 200000)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default 2)")
    options = parser.parse_args()
    for name in ("seeds", "paired", "tokens", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.paired > options.seeds:
        parser.error(f"--paired must be at most --seeds = {options.seeds}, got {options.paired}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = sweep(options.seeds, options.paired, options.tokens, options.workers, Path(folder))
    command = (f"python -m minids.train.seeds --seeds {options.seeds} --paired {options.paired} "
               f"--tokens {options.tokens}")
    found = {"command": command, "python": platform.python_version(), "torch": torch.__version__.split("+")[0],
             "runs": json.loads(json.dumps(runs), parse_float=lambda text: round(float(text), 4))}
    write_atomic(options.out, json.dumps(found) + "\n")
    print(f"{len(runs)} runs written to {options.out}")


if __name__ == "__main__":
    main()
