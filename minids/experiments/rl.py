"""R1 on several seeds: R1-Zero, the four stages, distillation; what notebooks 12 to 14 draw their curves from.

A seed is a file, written when its parts are finished; finished ones are kept and skipped. Processes may share the folder,
a seed each. Every figure comes from the commands that a user has (`rl`, `r1`, `distill`); pass@k is counted on top, of the
base and of the policy after RL, with the unbiased estimator of n answers of which c are right:

    pass@k = 1 - C(n - c, k) / C(n, k)                                                     [2107.03374, eq. 1]

``language`` is a question of its own, the paper's ablation [R1, supplement]: what the language reward does, from one base
and one cold start, in stage 2 with and without it, and in R1-Zero, which has no cold start, with and without it.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch

from minids import checkpoint
from minids.data.tokenizer import BytePairTokenizer
from minids.experiments.balance import rounded, write_atomic
from minids.rl import r1
from minids.rl.answers import ask
from minids.rl.grpo import GRPOConfig
from minids.rl.rewards import Total
from minids.rl.run import RLConfig, run_rl
from minids.rl.stages_run import DistillRunConfig, R1RunConfig, run_distill, run_r1
from minids.rl.tasks import Sums
from minids.rl.zero import Zero, ZeroConfig

PARTS = ("zero", "variants", "r1", "distill")
KEPT = ("step", "reward", "accuracy", "format", "length", "entropy", "no_variance", "grad_norm", "seconds",
        "held_out_accuracy", "held_out_format", "held_out_length", "held_out_entropy")  # fmt: skip
ANSWERS, PROBLEMS = 64, 64  # of pass@k
SHOWN = ("accuracy", "length", "chains", "mixed", "foreign")  # of the language reward's ablation
EARLY = 16  # steps after which its R1-Zero is looked at, beside the end
# One switch each, from the base that the seed's R1-Zero started from.
VARIANTS = {
    "token mean (DAPO)": {"objective": GRPOConfig(beta=0.0, length="token")},
    "Dr. GRPO": {"objective": GRPOConfig(beta=0.0, length="constant", length_scale=64, std=None)},
    "no std": {"objective": GRPOConfig(beta=0.0, std=None)},
    "KL 0.04": {"objective": GRPOConfig(beta=0.04)},
    "4 mini-batches": {"mini_batches": 4},
    "4 mini-batches, replay": {"mini_batches": 4, "routing_replay": True},
    "bias updated": {"gamma": 1e-3},
    "lr 3e-3": {"lr": 3e-3},
}


@dataclass
class RLExperimentConfig:
    """R1-Zero, R1 and distillation on several seeds."""

    out: Path = Path("runs/rl")
    """Folder for seedN.json and rl.json; those of the course are in figures/rl."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Which to run."""
    parts: tuple[str, ...] = PARTS
    """zero, variants, r1, distill; variants and distill need zero."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """R1-Zero's settings."""
    language: Path | None = None
    """A base's checkpoint folder (figures/rl/r1_base): only compare runs with and without the language reward from it, on
    these seeds, and write language.json."""
    combine_only: bool = False
    """Run nothing: read the seeds in the folder, print the table."""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts = {self.parts!r}: must be some of {', '.join(PARTS)}")
        if "zero" not in self.parts and {"variants", "distill"} & set(self.parts):
            raise ValueError(f"parts = {self.parts!r}: variants and distill need zero")


def pass_at(n: int, right: int, k: int) -> float:
    """The chance that k of n answers, of which ``right`` are right, hold a right one. Raises ValueError for k > n."""
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"n = {n}, right = {right}, k = {k}: must be 0 <= right <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def pass_curve(folder: Path, seed: int) -> dict[str, float]:
    """pass@k of a checkpoint on held-out problems, for k = 1, 4, 16, 64."""
    model, tokenizer = r1.restore(folder)
    random, task = Random(f"pass {seed}"), Sums()
    problems = [task.draw(random, held_out=True) for _ in range(PROBLEMS)]
    generator, right = torch.Generator().manual_seed(seed), []
    for start in range(0, PROBLEMS, 8):
        batch = ask(model, tokenizer, problems[start : start + 8], Total(task.rewards()), group=ANSWERS,
                    generator=generator)  # fmt: skip
        right += torch.tensor(batch.terms["accuracy"]).view(-1, ANSWERS).sum(1).int().tolist()
    return {str(k): sum(pass_at(ANSWERS, c, k) for c in right) / PROBLEMS for k in (1, 4, 16, 64)}


def run_zero(config: RLExperimentConfig, seed: int, folder: Path) -> dict:
    """R1-Zero from nothing; its records, CPU seconds in all, and pass@k before and after."""
    started = time.process_time()
    run_rl(RLConfig(seed=seed, out=folder, zero=config.zero, eval_every=10))
    seconds = time.process_time() - started
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [{name: record[name] for name in KEPT if name in record} for record in map(json.loads, lines)]
    last = folder / f"step-{config.zero.steps}"
    return {"records": records, "cpu_seconds": seconds,
            "pass": {"base": pass_curve(folder / "base", seed), "after RL": pass_curve(last, seed)}}  # fmt: skip


def run_variants(config: RLExperimentConfig, seed: int, base: Path, folder: Path) -> dict:
    """The same RL with one switch changed, from the same base."""
    found = {}
    for number, (name, changes) in enumerate(VARIANTS.items()):
        settings = RLConfig(seed=seed, out=folder / str(number), base=base, zero=replace(config.zero, **changes),
                            eval_every=10)  # fmt: skip
        run_rl(settings)
        lines = (settings.folder / "metrics.jsonl").read_text().splitlines()
        found[name] = [{key: record[key] for key in KEPT if key in record} for record in map(json.loads, lines)]
    return found


def run_seed(config: RLExperimentConfig, seed: int, folder: Path) -> dict:
    """All parts of one seed."""
    found: dict = {"seed": seed, "torch": torch.__version__.split("+")[0], "machine": platform.machine(),
                   "threads": torch.get_num_threads()}  # fmt: skip
    zero = folder / "zero"
    if "zero" in config.parts:
        found["zero"] = run_zero(config, seed, zero)
    if "r1" in config.parts:
        found["r1"] = run_r1(R1RunConfig(out=folder / "r1", seed=seed))
    if "distill" in config.parts:
        found["distill"] = run_distill(DistillRunConfig(out=folder / "distill", seed=seed, teacher=zero))
    if "variants" in config.parts:
        found["variants"] = run_variants(config, seed, zero / "base", folder / "variants")
    return found


def language_ablation(base: Path, seeds: tuple[int, ...], stages: r1.R1Config | None = None) -> dict:
    """Held-out figures of the base, of its cold start, and for each seed of what follows "with" and "without" the language
    reward: "stage 2" from the cold start; "R1-Zero" from the base, after EARLY steps and at the end."""
    stages = stages or r1.R1Config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = r1.store(checkpoint.load(base, dtype=torch.float32), BytePairTokenizer.load(base), folder / "base")
        cold = r1.cold_start(start, folder / "cold", stages)
        found: dict = {"base": figures(start), "cold": figures(cold), "stage 2": {}, "R1-Zero": {}}
        for arm, weight in (("without", 0.0), ("with", stages.language_weight)):
            task = replace(r1.REASONING, language_weight=weight)
            for kind, begin, settings, looks in (("stage 2", cold, stages.reasoning, {stages.reasoning.steps}),
                                                 ("R1-Zero", start, stages.zero, {EARLY, stages.zero.steps})):  # fmt: skip
                found[kind][arm] = [watched(begin, task, replace(settings, seed=seed), looks, folder / "policy")
                                    for seed in seeds]  # fmt: skip
    return found | {"seeds": list(seeds), "torch": torch.__version__.split("+")[0], "machine": platform.machine()}


def figures(stage: Path) -> dict[str, float]:
    """Those of the ablation, of a checkpoint."""
    found = r1.evaluate(stage)
    return {name: found[name] for name in SHOWN}


def watched(start: Path, task: Sums, settings: ZeroConfig, looks: set[int], folder: Path) -> dict[str, dict[str, float]]:
    """RL from a checkpoint; its figures after each number of steps in ``looks``, which ``folder`` holds meanwhile."""
    model, tokenizer = r1.restore(start)
    zero, found = Zero(model, tokenizer, task, settings), {}
    while zero.steps < settings.steps:
        zero.step()
        if zero.steps in looks:
            found[str(zero.steps)] = figures(r1.store(model, tokenizer, folder))
    return found


def run(config: RLExperimentConfig) -> dict:
    """The experiment, or what is left of it; returns what rl.json holds, or with ``language`` what language.json holds."""
    config.out.mkdir(parents=True, exist_ok=True)
    if config.language is not None:
        result = rounded(language_ablation(config.language, config.seeds), 4)
        write_atomic(config.out / "language.json", json.dumps(result) + "\n")
        print(json.dumps(result, indent=1))
        return result
    for seed in () if config.combine_only else config.seeds:
        path = config.out / f"seed{seed}.json"
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                write_atomic(path, json.dumps(rounded(run_seed(config, seed, Path(folder)), 4)) + "\n")
    paths = sorted(config.out.glob("seed*.json"))
    result = {"seeds": [json.loads(path.read_text(encoding="utf-8")) for path in paths]}
    write_atomic(config.out / "rl.json", json.dumps(result) + "\n")
    print(table(result))
    return result


def table(result: dict) -> str:
    """One line a seed: held-out accuracy before and after each thing that was run."""
    lines = [f"{'seed':<6}{'base':>7}{'R1-Zero':>9}{'CPU s':>7}{'R1':>7}{'mixed':>7}{'CPU s':>7}{'distilled':>11}{'RL':>7}"]
    for run in result["seeds"]:
        zero, stages, students = (run.get(part, {}) for part in ("zero", "r1", "distill"))
        cells = [None] * 8
        if zero:
            held = [record["held_out_accuracy"] for record in zero["records"] if "held_out_accuracy" in record]
            cells[:3] = held[0], held[-1], zero["cpu_seconds"]
        if stages:
            cost = sum(stage["cpu_seconds"] for name, stage in stages.items() if name != "zero")
            cells[3:6] = stages["r1"]["accuracy"], stages["r1"]["mixed"], cost
        if students:
            cells[6:] = students["distilled"]["accuracy"], students["rl"]["accuracy"]
        formats = ("7.3f", "9.3f", "7.0f", "7.3f", "7.3f", "7.0f", "11.3f", "7.3f")
        shown = [f"{'-':>{f.split('.')[0]}}" if cell is None else f"{cell:>{f}}"
                 for cell, f in zip(cells, formats, strict=True)]  # fmt: skip
        lines.append(f"{run['seed']:<6}" + "".join(shown))
    return "\n".join(lines)
