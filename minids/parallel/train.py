"""``torchrun --nproc-per-node 4 -m minids train --expert-parallel 4``: pre-training with spread experts and ZeRO-1.

The recipe, the data, the run folder and every number of a step are those of minids.train.trainer, but for the order of
sums; the loop is the pipeline's (minids/pipeline/train.py). Each process is one data rank with a device of its own: gloo
on the CPU, NCCL with a GPU a local rank.

    torchrun --nproc-per-node 4 -m minids train --expert-parallel 4
    torchrun --nproc-per-node 8 -m minids train --expert-parallel 4 --expert-wire v3       # two replicas, FP8 rows

--expert-parallel is EP, a divisor of the processes and of the experts; the processes of one machine (LOCAL_WORLD_SIZE)
are a node. Checkpoints are gathered in the published format by rank 0 and say nothing of ranks: with --resume a run goes
on on any number of processes that its batches divide over, in a pipeline, or in one process without --expert-parallel.

Simplifications: those of the pipeline's loop. A global batch must divide over the data ranks; the batch does not grow
unless --recipe.batch-start says so, and a rest of the budget that does not divide is left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from minids.config import ModelConfig
from minids.parallel.checkpoint import fill, load_moments, own_entries
from minids.parallel.mesh import Layout, Mesh
from minids.parallel.step import WIRES, ExpertParallel, check_balance, check_batch
from minids.pipeline.launch import Watch, device_of, initialise
from minids.pipeline.resume import load_rng
from minids.pipeline.stages import model_on_meta
from minids.pipeline.train import PipelineRun
from minids.published import entries_of
from minids.shards import read_headers
from minids.train import state
from minids.train.metrics import MetricsLog
from minids.train.settings import FREE_ON_RESUME, TrainConfig
from minids.train.step import StepResult
from minids.train.trainer import Progress, fingerprint


def layout_of(config: TrainConfig, cfg: ModelConfig) -> Layout:
    """The layout of torchrun's processes. Raises ValueError for one that cannot work."""
    world = int(os.environ["WORLD_SIZE"])
    try:
        layout = Layout(world, config.expert_parallel, gpus_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        layout.check_experts(cfg.n_routed_experts)
    except ValueError as error:
        raise ValueError(f"--expert-parallel {config.expert_parallel} on {world} processes: {error}") from None
    return layout


def check(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, None for a run from the start. Raises ValueError, FileExistsError, FileNotFoundError
    for settings that cannot work; reads no data and writes nothing."""
    cfg = config.model_config()
    layout = layout_of(config, cfg)
    check_balance(config, cfg)
    device_of(config.device)
    found = state.check_folder(config.folder, config.to_dict(), config.resume, config.overwrite, FREE_ON_RESUME)
    done = json.loads((found / "trainer.json").read_text())["progress"]["tokens"] if found is not None else 0
    batches = [rows for tokens, rows in config.recipe.build().batches() if tokens >= done]
    for rows in sorted(set(batches[:-1] or batches)):
        check_batch(rows, layout.dp)
    return found


def train_expert_parallel(config: TrainConfig) -> dict:
    """Run ``config`` as one of torchrun's processes; returns a summary on rank 0, {} elsewhere.

    Settings that cannot work are refused before anything starts, by a ValueError on rank 0; the others leave quietly.
    """
    if "RANK" not in os.environ:
        raise ValueError(f"--expert-parallel {config.expert_parallel} needs one process a rank: start it as torchrun "
                         f"--nproc-per-node {config.expert_parallel} -m minids train --expert-parallel ...")  # fmt: skip
    rank = int(os.environ["RANK"])
    if config.recipe.batch_start is None and not _ramp_of_the_run(config):
        config.recipe.batch_start = config.recipe.batch
    try:
        found = check(config)
    except (ValueError, FileExistsError, FileNotFoundError):
        if rank == 0:
            raise
        time.sleep(20)  # torchrun ends all at the first exit: rank 0's, which says why
        sys.exit(2)
    settings = config.to_dict()
    with initialise(config.device) as watch:
        config.device = str(device_of(config.device))
        run = ExpertRun(config, rank, watch)
        run.start(settings, found)
        return run.run()


def _ramp_of_the_run(config: TrainConfig) -> bool:
    """Whether the run to be resumed has the recipe's own ramp: it was begun on one process."""
    file = config.folder / "run.json"
    return config.resume and file.exists() and json.loads(file.read_text())["recipe"]["batch_start"] is None


class ExpertRun(PipelineRun):
    """One rank of a run: the pipeline's loop around another step."""

    def __init__(self, config: TrainConfig, rank: int, watch: Watch):
        self.config, self.rank, self.ranks = config, rank, dist.get_world_size()
        self.progress, self.recipe = Progress(), config.recipe.build()
        with watch.busy():
            self.data = self._read_data()
        tokenizer = self.data.tokenizer
        cfg = config.model_config(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        self.mesh = Mesh.connect(layout_of(config, cfg), torch.device(config.device).type)
        torch.manual_seed(config.seed)
        self.pipeline = ExpertParallel(cfg, config, self.mesh, config.expert_dispatch, WIRES[config.expert_wire])
        self.log: MetricsLog | None = None
        self.found: Path | None = None  # the checkpoint that the run goes on from

    def start(self, settings: dict, found: Path | None) -> None:
        """Open the run folder on rank 0, and take over the checkpoint ``found``."""
        self.found, config, values = found, self.config, None
        if found is not None:
            values = json.loads((found / "trainer.json").read_text())
            if values["data"] != fingerprint(self.data):
                raise ValueError(f"--resume: the training tokens are not those of the run in {config.folder} (the corpus "
                                 f"or the tokenizer has changed): {values['data']} then, {fingerprint(self.data)} now")
            self._load(found, values)
        dist.barrier()  # rank 0 changes the folder when all have read it
        if self.rank == 0:
            state.open_folder(config.folder, settings, config.resume)
            if found is None:
                self.data.tokenizer.save(config.folder / "tokenizer.json")
            self.log = MetricsLog(config.folder / "metrics.jsonl", values["metrics_bytes"] if values else 0)

    def _load(self, found: Path, values: dict) -> None:
        """Weights, bias, moments, counters and generators; of the experts, this rank's alone."""
        engine, held = self.pipeline, self.mesh.experts(self.pipeline.cfg.n_routed_experts)
        entries = entries_of(model_on_meta(engine.cfg, engine.dtype), False, engine.dtype)
        fill(engine.model, found, own_entries(entries, held), read_headers(found))
        load_moments(engine.optimizer, found, values["optimizer"], held)
        self.progress = Progress(**values["progress"])
        state.set_rng_state(load_rng(found), values["rng"])

    def _next_batch(self) -> int:
        """Sequences of the next batch; 0 at the end, or when the rest of the budget does not divide over the ranks."""
        rows = self.recipe.next_batch(self.progress.tokens)
        rest = self.recipe.total_tokens - self.progress.tokens
        last = rest <= rows * self.recipe.sequence_length and self.progress.step
        return 0 if last and rows % self.ranks else rows

    def _record(self, result: StepResult, rates: dict, moved: bool) -> dict:
        record = {"step": self.progress.step, "tokens": self.progress.tokens, "loss": result.loss,
                  "mtp_loss": result.mtp_losses, "balance_loss": result.balance_loss,
                  "grad_norm": self.pipeline.optimizer.grad_norm, **rates}  # fmt: skip
        if len(result.loads):
            found = result.meter.read()
            violation = found["max_violation_global"]
            record |= {"maxvio_mean": sum(violation) / len(violation), "maxvio_max": max(violation)}
            for name in ("token_entropy", "load_entropy", "dropped_share", "experts_per_token", "nodes_per_token"):
                record[name] = sum(found[name]) / len(found[name])
        return record | {"skipped": self.progress.skipped, "applied": moved}

    def _announce(self) -> None:
        config, layout, cfg = self.config, self.mesh.layout, self.pipeline.cfg
        counts = cfg.count()
        held = len(self.mesh.experts(cfg.n_routed_experts))
        print(f"{config.name}: {counts['main'] + counts['mtp']:,} parameters on {self.ranks} data ranks, EP {layout.ep} on "
              f"{layout.nodes} node(s), {held} of {cfg.n_routed_experts} experts a layer and rank, {layout.replicas} "
              f"replica(s), {config.expert_dispatch}; {config.recipe.tokens:,} tokens to train on; "
              f"writing to {config.folder}", flush=True)  # fmt: skip
