"""`python -m minids r1` and `python -m minids distill`: the stages one after the other, each a checkpoint folder.

    runs/r1/
      base, zero, cold, reasoner, sft, r1           checkpoints in the published format, one a stage (zero: R1-Zero)
      log.jsonl                                     one object a step, with its stage
      stages.json                                   of every finished stage: CPU seconds and held-out figures

A finished stage is not run again: the same command after an interruption goes on with the next one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from minids.rl import distill as distillation
from minids.rl import r1
from minids.train.state import write_atomic

COLUMNS = {  # of the tables, and what they mean
    "accuracy": "share of right answers to held-out sums", "length": "tokens of an answer",
    "mixed": "share of chains in more than one language", "foreign": "share of chains with Chinese in them",
    "helpful": "answers to questions in words: 1 kind, 0.5 right, 0 not what was asked; their mean",
    "harmless": "share of those without a rude word",
    "format": "share of answers in the form that is asked for", "entropy": "nats a token",
}  # fmt: skip
Stage = tuple[str, Callable[[Path, r1.Note], Path], int]  # name, what makes its checkpoint, steps that it will note


@dataclass
class _Folder:
    out: Path | None = None
    """Run folder; default runs/ and the command's name."""
    seed: int = 0
    """Of all stages."""
    overwrite: bool = False
    """Run finished stages again."""
    problems: int = 256
    """Held-out problems in each stage's evaluation."""

    def __post_init__(self) -> None:
        for name, low in (("seed", 0), ("problems", 2)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least {low}")


@dataclass
class R1RunConfig(_Folder):
    """The four stages of R1, and R1-Zero beside them."""

    stages: r1.R1Config = field(default_factory=r1.R1Config)
    zero: bool = True
    """Also run R1-Zero on the same base, for comparison."""


@dataclass
class DistillRunConfig(_Folder):
    """A small model learns from a reasoner."""

    teacher: Path | None = None
    """The reasoner's checkpoint folder; default runs/zero's latest."""
    stages: distillation.DistillConfig = field(default_factory=distillation.DistillConfig)


def run_r1(config: R1RunConfig) -> dict:
    """Runs what is missing; returns the figures of every stage."""
    out, stages = config.out or Path("runs/r1"), config.stages.seeded(config.seed)
    base = out / "base"
    todo: list[Stage] = [("base", lambda to, note: r1.make_base(to, stages, config.seed, note), stages.base.steps)]
    if config.zero:
        todo.append(("zero", lambda to, note: r1.zero_rl(base, to, stages, note), stages.zero.steps))
    todo += [
        ("cold", lambda to, note: r1.cold_start(base, to, stages, note), stages.cold.steps),
        ("reasoner", lambda to, note: r1.reasoning_rl(out / "cold", to, stages, note), stages.reasoning.steps),
        ("sft", lambda to, note: r1.rejection_sft(base, out / "reasoner", to, stages, note), stages.rejection.steps),
        ("r1", lambda to, note: r1.everything_rl(out / "sft", base, to, stages, note), stages.everything.steps),
    ]
    return run_stages(out, config, todo, ("accuracy", "length", "mixed", "foreign", "helpful", "harmless"))


def run_distill(config: DistillRunConfig) -> dict:
    """Runs what is missing; returns the figures of every stage."""
    from minids.infer.run import resolve_checkpoint

    out, stages = config.out or Path("runs/distill"), config.stages.seeded(config.seed)
    teacher = resolve_checkpoint(config.teacher or Path("runs/zero"))
    base = out / "base"
    todo: list[Stage] = [
        ("teacher", lambda to, note: teacher, 0),
        ("base", lambda to, note: distillation.student_base(to, stages, config.seed, note), stages.base.steps),
        ("distilled", lambda to, note: distillation.distill(teacher, base, to, stages, note), stages.sft.steps),
        ("rl", lambda to, note: distillation.student_rl(base, to, stages, note), stages.rl.steps),
    ]
    return run_stages(out, config, todo, ("accuracy", "format", "length", "entropy"))


def run_stages(out: Path, config: _Folder, todo: list[Stage], columns: tuple[str, ...]) -> dict:
    """Runs the stages that have no figures yet, prints a table, returns {stage: figures}.

    Raises FileExistsError for a folder whose stages were made with other settings.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    settings = {key: value for key, value in settings.items() if key not in ("out", "overwrite")}
    found = open_stages(out, settings, config.overwrite)
    print(f"{'stage':<10}{'CPU s':>8}" + "".join(f"{column:>10}" for column in columns))
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        for name, make, steps in todo:
            if name not in found["stages"]:
                found["stages"][name] = run_stage(out / name, name, make, steps, log, config)
                write_atomic(out / "stages.json", json.dumps(found, indent=1) + "\n")
            figures = found["stages"][name]
            shown = "".join(f"{figures[column]:>10.3f}" for column in columns)
            print(f"{name:<10}{figures['cpu_seconds']:>8.1f}{shown}", flush=True)
    print("\n" + "\n".join(f"{column:<10}{COLUMNS[column]}" for column in columns))
    print(f"{'ask it':<10}python -m minids generate --checkpoint {out / todo[-1][0]} --prompt 7+1+6+2+6:")
    return found["stages"]


def open_stages(out: Path, settings: dict, overwrite: bool) -> dict:
    """What stages.json holds, or a new one; with ``overwrite`` always a new one."""
    path = out / "stages.json"
    if path.exists() and not overwrite:
        found = json.loads(path.read_text())
        if found["settings"] != settings:
            different = sorted(k for k in settings.keys() | found["settings"].keys()
                               if settings.get(k) != found["settings"].get(k))  # fmt: skip
            raise FileExistsError(f"{out} holds stages made with other settings ({', '.join(different)}): give another "
                                  "--out, or --overwrite to make them anew")  # fmt: skip
        return found
    if out.exists() and any(out.iterdir()) and not path.exists():
        raise FileExistsError(f"{out} is not empty and holds no stages.json; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.jsonl").unlink(missing_ok=True)
    found = {"settings": settings, "stages": {}}
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    return found


def run_stage(folder: Path, name: str, make: Callable, steps: int, log, config: _Folder) -> dict:
    """One stage with its bar and its log; returns its CPU seconds and held-out figures."""
    started = time.process_time()
    with tqdm(total=steps, desc=name, unit="step", leave=False, disable=bool(os.environ.get("CI")) or not steps) as bar:

        def note(record: dict) -> None:
            log.write(json.dumps({"stage": name, **record}) + "\n")
            bar.update("step" in record)

        if folder.exists():  # a stage that was cut off
            shutil.rmtree(folder)
        checkpoint = make(folder, note)
    seconds = time.process_time() - started
    log.flush()
    return {"cpu_seconds": seconds, **r1.evaluate(checkpoint, config.seed, config.problems)}
