"""``torchrun --nproc-per-node 4 -m minids train --expert-parallel 4``: pre-training with spread experts and ZeRO-1.

The recipe, the data, the run folder and every number of a step are those of minids.train.trainer, but for the order of
sums; the loop is the pipeline's (minids/pipeline/train.py). Each process is one data rank with a device of its own: gloo
on the CPU, NCCL with a GPU a local rank.

    torchrun --nproc-per-node 4 -m minids train --expert-parallel 4
    torchrun --nproc-per-node 8 -m minids train --expert-parallel 4 --expert-wire v3       # two replicas, FP8 rows
    torchrun --nproc-per-node 4 -m minids train --expert-parallel 2 --pipeline dualpipe    # two pipelines of two ranks
    torchrun --nproc-per-node 8 -m minids train --expert-parallel 2 --pipeline dualpipe --pipeline-ranks 2    # 2 x 2 x 2

--expert-parallel is EP, a divisor of the processes and of the experts; the processes of one machine (LOCAL_WORLD_SIZE)
are a node. With --pipeline each data rank is a pipeline of processes / EP ranks, or of --pipeline-ranks
(expert_pipeline.py). Checkpoints are gathered in the published format by rank 0 and say nothing of ranks: with --resume a
run goes on on any number of processes that its batches divide over, with a pipeline or without, or in one process.

Simplifications: those of the pipeline's loop. A global batch must divide over the data ranks; the batch does not grow
unless --recipe.batch-start says so, and a rest of the budget that does not divide is left out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from minids.config import ModelConfig
from minids.parallel.checkpoint import fill, load_moments, own_entries
from minids.parallel.expert_pipeline import ExpertPipeline
from minids.parallel.mesh import Layout, Mesh
from minids.parallel.step import WIRES, ExpertParallel, check_balance, check_batch
from minids.pipeline.launch import device_of
from minids.pipeline.runtime import Placement, choose_micro_batches
from minids.pipeline.stages import model_on_meta
from minids.pipeline.train import PipelineRun, batches_left, run_rank
from minids.published import entries_of
from minids.shards import read_headers
from minids.train import state
from minids.train.settings import FREE_ON_RESUME, TrainConfig


def layout_of(config: TrainConfig, cfg: ModelConfig) -> Layout:
    """The layout of torchrun's processes. Raises ValueError for one that cannot work."""
    world, ep, pp = int(os.environ["WORLD_SIZE"]), config.expert_parallel, 1
    if config.pipeline is not None:
        pp = config.pipeline_ranks or (1 if world % ep else world // ep)
    try:
        layout = Layout(world, ep, pp, gpus_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        layout.check_experts(cfg.n_routed_experts)
    except ValueError as error:
        raise ValueError(f"--expert-parallel {ep} on {world} processes: {error}") from None
    if config.pipeline is not None and (pp < 2 or pp % 2):
        raise ValueError(f"--pipeline {config.pipeline} --expert-parallel {ep} on {world} processes: a pipeline of {pp} "
                         "ranks; allowed is an even number of at least 2 that divides processes / EP (--pipeline-ranks)")
    return layout


def check_rows(config: TrainConfig, layout: Layout, rows: int) -> None:
    """Raises ValueError for a global batch that does not divide over the data ranks, or they into micro-batches."""
    check_batch(rows, layout.dp)
    if config.pipeline is not None:
        try:
            choose_micro_batches(config, layout.pp, rows // layout.dp)
        except ValueError as error:
            raise ValueError(f"{error}, times {layout.dp} pipelines") from None


def check(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, None for a run from the start. Raises ValueError, FileExistsError, FileNotFoundError
    for settings that cannot work; reads no data and writes nothing."""
    cfg = config.model_config()
    layout = layout_of(config, cfg)
    check_balance(config, cfg)
    if config.pipeline is not None:
        Placement.plan(config, cfg, layout.pp)
    device_of(config.device)
    found = state.check_folder(config.folder, config.to_dict(), config.resume, config.overwrite, FREE_ON_RESUME)
    done = json.loads((found / "trainer.json").read_text())["progress"]["tokens"] if found is not None else 0
    for rows in batches_left(config, done):
        check_rows(config, layout, rows)
    return found


def train_expert_parallel(config: TrainConfig) -> dict:
    """Run ``config`` as one of torchrun's processes; returns a summary on rank 0, {} elsewhere.

    Settings that cannot work are refused before anything starts, by a ValueError on rank 0; the others leave quietly.
    """
    if "RANK" not in os.environ:
        pipe = "" if config.pipeline is None else f" --pipeline {config.pipeline}"
        ranks = config.expert_parallel * (config.pipeline_ranks or 2 if pipe else 1)
        raise ValueError(f"--expert-parallel {config.expert_parallel} needs one process a rank: start it as torchrun "
                         f"--nproc-per-node {ranks} -m minids train{pipe} --expert-parallel ...")  # fmt: skip
    return run_rank(config, check, ExpertRun if config.pipeline is None else ExpertPipelineRun)


class ExpertRun(PipelineRun):
    """One rank of a run: the pipeline's loop around another step."""

    def _engine(self, cfg: ModelConfig) -> ExpertParallel:
        config = self.config
        self.mesh = Mesh.connect(layout_of(config, cfg), torch.device(config.device).type)
        torch.manual_seed(config.seed)
        return ExpertParallel(cfg, config, self.mesh, config.expert_dispatch, WIRES[config.expert_wire])

    def _load(self, found: Path, values: dict) -> None:
        """Weights, bias and moments; of the layers and experts, this rank's alone."""
        engine, held = self.pipeline, self.mesh.experts(self.pipeline.cfg.n_routed_experts)
        entries, own = entries_of(model_on_meta(engine.cfg, engine.dtype), False, engine.dtype), engine.model.state_dict()
        entries = own_entries([entry for entry in entries if entry.source in own], held)
        fill(engine.model, found, entries, read_headers(found))
        load_moments(engine.optimizer, found, values["optimizer"], held)

    def _next_batch(self) -> int:
        """Sequences of the next batch; 0 at the end, or when the rest of the budget does not divide over the ranks."""
        rows = self.recipe.next_batch(self.progress.tokens)
        rest = self.recipe.total_tokens - self.progress.tokens
        if rows and rest <= rows * self.recipe.sequence_length and self.progress.step:
            try:
                check_rows(self.config, self.mesh.layout, rows)
            except ValueError:
                return 0
        return rows

    def _cut(self, rows: int) -> dict:
        return {}

    def _announce(self) -> None:
        config, layout, cfg = self.config, self.mesh.layout, self.pipeline.cfg
        counts = cfg.count()
        held = len(self.mesh.experts(cfg.n_routed_experts))
        print(f"{config.name}: {counts['main'] + counts['mtp']:,} parameters on {layout.dp} data ranks, EP {layout.ep} on "
              f"{layout.nodes} node(s), {held} of {cfg.n_routed_experts} experts a layer and rank, {layout.replicas} "
              f"replica(s), {config.expert_dispatch}; {config.recipe.tokens:,} tokens to train on; "
              f"writing to {config.folder}", flush=True)  # fmt: skip


class ExpertPipelineRun(ExpertRun):
    """One rank of a run of several pipelines that share their experts."""

    def _engine(self, cfg: ModelConfig) -> ExpertPipeline:
        config, layout = self.config, layout_of(self.config, cfg)
        self.mesh = Mesh.connect(layout, torch.device(config.device).type)
        torch.manual_seed(config.seed)
        return ExpertPipeline(Placement.plan(config, cfg, layout.pp), config, self.mesh, config.expert_dispatch,
                              WIRES[config.expert_wire])  # fmt: skip

    def _cut(self, rows: int) -> dict:
        layout = self.mesh.layout
        return {"micro_batches": choose_micro_batches(self.config, layout.pp, rows // layout.dp)}

    def _announce(self) -> None:
        config, layout, schedule = self.config, self.mesh.layout, self.pipeline.placement.schedule
        print(f"{config.pipeline}: {schedule.stages} stages on {layout.pp} ranks, {layout.dp} pipelines side by side",
              flush=True)  # fmt: skip
        super()._announce()
