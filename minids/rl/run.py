"""`python -m minids rl`: a base model, questions with checkable answers, and reinforcement learning between them.

    runs/zero/
      run.json, tokenizer.json, latest, step-N/     as in pre-training: published format, resumes bit for bit
      base/                                         the base model, where this run made one
      metrics.jsonl                                 one object a step; every ``eval_every`` steps the held-out accuracy
      samples.txt                                   a few answers of each evaluation, to read how they change

Without ``--base`` a tiny policy (policy.py) is pre-trained on the task's corpus first, in about a minute.

Under torchrun all ranks share each step's questions (ranks.py); rank 0 writes, and its one checkpoint holds every rank's
generators, so that as many processes resume bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from minids import checkpoint
from minids.data.tokenizer import BytePairTokenizer
from minids.infer.run import find_tokenizer, resolve_checkpoint
from minids.model.transformer import Transformer
from minids.rl.answers import ask
from minids.rl.policy import new_policy, tiny_config
from minids.rl.ranks import Ranks
from minids.rl.rewards import Total
from minids.rl.sandbox import Sandbox
from minids.rl.supervised import SupervisedConfig, fit
from minids.rl.tasks import JsonLines, Programs, Sums, Task, character_tokenizer
from minids.rl.zero import Zero, ZeroConfig
from minids.train import state
from minids.train.interrupt import Interrupt
from minids.train.metrics import MetricsLog

TASKS = ("sums", "two-languages", "programs")
FREE = {"resume", "overwrite", "out", "name", "save_every", "keep"}
SHOWN = 4  # answers in samples.txt at each evaluation


@dataclass
class RLConfig:
    """Reinforcement learning from rewards that a program can check."""

    task: str = "sums"
    """sums, two-languages, programs, or the path of a .jsonl file of {"prompt": ..., "answer": ...}."""
    name: str = "zero"
    """Name of the run."""
    out: Path | None = None
    """Run folder; default runs/NAME."""
    base: Path | None = None
    """Checkpoint to start from; default: a tiny model, trained here on the task's corpus."""
    pretrain: SupervisedConfig = field(default_factory=lambda: SupervisedConfig(steps=1600))
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    levels: tuple[int, ...] = ()
    """Levels of the task (sums: how many operands); default the task's own."""
    hidden_size: int = 64
    """Width of the tiny model."""
    num_hidden_layers: int = 3
    """Its layers."""
    seed: int = 0
    """Of weights, corpus, questions and answers."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    eval_every: int = 20
    """Steps between evaluations on held-out problems; 0: only before and after."""
    eval_problems: int = 256
    """Held-out problems, one answer each."""
    save_every: int = 50
    """Steps between checkpoints; one is always made at the end."""
    keep: int = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Continue the run in the folder."""
    overwrite: bool = False
    """Delete the run in the folder first."""

    def __post_init__(self) -> None:
        for name, low in (("eval_every", 0), ("eval_problems", 1), ("save_every", 1), ("keep", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least {low}")
        if self.task not in TASKS and not self.task.endswith(".jsonl"):
            raise ValueError(f"task = {self.task!r}: must be {', '.join(TASKS)} or a file that ends in .jsonl")
        if self.base is None and self.task.endswith(".jsonl"):
            raise ValueError("task of a .jsonl file needs --base: there is no corpus to pre-train a tiny model on")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device = {self.device!r}: this machine has no CUDA device")
        self.pretrain = dataclasses.replace(self.pretrain, seed=self.seed)
        self.zero = dataclasses.replace(self.zero, seed=self.seed)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out) if self.out is not None else Path("runs") / self.name


def make_task(config: RLConfig, stack: ExitStack) -> Task:
    """The task of that name; a sandbox that it needs is closed with ``stack``."""
    levels = {"levels": config.levels} if config.levels else {}
    if config.task == "sums":
        return Sums(**levels)
    if config.task == "two-languages":
        return Sums(chinese=0.35, switch=0.25, **levels)
    if config.task == "programs":
        return Programs(stack.enter_context(Sandbox()), **levels)
    return JsonLines(Path(config.task))


def base_model(config: RLConfig, task: Task, ranks: Ranks) -> tuple[Transformer, BytePairTokenizer]:
    """The checkpoint given, or the run's own base, or a new one that is trained here and saved."""
    given = config.base if config.base is not None else config.folder / "base"
    if config.base is not None or checkpoint.is_checkpoint(given):
        folder = resolve_checkpoint(given)
        return checkpoint.load(folder, device=config.device), BytePairTokenizer.load(find_tokenizer(folder))
    tokenizer = character_tokenizer()
    cfg = tiny_config(tokenizer, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
                      intermediate_size=3 * config.hidden_size, moe_intermediate_size=config.hidden_size // 2)  # fmt: skip
    model = new_policy(cfg, config.seed).to(config.device)
    with tqdm(total=config.pretrain.steps, desc="base", unit="step", disable=quiet(ranks)) as bar:
        fit(model, tokenizer, task.document, config.pretrain, lambda step, loss: bar.update())
    if ranks.rank == 0:
        checkpoint.save(model, given)
        tokenizer.save(given / "tokenizer.json")
    return model, tokenizer


def clear(out: Path) -> None:
    """Deletes what an older run left beside its checkpoints: its base model would pass for this one's."""
    (out / "samples.txt").unlink(missing_ok=True)
    if checkpoint.is_checkpoint(out / "base"):
        shutil.rmtree(out / "base")


def quiet(ranks: Ranks) -> bool:
    """No progress bar under CI, and on one rank only."""
    return bool(os.environ.get("CI")) or ranks.rank > 0


class Run:
    """One run folder and what happens in it."""

    def __init__(self, config: RLConfig, task: Task, ranks: Ranks):
        self.config, self.task, self.ranks = config, task, ranks
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        out = config.folder
        if ranks.rank == 0:
            found = state.check_folder(out, settings, config.resume, config.overwrite, FREE)
            state.open_folder(out, settings, config.resume)
            if not config.resume:
                clear(out)
        ranks.barrier()  # only now the folder is what all ranks may look at
        if ranks.rank > 0:
            found = state.latest_checkpoint(out) if config.resume else None
        model, tokenizer = base_model(config, task, ranks)
        ranks.copy_first(list(model.state_dict().values()))
        values: dict = {}
        if found is not None:
            model = checkpoint.load(found, device=config.device)
            tensors, values = state.load_checkpoint(found)
        self.zero = Zero(model, tokenizer, task, config.zero, ranks=ranks)
        if found is not None:
            self.zero.load_state(tensors, values["zero"])
        elif ranks.rank == 0:
            tokenizer.save(out / "tokenizer.json")
        self.seconds: float = values.get("seconds", 0.0)
        self.log = MetricsLog(out / "metrics.jsonl", values.get("metrics_bytes", 0)) if ranks.rank == 0 else None
        self.held_out = self._held_out()

    def _held_out(self) -> list:
        random = Random(f"held out {self.config.seed}")
        return [self.task.draw(random, held_out=True) for _ in range(self.config.eval_problems)]

    def evaluate(self) -> dict:
        """Held-out figures of the policy as it is, sampled at temperature 1; a few answers go to samples.txt."""
        zero, limit = self.zero, self.config.zero.max_new_tokens
        batch = ask(zero.model, zero.tokenizer, self.held_out, Total(self.task.rewards()), max_new_tokens=limit,
                    generator=torch.Generator().manual_seed(self.config.seed), prefix=zero.prefix)  # fmt: skip
        lines = [f"{problem.prompt} {text}   (right: {problem.answer})"
                 for problem, text in zip(batch.problems[:SHOWN], batch.texts[:SHOWN], strict=True)]
        with open(self.config.folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"--- step {zero.steps} ---\n" + "\n".join(lines) + "\n")
        found = batch.summary(limit)
        return {f"held_out_{name}": found[name] for name in ("accuracy", "format", "length", "entropy")}

    def step(self) -> dict:
        """One step, and an evaluation when one is due."""
        started = time.perf_counter()
        record = self.zero.step()
        self.seconds += time.perf_counter() - started
        record["seconds"] = self.seconds
        if torch.device(self.config.device).type == "cuda":
            record["memory_bytes"] = torch.cuda.max_memory_allocated()
        every, last = self.config.eval_every, self.zero.steps == self.config.zero.steps
        if self.ranks.rank == 0 and (last or (every and self.zero.steps % every == 0)):
            record |= self.evaluate()
        return record

    def save(self) -> Path | None:
        """A checkpoint of the present step, written by rank 0 for all; every rank must call it."""
        tensors, values = self.zero.state()
        if self.ranks.rank > 0:
            return None

        def write_model(folder: Path) -> None:
            checkpoint.save(self.zero.model, folder)
            self.zero.tokenizer.save(folder / "tokenizer.json")

        values = {"zero": values, "metrics_bytes": self.log.sync(), "seconds": self.seconds}
        return state.save_checkpoint(self.config.folder, self.zero.steps, write_model, tensors, values, self.config.keep)

    def run(self) -> dict:
        """All steps that are left; returns the last record. Raises SystemExit(128 + signal) after a save."""
        config, zero, record = self.config, self.zero, {}
        if self.ranks.rank == 0 and zero.steps == 0:
            self.log.write({"step": 0, **self.evaluate()})
        bar = tqdm(total=config.zero.steps, initial=zero.steps, desc="rl", unit="step", disable=quiet(self.ranks))
        with Interrupt() as interrupt, bar:
            while zero.steps < config.zero.steps:
                record = self.step()
                bar.update()
                bar.set_postfix_str(f"reward {record['reward']:.2f}, accuracy {record['accuracy']:.2f}, "
                                    f"length {record['length']:.0f}", refresh=False)  # fmt: skip
                if self.ranks.rank == 0:
                    self.log.write(record)
                stop = self.ranks.any(bool(interrupt.received))
                if stop or zero.steps == config.zero.steps or zero.steps % config.save_every == 0:
                    folder = self.save()
                if stop:
                    bar.close()
                    if self.ranks.rank == 0:
                        print(f"stopped after step {zero.steps} of {config.zero.steps}, saved as {folder}; continue with "
                              "the same command and --resume")  # fmt: skip
                    raise SystemExit(128 + (interrupt.received or signal.SIGTERM))
        return record


def run_rl(config: RLConfig) -> dict:
    """The whole command; returns the last step's record. Raises ValueError, FileExistsError or FileNotFoundError before any
    work for settings that cannot work."""
    ranks = Ranks.start(config.device)
    try:
        with ExitStack() as stack:
            task = make_task(config, stack)
            run = Run(config, task, ranks)
            record = run.run()
    finally:
        ranks.stop()
    if ranks.rank == 0:
        shown = {name: value for name, value in record.items() if name.startswith("held_out") and math.isfinite(value)}
        print(json.dumps(shown | {"seconds of RL": round(run.seconds, 1), "out": str(config.folder)}, indent=1))
        first = run.held_out[0].prompt
        print(f"answers     {config.folder / 'samples.txt'}: held-out problems, from before the first step to the last\n"
              f"ask it      python -m minids generate --checkpoint {config.folder} --prompt {shlex.quote(first)}")
    return record
