"""Distillation: a small model learns from a reasoner's answers, by SFT alone [R1 2.4, 4.1].

    teacher answers questions; the right answers are SFT data for the student; no RL for the student

R1's finding: this beats RL on the small model itself, since what the large one has found need not be found again. The
command runs both from the same student base. The teacher's own training is not free: it is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch

from minids.rl.answers import ask
from minids.rl.policy import new_policy, tiny_config
from minids.rl.r1 import Note, losses, restore, store
from minids.rl.rewards import Total
from minids.rl.supervised import SupervisedConfig, fit
from minids.rl.tasks import Sums, character_tokenizer
from minids.rl.zero import Zero, ZeroConfig

STUDENT = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
           "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 16}  # fmt: skip
CORPUS = Sums()


@dataclass(frozen=True)
class DistillConfig:
    """The toy's figures, the paper's in brackets."""

    base: SupervisedConfig = field(default_factory=lambda: SupervisedConfig(steps=1600))
    """Pre-training of the student's base, on the corpus that the teacher's base has read."""
    samples: int = 5500
    """Answers of the teacher to learn from (800k)."""
    rejection: bool = True
    """Keep right and well-formed answers only; without, all."""
    temperature: float = 1.0
    """Of the teacher's sampling."""
    sft: SupervisedConfig = field(default_factory=lambda: SupervisedConfig(steps=400))
    """Two or three epochs, the rate falling to a tenth and below."""
    rl: ZeroConfig = field(default_factory=lambda: ZeroConfig(steps=100))
    """What the student is compared with: RL on its base."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples = {self.samples!r}: must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature!r}: must be finite and above 0")

    def seeded(self, seed: int) -> DistillConfig:
        """The same with every part's seed derived from one."""
        return replace(self, **{name: replace(getattr(self, name), seed=seed) for name in ("base", "sft", "rl")})


def student_base(out: Path, config: DistillConfig, seed: int, note: Note | None = None) -> Path:
    """A base model of a fifth of the teacher's parameters."""
    tokenizer = character_tokenizer()
    model = new_policy(tiny_config(tokenizer, **STUDENT), seed)
    fit(model, tokenizer, CORPUS.document, config.base, losses(note))
    return store(model, tokenizer, out)


def teacher_samples(teacher: Path, n: int, seed: int, temperature: float = 1.0,
                    rejection: bool = True) -> tuple[list[tuple[str, str]], int]:  # fmt: skip
    """(``n`` answers of the teacher to training problems, how many it gave for them), right and well formed ones alone with
    ``rejection``. Raises ValueError when fewer than a tenth of its answers are."""
    model, tokenizer = restore(teacher)
    random, generator, total = Random(f"teach {seed}"), torch.Generator().manual_seed(seed), Total(CORPUS.rewards())
    kept: list[tuple[str, str]] = []
    asked = 0
    while len(kept) < n:
        batch = ask(model, tokenizer, [CORPUS.draw(random) for _ in range(256)], total, temperature=temperature,
                    generator=generator)  # fmt: skip
        asked += len(batch.texts)
        good = [not rejection or a == f == 1.0
                for a, f in zip(batch.terms["accuracy"], batch.terms["format"], strict=True)]  # fmt: skip
        kept += [(p.prompt, text) for p, text, ok in zip(batch.problems, batch.texts, good, strict=True) if ok]
        if len(kept) < asked / 10:
            raise ValueError(f"{teacher}: {len(kept)} of {asked} answers are right and well formed; allowed is a tenth")
    return kept[:n], asked


def distill(teacher: Path, base: Path, out: Path, config: DistillConfig, note: Note | None = None) -> Path:
    """SFT of the student's base on the teacher's answers."""
    samples, asked = teacher_samples(teacher, config.samples, config.sft.seed, config.temperature, config.rejection)
    if note is not None:
        note({"samples": len(samples), "asked": asked})
    model, tokenizer = restore(base)
    fit(model, tokenizer, passes(samples), config.sft, losses(note))
    return store(model, tokenizer, out)


def student_rl(base: Path, out: Path, config: DistillConfig, note: Note | None = None) -> Path:
    """The other way: RL on the student's base itself."""
    model, tokenizer = restore(base)
    Zero(model, tokenizer, CORPUS, config.rl).run(note)
    return store(model, tokenizer, out)


def passes(samples: list[tuple[str, str]]) -> Callable[[Random], tuple[str, str]]:
    """Draws every sample once before any again, in a new order each time: epochs."""
    order: list[int] = []

    def draw(random: Random) -> tuple[str, str]:
        if not order:
            order.extend(range(len(samples)))
            random.shuffle(order)
        return samples[order.pop()]

    return draw
