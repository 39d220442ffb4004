"""Distillation against RL on the student itself, at counted compute; what notebook 14 draws its curves from.

One teacher, a student's base of its own for each seed, and from each base:

    distilled   SFT on ``samples`` right answers of the teacher
    rl          RL on the base, longer than ``python -m minids distill`` has it, watched on the way
    slow        the same at a lower rate, for fairness: the usual one was chosen for the larger model
    after       RL on the distilled student, at the lower rate

and, for some of the seeds, SFT on other data:

    n           fewer samples, as many steps
    all, hot, hot all    answers that nobody checked; a teacher at a high temperature, checked and not
    bare, coarse    the same questions and right answers without a chain; with chains of three operands a step
    scratch     the same SFT on a student that has read nothing before

Work is counted in FLOPs on the tokens that are there (no padding, no rows that have ended): a forward pass is a third of
``ModelConfig.flops_per_token`` for each token, a training step three of them, an answer one. CPU seconds stand beside.

A seed is a file, written when its arms are finished; finished ones are kept and skipped.

Shapes: B documents, T tokens.
"""

from __future__ import annotations

import copy
import json
import platform
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch

from minids import checkpoint
from minids.config import ModelConfig
from minids.data.tokenizer import BytePairTokenizer
from minids.experiments.balance import rounded, write_atomic
from minids.model.loss import IGNORE
from minids.model.transformer import Transformer
from minids.rl.answers import Batch, ask
from minids.rl.distill import CORPUS, STUDENT, DistillConfig, passes, student_base, teacher_samples
from minids.rl.policy import new_policy, tiny_config
from minids.rl.r1 import restore, store
from minids.rl.rewards import Accuracy, Format, Total
from minids.rl.supervised import SupervisedConfig, batches, fit
from minids.rl.tasks import Problem, solution
from minids.rl.zero import Zero, ZeroConfig

Samples = list[tuple[str, str]]
EXAM = 256  # held-out problems


@dataclass
class DistillExperimentConfig:
    """Distillation against RL on the student, several seeds."""

    out: Path = Path("runs/distill_seeds")
    """Folder for distillN.json; those of the course are in figures/rl."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the students' bases, the samples and their order."""
    teacher: Path = Path("figures/rl/teacher")
    """The reasoner's checkpoint folder."""
    stages: DistillConfig = field(default_factory=lambda: DistillConfig(rl=ZeroConfig(steps=240)))
    """Settings of a student; ``rl.steps`` is how long RL may try."""
    data_seeds: tuple[int, ...] = (0, 1, 2)
    """Those that also learn from other data."""
    slow: float = 2e-4
    """The lower rate of RL."""
    after_steps: int = 60
    """RL steps on the distilled student."""
    fewer: tuple[int, ...] = (20, 80, 320, 1280)
    """Numbers of samples beside ``stages.samples``."""
    hot: float = 1.8
    """The high temperature."""
    eval_every: int = 20
    """Steps between two exams."""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds = {self.seeds!r}: must be one or more numbers from 0")
        if any(not 1 <= n < self.stages.samples for n in self.fewer):
            raise ValueError(f"fewer = {self.fewer!r}: must be from 1 to below stages.samples, {self.stages.samples}")
        for name in ("after_steps", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least 1")


# ---- counting ---------------------------------------------------------------------------------------------------------


def forward_flops(cfg: ModelConfig, lengths: Iterable[int]) -> float:
    """FLOPs of one forward pass over documents of these lengths (tokens); written with a cache they cost the same."""
    return sum(length * cfg.flops_per_token(length) / 3 for length in lengths)


def sft_flops(cfg: ModelConfig, tokenizer: BytePairTokenizer, samples: Samples, config: SupervisedConfig) -> list[float]:
    """FLOPs after each step of ``fit`` on these samples: its batches once more, counted."""
    stream, found = batches(passes(samples), tokenizer, config.tokens, Random(config.seed)), [0.0]
    for _ in range(config.steps):
        _, labels_BT = next(stream)
        ends_B = (torch.arange(1, labels_BT.shape[1] + 1) * (labels_BT != IGNORE)).amax(1)
        found.append(found[-1] + 3 * forward_flops(cfg, ends_B.tolist()))
    return found[1:]


def answer_flops(cfg: ModelConfig, tokenizer: BytePairTokenizer, samples: Samples) -> float:
    """FLOPs of writing these answers; the last token, the end, is drawn and never read."""
    return forward_flops(cfg, [1 + len(tokenizer.encode(p)) + len(tokenizer.encode(text)) for p, text in samples])


class Counted(Zero):
    """RL that counts: each answer is written once (one pass) and learned from once (three)."""

    flops = 0.0

    def answer(self, problems: list[Problem]) -> Batch:
        batch = super().answer(problems)
        found = batch.rollout
        ends_B = (torch.arange(1, found.mask_BT.shape[1] + 1) * found.mask_BT).amax(1)
        self.flops += 4 * forward_flops(self.model.cfg, ends_B.tolist())
        return batch


# ---- samples ----------------------------------------------------------------------------------------------------------


def is_good(prompt: str, text: str) -> bool:
    """The rule of rejection sampling: right, and in R1's form."""
    problem = CORPUS.problem([int(number) for number in prompt[:-1].split("+")])
    return Accuracy()(problem, text) == Format()(problem, text) == 1.0


def reworked(samples: Samples, operands: int) -> Samples:
    """The same questions and answers, with a chain of ``operands`` numbers a step, or none with 0."""
    found, random = [], Random(0)
    for prompt, _ in samples:
        numbers = [int(number) for number in prompt[:-1].split("+")]
        chain = CORPUS.chain(numbers, operands, random) if operands else ""
        found.append((prompt, solution(chain, str(sum(numbers)))))
    return found


def sampled(teacher: Path, n: int, seed: int, temperature: float = 1.0) -> tuple[Samples, Samples, float]:
    """(the first ``n`` good answers of the teacher, all answers it gave until then, CPU seconds of giving them)."""
    started = time.process_time()
    good, asked = teacher_samples(teacher, n, seed, temperature)
    seconds = time.process_time() - started
    return good, teacher_samples(teacher, asked, seed, temperature, rejection=False)[0], seconds


# ---- one seed ---------------------------------------------------------------------------------------------------------


def exam(model: Transformer, tokenizer: BytePairTokenizer) -> dict[str, float]:
    """Accuracy, form, length (tokens) and entropy (nats a token) on held-out problems, the same each time."""
    random = Random("exam")
    held = [CORPUS.draw(random, held_out=True) for _ in range(EXAM)]
    found = ask(model, tokenizer, held, Total(CORPUS.rewards()), generator=torch.Generator().manual_seed(0)).summary(64)
    return {name: found[name] for name in ("accuracy", "format", "length", "entropy")}


def taught(model: Transformer, tokenizer: BytePairTokenizer, samples: Samples, config: SupervisedConfig,
           every: int = 0, before: float = 0.0) -> tuple[Transformer, dict]:  # fmt: skip
    """(a copy of the model after SFT on the samples, its figures). ``every``: steps between exams, 0 for one at the end;
    ``before``: FLOPs that were spent on the samples."""
    student, curve = copy.deepcopy(model), []
    work, started, examined = sft_flops(model.cfg, tokenizer, samples, config), time.process_time(), 0.0

    def look(step: int, _loss: float) -> None:
        nonlocal examined
        if every and (step + 1) % every == 0:
            begun = time.process_time()
            curve.append([step + 1, before + work[step], exam(student, tokenizer)["accuracy"]])
            student.train()
            examined += time.process_time() - begun

    losses = fit(student, tokenizer, passes(samples), config, look)
    seconds = time.process_time() - started - examined
    return student, {**exam(student, tokenizer), "flops": before + work[-1], "cpu_seconds": seconds,
                     "loss": sum(losses[-20:]) / len(losses[-20:]), "curve": curve}  # fmt: skip


def reinforced(model: Transformer, tokenizer: BytePairTokenizer, config: ZeroConfig, every: int,
               before: float = 0.0) -> dict:  # fmt: skip
    """Figures of RL on a copy of the model: [step, FLOPs, held-out accuracy, length] on the way."""
    zero = Counted(copy.deepcopy(model), tokenizer, CORPUS, config)
    start = exam(model, tokenizer)
    curve, seconds = [[0, before, start["accuracy"], start["length"]]], 0.0
    while zero.steps < config.steps:
        begun = time.process_time()
        zero.step()
        seconds += time.process_time() - begun
        if zero.steps % every == 0 or zero.steps == config.steps:
            found = exam(zero.model, tokenizer)
            curve.append([zero.steps, before + zero.flops, found["accuracy"], found["length"]])
    return {**found, "flops": before + zero.flops, "cpu_seconds": seconds, "curve": curve}


def run_seed(config: DistillExperimentConfig, seed: int, folder: Path) -> dict:
    """All arms of one seed."""
    stages = config.stages.seeded(seed)
    teacher = checkpoint.load(config.teacher, dtype=torch.float32)  # stored in BF16, sampled in FP32
    reasoner = store(teacher, BytePairTokenizer.load(config.teacher), folder / "teacher")
    base, tokenizer = restore(student_base(folder / "base", stages, seed))
    good, given, seconds = sampled(reasoner, stages.samples, seed)
    work = answer_flops(teacher.cfg, tokenizer, given)
    found: dict = {
        "seed": seed, "torch": torch.__version__.split("+")[0], "machine": platform.machine(),
        "samples": len(good), "asked": len(given), "sampling_flops": work, "sampling_seconds": seconds,
        "teacher": exam(teacher, tokenizer), "base": exam(base, tokenizer)}  # fmt: skip
    student, found["distilled"] = taught(base, tokenizer, good, stages.sft, config.eval_every, work)
    found["rl"] = reinforced(base, tokenizer, stages.rl, config.eval_every)
    slow = replace(stages.rl, lr=config.slow)
    found["slow"] = reinforced(base, tokenizer, slow, config.eval_every)
    found["after"] = reinforced(student, tokenizer, replace(slow, steps=config.after_steps), config.eval_every,
                                found["distilled"]["flops"])  # fmt: skip
    if seed in config.data_seeds:
        hot, hot_given, _ = sampled(reasoner, stages.samples, seed, config.hot)
        data = {"all": given, "hot": hot, "hot all": hot_given, "bare": reworked(good, 0), "coarse": reworked(good, 3),
                "scratch": good, **{str(n): good[:n] for n in config.fewer}}  # fmt: skip
        found["hot_asked"], found["data"] = len(hot_given), other_data(config, stages.sft, base, tokenizer, data)
    return found


def other_data(config: DistillExperimentConfig, sft: SupervisedConfig, base: Transformer, tokenizer: BytePairTokenizer,
               data: dict[str, Samples]) -> dict:  # fmt: skip
    """Figures of a student for each of the sets, cut to the same number of samples, and the share of good ones in it."""
    found = {}
    for name, samples in data.items():
        start = new_policy(tiny_config(tokenizer, **STUDENT), sft.seed) if name == "scratch" else base
        samples = samples[: config.stages.samples]
        found[name] = taught(start, tokenizer, samples, sft)[1]
        found[name]["good"] = sum(is_good(*pair) for pair in samples) / len(samples)
    return found


def run(config: DistillExperimentConfig) -> list[dict]:
    """The seeds, or what is left of them; returns what their files hold."""
    config.out.mkdir(parents=True, exist_ok=True)
    for seed in config.seeds:
        path = config.out / f"distill{seed}.json"
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                write_atomic(path, json.dumps(rounded(run_seed(config, seed, Path(folder)), 4)) + "\n")
    paths = sorted(config.out.glob("distill*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    print(table(results))
    return results


def table(results: list[dict]) -> str:
    """One line a seed: held-out accuracy of each arm."""
    main, data = ("base", "distilled", "rl", "slow", "after"), [name for one in results[:1] for name in one.get("data", {})]
    lines = [f"{'seed':<6}" + "".join(f"{name:>10}" for name in (*main, *data))]
    for found in results:
        arms = [found[name] for name in main] + [found.get("data", {}).get(name) for name in data]
        cells = ["-" if arm is None else f"{arm['accuracy']:.3f}" for arm in arms]
        lines.append(f"{found['seed']:<6}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
