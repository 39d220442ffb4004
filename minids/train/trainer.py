"""The pre-training loop: from tokens to a trained model in a run folder.

One step, for a global batch of b(t) sequences at t tokens seen:

    loss = LM loss + lambda(t) * MTP loss + balance losses                     summed over micro-batches
    weights: AdamW at lr(t), gradients clipped to norm 1                       minids.train.optim
    bias:    b_i += gamma(t) * sign(mean load - load_i)                        load of the whole global batch

The loop owns no schedule and no data order: both are pure functions, of the tokens seen and of the position in the
data. So the state of a run is the weights, the optimizer, three counters and the generators; a checkpoint holds all
of it, and a resumed run repeats the uninterrupted one bit for bit (same machine, same number of threads).

A step whose loss or gradient is not finite is skipped: weights, moments and bias keep every bit, its tokens count as
seen, and after `max_skips` in a row the run stops.

Simplifications: one process, one device. Data-parallel ranks would sum `loads` and gradients at one place each, in
`minids.train.step`.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), sections 2.1.2, 2.2 and 4.2.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minids import checkpoint
from minids.data import Data, build_data
from minids.fp8 import to_fp8
from minids.model.balancer import Balancer
from minids.model.load import LoadMeter
from minids.model.transformer import Transformer
from minids.plots import loss_curve
from minids.train import state
from minids.train.graph import Recorder
from minids.train.interrupt import Interrupt
from minids.train.metrics import MetricsLog, peak_flops, read_metrics
from minids.train.optim import Optimizer
from minids.train.settings import FREE_ON_RESUME, TrainConfig
from minids.train.step import StepResult, compute_gradients, validation_loss

__all__ = ["TrainConfig", "Trainer", "TrainingStopped", "train"]
# Beginnings that lie in the middle of a file: a small model has seen few beginnings of files.
PROMPTS = (
    'import os\nimport sys\n\n\ndef read_file(path):\n    """',
    "    def __init__(self, name, value=None):\n        self.name = name\n",
    "        if not isinstance(value, str):\n            raise",
)
DTYPES = {"fp32": torch.float32, "bf16-autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStopped(RuntimeError):
    """Too many steps in a row were not finite."""


@dataclass
class Progress:
    """The counters of a run; all of them go into a checkpoint."""

    step: int = 0
    tokens: int = 0
    position: int = 0  # rows of training data consumed
    skipped: int = 0
    skips_in_row: int = 0
    seconds: float = 0.0  # spent in steps; a measurement, nothing depends on it
    loss: float = math.nan
    valid_loss: float = math.nan


@dataclass
class Trainer:
    """Everything of a run that changes; build it with `Trainer.start`."""

    config: TrainConfig
    data: Data
    model: Transformer
    balancer: Balancer
    optimizer: Optimizer
    log: MetricsLog
    progress: Progress = field(default_factory=Progress)
    valid_meter: LoadMeter | None = None  # of the last evaluation
    recorder: Recorder | None = None  # of micro-batches, with --cuda-graph

    def __post_init__(self) -> None:
        self.recorder = Recorder() if self.config.cuda_graph else None

    @classmethod
    def start(cls, config: TrainConfig) -> Trainer:
        """Read the data, build or load the model, open the run folder: in this order, so that settings which cannot
        work leave no trace."""
        out, settings = config.folder, config.to_dict()
        found = state.check_folder(out, settings, config.resume, config.overwrite, FREE_ON_RESUME)
        data = build_data(config.data, config.recipe.sequence_length, progress=not os.environ.get("CI"))
        random.seed(config.seed)
        np.random.seed(config.seed)  # noqa: NPY002 - for the code of others; ours has its own generators
        torch.manual_seed(config.seed)
        if found is not None:
            return cls._continue(config, data, found)
        model = in_fp8(new_model(config, data), config)
        balancer = Balancer.install(model, config.balance)
        optimizer = Optimizer(model, config.optim, model.cfg.num_hidden_layers)
        state.open_folder(out, settings, config.resume)
        data.tokenizer.save(out / "tokenizer.json")
        return cls(config, data, model, balancer, optimizer, MetricsLog(out / "metrics.jsonl"))

    @classmethod
    def _continue(cls, config: TrainConfig, data: Data, found: Path) -> Trainer:
        tensors, values = state.load_checkpoint(found)
        if values["data"] != fingerprint(data):
            raise ValueError(f"--resume: the training tokens are not those of the run in {config.folder} (the corpus or "
                             f"the tokenizer has changed): {values['data']} then, {fingerprint(data)} now")
        model = checkpoint.load(found, dtype=DTYPES[config.resolved_precision], device=config.device)
        model = in_fp8(model, config)
        balancer = Balancer.install(model, config.balance)
        balancer.load_state({k.removeprefix("balance/"): v for k, v in tensors.items() if k.startswith("balance/")})
        optimizer = Optimizer(model, config.optim, model.cfg.num_hidden_layers)
        moments = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
        optimizer.load_state(moments, values["optimizer"])
        if values["threads"] != torch.get_num_threads():
            print(f"note: the run used {values['threads']} threads, this process {torch.get_num_threads()}; sums may "
                  "differ in their last bits, so the continuation is exact only with the same number")
        state.open_folder(config.folder, config.to_dict(), resume=True)
        log = MetricsLog(config.folder / "metrics.jsonl", values["metrics_bytes"])
        state.set_rng_state(tensors, values["rng"])
        return cls(config, data, model, balancer, optimizer, log, Progress(**values["progress"]))

    def save(self) -> Path:
        """Write the checkpoint of the current step; returns its folder."""
        tensors, values = self.optimizer.state()
        rng_tensors, rng_values = state.rng_state()
        tensors = {f"optimizer/{k}": v for k, v in tensors.items()} | rng_tensors
        tensors |= {f"balance/{k}": v for k, v in self.balancer.state().items()}
        progress = asdict(self.progress)
        values = {"progress": progress, "optimizer": values, "rng": rng_values, "metrics_bytes": self.log.sync(),
                  "data": fingerprint(self.data), "threads": torch.get_num_threads(), "torch": torch.__version__}

        def write_model(folder: Path) -> None:
            checkpoint.save(self.model, folder)
            self.data.tokenizer.save(folder / "tokenizer.json")

        return state.save_checkpoint(self.config.folder, self.progress.step, write_model, tensors, values,
                                     self.config.keep)

    def step(self) -> dict:
        """One optimizer step; returns its metrics record."""
        config, progress = self.config, self.progress
        recipe = config.recipe.build()
        started = time.perf_counter()
        rows = recipe.next_batch(progress.tokens)
        after = progress.tokens + rows * recipe.sequence_length
        rates = {"lr": recipe.lr(after), "batch": rows, "gamma": recipe.gamma(progress.tokens),
                 "lambda": recipe.mtp_lambda(progress.tokens)}
        tokens, document_ids = self.data.train.batch(progress.position, rows)
        result = compute_gradients(self.model, self.optimizer, tokens, document_ids, rates["lambda"], config,
                                   self.balancer, self.recorder)
        moved = self.optimizer.step(rates["lr"], apply=math.isfinite(result.total))
        if moved:
            self.balancer.update(result.loads, rates["gamma"])
        progress.step, progress.tokens, progress.position = progress.step + 1, after, progress.position + rows
        progress.skipped += not moved
        progress.skips_in_row = 0 if moved else progress.skips_in_row + 1
        progress.loss = result.loss
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        return self._record(result, rates, moved, rows * recipe.sequence_length / seconds)

    def _record(self, result: StepResult, rates: dict, moved: bool, speed: float) -> dict:
        biases = [gate.e_score_correction_bias for gate in self.model.routers()]
        record = {"step": self.progress.step, "tokens": self.progress.tokens, "loss": result.loss,
                  "mtp_loss": result.mtp_losses, "balance_loss": result.balance_loss,
                  "grad_norm": self.optimizer.grad_norm, **rates}
        if len(result.loads):
            found = result.meter.read()
            violation = found["max_violation_global"]  # of the whole batch, all micro-batches together
            record |= {"maxvio_mean": sum(violation) / len(violation), "maxvio_max": max(violation)}
            for name in ("token_entropy", "load_entropy", "dropped_share", "experts_per_token", "nodes_per_token"):
                record[name] = sum(found[name]) / len(found[name])  # a mean over layers
        spreads = [float(b.max() - b.min()) for b in biases if b is not None]
        if spreads:
            record["bias_spread"] = max(spreads)
        if self.optimizer.scaler.enabled:
            record["loss_scale"] = self.optimizer.scale
        record |= {"skipped": self.progress.skipped, "applied": moved, "tokens_per_second": speed}
        device = torch.device(self.config.device)
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), self.config.resolved_precision != "fp32")
            if peak:
                length = self.config.recipe.sequence_length
                record["mfu"] = speed * self.model.cfg.flops_per_token(length) / peak
        return record

    def evaluate(self) -> float:
        """Validation loss (nats a token) on the first `eval_rows` rows of the validation data."""
        self.valid_meter = LoadMeter(self.model.cfg)
        self.progress.valid_loss = validation_loss(self.model, self.data.valid, self.config, self.valid_meter)
        return self.progress.valid_loss

    def _valid_balance(self) -> dict:
        """Load of every expert over the validation rows, MaxVio (of all rows, and of a pass), and the bias: lists, a row or
        value for each MoE layer; the bias of MTP modules too."""
        found = self.valid_meter.read()
        kept = {f"valid_{name}": found[name] for name in ("load", "max_violation_global", "max_violation_batch") if found}
        biases = [gate.e_score_correction_bias for gate in self.model.routers()]
        return kept | {"bias": [bias.tolist() for bias in biases if bias is not None]}

    def plot(self) -> None:
        """Draw loss.png from what metrics.jsonl holds."""
        out = self.config.folder
        temporary = out / "loss.png.tmp"
        loss_curve(read_metrics(out), title=self.config.name).savefig(temporary, format="png")
        os.replace(temporary, out / "loss.png")

    def run(self) -> None:
        """Train to the end of the budget. Raises SystemExit(128 + signal) after a save, or TrainingStopped."""
        config, progress, recipe = self.config, self.progress, self.config.recipe.build()
        last = sum(1 for _ in recipe.batches())
        bar = tqdm(total=last, initial=progress.step, unit="step", disable=bool(os.environ.get("CI")))
        with Interrupt() as interrupt, bar:
            while recipe.next_batch(progress.tokens):
                record = self.step()
                final = not recipe.next_batch(progress.tokens)
                if config.eval_every and (progress.step % config.eval_every == 0 or final):
                    record["valid_loss"] = self.evaluate()
                    record |= self._valid_balance()
                self.log.write(record)
                bar.update()
                valid = "" if math.isnan(progress.valid_loss) else f", valid {progress.valid_loss:.3f}"
                bar.set_postfix_str(f"loss {progress.loss:.3f}{valid}, {record['tokens_per_second']:.0f} tok/s",
                                    refresh=False)
                if progress.skips_in_row >= config.max_skips:
                    raise TrainingStopped(self._stopped())
                if interrupt.received or final or progress.step % config.save_every == 0:
                    folder = self.save()
                    self.plot()
                if interrupt.received:
                    bar.close()
                    print(f"stopped after step {progress.step} of {last}, saved as {folder}; continue with the same "
                          "command and --resume")
                    raise SystemExit(128 + interrupt.received)

    def _stopped(self) -> str:
        p = self.progress
        return (f"{p.skips_in_row} steps in a row (up to step {p.step}) had a loss or gradient that is not finite "
                f"(loss {p.loss}, gradient norm {self.optimizer.grad_norm}); the weights are those of step "
                f"{p.step - p.skips_in_row}. Lower --recipe.lr, change --precision, or look at the data from row "
                f"{p.position}; the last checkpoint is {state.latest_checkpoint(self.config.folder)}")


def in_fp8(model: Transformer, config: TrainConfig) -> Transformer:
    """The model, its linears in FP8 where the settings say so."""
    return model if config.fp8 == "none" else to_fp8(model, config.fp8)


def new_model(config: TrainConfig, data: Data) -> Transformer:
    """A model with random weights, of the config's precision and on its device, for the data's vocabulary."""
    tokenizer = data.tokenizer
    model_config = config.model_config(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.resolved_precision])
    try:
        with torch.device(config.device):
            return Transformer(model_config)
    finally:
        torch.set_default_dtype(before)


def fingerprint(data: Data) -> dict:
    """What tells one stream of training tokens from another: its length, its order's seed and a hash."""
    tokens = data.train.tokens
    return {"tokens": len(tokens), "seed": data.train.seed,
            "blake2b": hashlib.blake2b(np.ascontiguousarray(tokens).data, digest_size=16).hexdigest()}


def write_sample(trainer: Trainer) -> str:
    """Continue the configured prompts, write them to sample.txt; returns the text."""
    # infer stands to the right of train: imported here, when the training is over, and nowhere else.
    from minids.infer import generate

    config, tokenizer = trainer.config, trainer.data.tokenizer
    beginnings = config.prompts or PROMPTS
    # No bos: a row of training starts anywhere in the stream, and so may a prompt.
    prompts = [tokenizer.encode(p) for p in beginnings]
    trainer.model.eval()
    outputs = generate(trainer.model, prompts, max_new_tokens=config.sample_tokens, temperature=0.6, top_p=0.95,
                       seed=config.seed, eos_token_id=tokenizer.eos_id)
    texts = [p + tokenizer.decode(o) for p, o in zip(beginnings, outputs, strict=True)]
    text = ("\n" + "-" * 60 + "\n").join(texts) + "\n"
    state.write_atomic(config.folder / "sample.txt", text)
    return text


def train(config: TrainConfig) -> dict:
    """Run `config` from start (or its last checkpoint) to end; returns a summary of figures and paths.

    Errors: ValueError, FileExistsError or FileNotFoundError for settings that cannot work, before any training;
    TrainingStopped for too many skipped steps; SystemExit(130 or 143) after SIGINT or SIGTERM, saved.
    """
    if config.pipeline is not None and config.expert_parallel is None:
        from minids.pipeline.train import train_pipeline  # one process of many; it uses this module

        return train_pipeline(config)
    if config.expert_parallel is not None:
        from minids.parallel.train import train_expert_parallel  # likewise

        return train_expert_parallel(config)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ValueError(f"WORLD_SIZE = {processes}: so many processes would each train this model into {config.folder}; "
                         "give --pipeline NAME or --expert-parallel EP, or start one process")
    trainer = Trainer.start(config)
    out, progress = config.folder, trainer.progress
    counts = trainer.model.cfg.count()
    print(f"{config.name}: {counts['main'] + counts['mtp']:,} parameters, {counts['activated']:,} activated a token; "
          f"{config.recipe.tokens:,} tokens to train on; from step {progress.step}; writing to {out}")
    try:
        trainer.run()
    finally:
        trainer.log.close()
    if not (out / "loss.png").exists():
        trainer.plot()
    sample = write_sample(trainer) if config.sample_tokens else ""
    folder = state.latest_checkpoint(out)
    summary = {"out": str(out), "checkpoint": str(folder), **asdict(progress),
               "tokens_per_second": progress.tokens / progress.seconds, "sample": sample}
    if sample:
        print(f"\n{sample}")
    valid = "" if math.isnan(progress.valid_loss) else f", validation {progress.valid_loss:.4f}"
    print(f"loss {progress.loss:.4f}{valid} after {progress.step} steps, "
          f"{progress.tokens:,} tokens, {progress.seconds:.0f} s of training, {progress.skipped} steps skipped\n"
          f"checkpoint  {folder}\nmetrics     {out / 'metrics.jsonl'}\nloss curve  {out / 'loss.png'}"
          + (f"\nsample      {out / 'sample.txt'}" if sample else "")
          + f"\nwrite more  python -m minids generate --checkpoint {out} --prompt \"def \"")
    return json.loads(json.dumps(summary))
