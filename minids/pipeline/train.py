"""``torchrun --nproc-per-node 4 -m minids train --pipeline dualpipe``: the pre-training loop over a pipeline.

The recipe, the data and the run folder are those of minids.train.trainer, and so is every number of a step, but for the
order of sums. Each process is one pipeline rank with a device of its own: gloo on the CPU, NCCL with a GPU a local rank.

    torchrun --nproc-per-node 4 -m minids train --pipeline dualpipe
    torchrun --nproc-per-node 4 -m minids train --pipeline dualpipe_v --model num_hidden_layers=8 ...      # 2 stages a rank

All ranks read the same rows; rank 0 alone writes: metrics.jsonl, and checkpoints in the published format, gathered tensor
by tensor, which `python -m minids generate` and any other reader of the format takes. With --resume a run goes on from its
last checkpoint: bit for bit with the same schedule and ranks, and just as well with others, or without --pipeline on one
process (resume.py). All ranks must see the run folder.

Simplifications: the batch does not grow unless --recipe.batch-start says so, and then every batch on the way must divide
into micro-batches; a rest of the token budget that does not is left out. One pipeline; with --expert-parallel several
lie side by side (minids/parallel/train.py).
Validation runs on rank 0 with the gathered model. A step that is not finite is skipped on all ranks. The first
Ctrl-C ends all ranks behind the step that they are in, saved; a second one at once.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), sections 3.2.1 and 4.2.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from minids import checkpoint
from minids.config import ModelConfig
from minids.data import Data, build_data
from minids.model.transformer import Transformer
from minids.pipeline.launch import Watch, device_of, initialise
from minids.pipeline.resume import gather_state, load_rng, load_state
from minids.pipeline.runtime import Pipeline, Placement, choose_micro_batches
from minids.plots import loss_curve
from minids.train import state
from minids.train.interrupt import Interrupt
from minids.train.metrics import MetricsLog, peak_flops, read_metrics
from minids.train.settings import FREE_ON_RESUME, TrainConfig
from minids.train.step import StepResult, validation_loss
from minids.train.trainer import Progress, TrainingStopped, fingerprint, in_fp8, write_sample


def check(config: TrainConfig, ranks: int) -> Path | None:
    """The checkpoint to resume from, None for a run from the start. Raises ValueError, FileExistsError, FileNotFoundError
    for settings that cannot work; reads no data and writes nothing."""
    Placement.plan(config, config.model_config(), ranks)
    device_of(config.device)
    found = state.check_folder(config.folder, config.to_dict(), config.resume, config.overwrite, FREE_ON_RESUME)
    done = json.loads((found / "trainer.json").read_text())["progress"]["tokens"] if found is not None else 0
    for rows in batches_left(config, done):
        choose_micro_batches(config, ranks, rows)
    return found


def batches_left(config: TrainConfig, done: int) -> list[int]:
    """Sizes of the global batches after ``done`` tokens that must be cut. Not the last, a rest that is dropped where it
    cannot be (a run that is over has nothing else), unless there is no other."""
    sizes = [rows for tokens, rows in config.recipe.build().batches() if tokens >= done]
    return sorted(set(sizes[:-1] if done or len(sizes) > 1 else sizes))


def _ramp_of_the_run(config: TrainConfig) -> bool:
    """Whether the run to be resumed has the recipe's own ramp: it was begun on one process."""
    file = config.folder / "run.json"
    return config.resume and file.exists() and json.loads(file.read_text())["recipe"]["batch_start"] is None


def train_pipeline(config: TrainConfig) -> dict:
    """Run ``config`` as one of torchrun's processes; returns a summary on rank 0, {} elsewhere.

    Settings that cannot work are refused before anything starts, by a ValueError on rank 0; the others leave quietly.
    """
    if "RANK" not in os.environ:
        raise ValueError(f"--pipeline {config.pipeline} needs one process a rank: start it as "
                         "torchrun --nproc-per-node 4 -m minids train --pipeline ...")  # fmt: skip
    return run_rank(config, lambda config: check(config, int(os.environ["WORLD_SIZE"])), PipelineRun)


def run_rank(config: TrainConfig, check: Callable[[TrainConfig], Path | None], kind: type["PipelineRun"]) -> dict:
    """One of torchrun's processes: ``check`` gives the checkpoint to resume from or refuses, ``kind`` is the run."""
    rank = int(os.environ["RANK"])
    if config.recipe.batch_start is None and not _ramp_of_the_run(config):
        config.recipe.batch_start = config.recipe.batch  # a ramp passes through batches that no schedule can cut
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
        run = kind(config, rank, watch)
        run.start(settings, found)
        return run.run()


class PipelineRun:
    """One rank of a run."""

    def __init__(self, config: TrainConfig, rank: int, watch: Watch):
        self.config, self.rank, self.ranks = config, rank, dist.get_world_size()
        self.progress, self.recipe = Progress(), config.recipe.build()
        with watch.busy():
            self.data = self._read_data()
        tokenizer = self.data.tokenizer
        cfg = config.model_config(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        self.pipeline = self._engine(cfg)
        self.log: MetricsLog | None = None
        self.found: Path | None = None  # the checkpoint that the run goes on from

    def _engine(self, cfg: ModelConfig) -> Pipeline:
        """What computes gradients and takes steps, its weights drawn."""
        torch.manual_seed(self.config.seed)
        return Pipeline(Placement.plan(self.config, cfg, self.ranks), self.config, torch.device(self.config.device))

    def start(self, settings: dict, found: Path | None) -> None:
        """Open the run folder on rank 0, and take over the checkpoint ``found``."""
        self.found, config, values = found, self.config, None
        if found is not None:
            values = json.loads((found / "trainer.json").read_text())
            if values["data"] != fingerprint(self.data):
                raise ValueError(f"--resume: the training tokens are not those of the run in {config.folder} (the corpus "
                                 f"or the tokenizer has changed): {values['data']} then, {fingerprint(self.data)} now")
            self._load(found, values)
            self.progress = Progress(**values["progress"])
            state.set_rng_state(load_rng(found), values["rng"])
        dist.barrier()  # rank 0 changes the folder when all have read it
        if self.rank == 0:
            state.open_folder(config.folder, settings, config.resume)
            if found is None:
                self.data.tokenizer.save(config.folder / "tokenizer.json")
            self.log = MetricsLog(config.folder / "metrics.jsonl", values["metrics_bytes"] if values else 0)

    def _load(self, found: Path, values: dict) -> None:
        """Weights, bias and moments of this rank's part."""
        load_state(self.pipeline, found)

    def _read_data(self) -> Data:
        """Rank 0 first: it fills the cache that the others then find full."""
        length, data = self.config.recipe.sequence_length, None
        for turn in (self.rank == 0, self.rank != 0):
            if turn:
                data = build_data(self.config.data, length, progress=self.rank == 0 and not os.environ.get("CI"))
            dist.barrier()
        return data

    def run(self) -> dict:
        """Train to the end of the budget."""
        config, progress = self.config, self.progress
        steps = sum(1 for _ in self.recipe.batches())
        if self.rank == 0:
            self._announce()
        folder, quiet = self.found, self.rank != 0 or bool(os.environ.get("CI"))
        bar = tqdm(total=steps, initial=progress.step, unit="step", disable=quiet)
        with Interrupt(quiet=self.rank != 0) as interrupt, bar:
            while rows := self._next_batch():
                record = self.step(rows)
                final = not self._next_batch()
                if config.eval_every and (progress.step % config.eval_every == 0 or final):
                    record |= self.evaluate()
                if self.log is not None:
                    self.log.write(record)
                bar.total = progress.step if final else steps  # a rest that cannot be cut is dropped
                bar.update()
                bar.set_postfix_str(f"loss {progress.loss:.3f}", refresh=False)
                if progress.skips_in_row >= config.max_skips:
                    raise TrainingStopped(f"{progress.skips_in_row} steps in a row were not finite")
                stop = self._largest(interrupt.received or 0)
                if stop or final or progress.step % config.save_every == 0:
                    folder = self.save()
                if stop:
                    bar.close()
                    if self.rank == 0:
                        print(f"stopped after step {progress.step} of {steps}, saved as {folder}; continue with the same "
                              "command and --resume", flush=True)  # fmt: skip
                    raise SystemExit(128 + stop)
        return self._summary(folder) if self.rank == 0 else {}

    def _largest(self, value: int) -> int:
        """Of all ranks' values: a signal may reach them in different steps."""
        found = torch.tensor(value, device=self.config.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def _next_batch(self) -> int:
        """Sequences of the next batch; 0 at the end, or when the rest of the budget does not divide into micro-batches."""
        rows = self.recipe.next_batch(self.progress.tokens)
        rest = self.recipe.total_tokens - self.progress.tokens
        if rows and rest <= rows * self.recipe.sequence_length and self.progress.step:
            try:
                choose_micro_batches(self.config, self.ranks, rows)
            except ValueError:
                return 0
        return rows

    def step(self, rows: int) -> dict:
        """One optimizer step of ``rows`` sequences; returns its metrics record."""
        config, progress, recipe = self.config, self.progress, self.recipe
        started, after = time.perf_counter(), progress.tokens + rows * recipe.sequence_length
        rates = {"lr": recipe.lr(after), "batch": rows, "gamma": recipe.gamma(progress.tokens),
                 "lambda": recipe.mtp_lambda(progress.tokens)}  # fmt: skip
        tokens, document_ids = self.data.train.batch(progress.position, rows)
        result = self.pipeline.compute_gradients(tokens, document_ids, rates["lambda"])
        moved = self.pipeline.step(rates["lr"], rates["gamma"], result)
        progress.step, progress.tokens, progress.position = progress.step + 1, after, progress.position + rows
        progress.skipped += not moved
        progress.skips_in_row = 0 if moved else progress.skips_in_row + 1
        progress.loss, seconds = result.loss, time.perf_counter() - started
        progress.seconds += seconds
        speed = rows * recipe.sequence_length / seconds
        return self._record(result, rates, moved) | {"tokens_per_second": speed} | self._utilisation(speed, config)

    def _record(self, result: StepResult, rates: dict, moved: bool) -> dict:
        record = {"step": self.progress.step, "tokens": self.progress.tokens, "loss": result.loss,
                  "mtp_loss": result.mtp_losses, "balance_loss": result.balance_loss,
                  "grad_norm": self.pipeline.optimizer.grad_norm, **rates, **self._cut(rates["batch"])}  # fmt: skip
        if len(result.loads):
            found = result.meter.read()
            violation = found["max_violation_global"]
            record |= {"maxvio_mean": sum(violation) / len(violation), "maxvio_max": max(violation)}
            for name in ("token_entropy", "load_entropy", "dropped_share", "experts_per_token", "nodes_per_token"):
                record[name] = sum(found[name]) / len(found[name])
        return record | {"skipped": self.progress.skipped, "applied": moved}

    def _cut(self, rows: int) -> dict:
        """How a batch was cut, for the record."""
        return {"micro_batches": choose_micro_batches(self.config, self.ranks, rows)}

    def _utilisation(self, speed: float, config: TrainConfig) -> dict:
        if torch.device(config.device).type != "cuda":
            return {}
        peak = peak_flops(torch.cuda.get_device_name(), config.resolved_precision != "fp32")
        flops = self.pipeline.cfg.flops_per_token(config.recipe.sequence_length)
        return {"mfu": speed * flops / (peak * self.ranks)} if peak else {}

    def evaluate(self) -> dict:
        """Validation loss in nats a token, on rank 0; the others wait."""
        model = self.pipeline.gather_model()
        if model is not None:
            model = in_fp8(model.to(self.config.device), self.config)
            self.progress.valid_loss = validation_loss(model, self.data.valid, self.config)
        dist.barrier()
        return {"valid_loss": self.progress.valid_loss} if model is not None else {}

    def save(self) -> Path | None:
        """Gather model and moments and write the checkpoint of the current step; its folder on rank 0."""
        model, gathered, config = self.pipeline.gather_model(), gather_state(self.pipeline), self.config
        if model is None:
            return None
        tensors, optimizer = gathered
        rng_tensors, rng = state.rng_state()

        def write_model(folder: Path) -> None:
            checkpoint.save(model, folder)
            self.data.tokenizer.save(folder / "tokenizer.json")

        values = {"progress": asdict(self.progress), "optimizer": optimizer, "rng": rng, "pipeline": config.pipeline,
                  "ranks": self.ranks, "metrics_bytes": self.log.sync(), "data": fingerprint(self.data),
                  "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
        tensors = {f"optimizer/{key}": tensor for key, tensor in tensors.items()} | rng_tensors
        folder = state.save_checkpoint(config.folder, self.progress.step, write_model, tensors, values, config.keep)
        temporary = config.folder / "loss.png.tmp"
        loss_curve(read_metrics(config.folder), title=config.name).savefig(temporary, format="png")
        os.replace(temporary, config.folder / "loss.png")
        self._sample(model)
        return folder

    def _sample(self, model: Transformer) -> None:
        if self.config.sample_tokens and not self._next_batch():
            # write_sample reads these three of a trainer.
            write_sample(SimpleNamespace(config=self.config, data=self.data, model=model))

    def _announce(self) -> None:
        config, counts, placement = self.config, self.pipeline.cfg.count(), self.pipeline.placement
        print(f"{config.name}: {counts['main'] + counts['mtp']:,} parameters in {placement.schedule.stages} stages on "
              f"{self.ranks} ranks, {config.pipeline}; "
              f"{config.recipe.tokens:,} tokens to train on; writing to {config.folder}")
        for rank in range(self.ranks):
            held = ", ".join(f"stage {s}{' (other direction)' if d else ''}: layers {_span(placement.pieces[s].layers)}"
                             for d, s in placement.schedule.stages_of(rank))  # fmt: skip
            print(f"  rank {rank}: {held}", flush=True)

    def _summary(self, folder: Path) -> dict:
        progress, out = self.progress, self.config.folder
        self.log.close()
        valid = "" if math.isnan(progress.valid_loss) else f", validation {progress.valid_loss:.4f}"
        print(f"loss {progress.loss:.4f}{valid} after {progress.step} steps, {progress.tokens:,} tokens, "
              f"{progress.seconds:.0f} s of training, {progress.skipped} steps skipped\n"
              f"checkpoint  {folder}\nmetrics     {out / 'metrics.jsonl'}\n"
              f"write more  python -m minids generate --checkpoint {out} --prompt \"def \"")  # fmt: skip
        return json.loads(json.dumps({"out": str(out), "checkpoint": str(folder), **asdict(progress)}))


def _span(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}" if layers else "none"
