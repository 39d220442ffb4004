"""The runs of the balance experiment: every strategy and coefficient, the settings they share, and their order.

A run is a `Job`; `jobs_of` lists all of them, seed by seed. What each one measures, and how they are run, is in
minids/experiments/balance.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from minids.config import ModelConfig

LENGTH, VOCAB = 128, 2048
GAMMA = 1e-3  # V3's, of runs that do not sweep it
# name -> [(coefficient, strategies, gamma)]: None where there is nothing to sweep
SWEEP: dict[str, list[tuple[float | None, tuple[str, ...], float]]] = {
    "none": [(None, (), 0.0)],
    "bias": [(g, ("bias",), g) for g in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)],
    "proportional bias": [(g, ("proportional_bias",), g) for g in (1e-3, 1e-2, 1e-1)],
    "bias + sequence (V3)": [(1e-4, ("bias", "sequence:alpha=1e-4"), GAMMA)],
    "sequence-wise": [(a, (f"sequence:alpha={a}",), 0.0) for a in (1e-4, 1e-3, 1e-2, 1e-1)],
    "batch-wise": [(a, (f"batch:alpha={a}",), 0.0) for a in (1e-4, 1e-3, 1e-2, 1e-1)],
    "switch": [(a, (f"switch:alpha={a}",), 0.0) for a in (1e-3, 1e-2, 1e-1)],
    "gshard": [(10.0, ("gshard:alpha=10",), 0.0)],
    "noisy top-k": [(None, ("noisy",), 0.0)],
    "importance + load": [(a, ("noisy", f"importance:alpha={a}", f"load:alpha={a}"), 0.0) for a in (1e-3, 1e-2, 1e-1)],
    "z-loss": [(1e-3, ("z:alpha=1e-3",), 0.0)],
    "V2's three losses": [(x, (f"expert_level:alpha={0.003 * x:g}", f"device_level:alpha={0.05 * x:g}",
                               f"communication:alpha={0.02 * x:g}"), 0.0) for x in (0.1, 1.0)],
    "capacity": [(f, (f"capacity:factor={f}",), 0.0) for f in (1.0, 1.5, 2.0)],
    "capacity, by score": [(1.0, ("capacity:factor=1,priority=score",), 0.0)],
    "buffer": [(f, (f"buffer:factor={f}",), 0.0) for f in (1.0, 1.5)],
    "expert choice": [(None, ("expert_choice",), 0.0)],
}  # fmt: skip
QUICK = ("none", "bias", "batch-wise", "expert choice")


@dataclass
class BalanceConfig:
    """Train one small model many times, each time balanced in another way."""

    out: Path = Path("runs/balance")
    """Folder for runs.jsonl, balance.json and the figures; those of the course are in figures/balance."""
    seeds: int = 3
    """Runs of each strategy and coefficient."""
    steps: int = 320
    """Optimizer steps of a run, of `rows` rows of 128 tokens."""
    rows: int = 32
    """Rows in a batch."""
    workers: int = 2
    """Runs at a time, a process each."""
    device: str = "cpu"
    """cpu, cuda or cuda:N, shared by all workers."""
    quick: bool = False
    """A few short runs of a smaller model, to see that everything works."""
    only: str = ""
    """Names of strategies of the sweep, separated by semicolons, to run these alone; empty: all."""
    minutes: float = 0.0
    """Stop after so many minutes with the runs that are finished; 0: never."""
    draw_only: bool = False
    """Train nothing: print the table and draw the figures of the balance.json in the folder."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "rows", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be at least 1")
        unknown = {name.strip() for name in self.only.split(";") if name.strip()} - set(SWEEP)
        if unknown:
            raise ValueError(f"only = {self.only!r}: {', '.join(sorted(unknown))} unknown, allowed are {'; '.join(SWEEP)}")
        if not self.minutes >= 0:
            raise ValueError(f"minutes = {self.minutes!r}: must be at least 0")
        kind = torch.device(self.device)
        if kind.type not in ("cpu", "cuda") or (kind.type == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device = {self.device!r}: must be cpu, or cuda where there is one")


@dataclass(frozen=True)
class Job:
    """One run."""

    group: str  # sweep or nodes
    name: str
    coefficient: float | None
    balance: tuple[str, ...]
    gamma: float
    topk_group: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}/{self.coefficient}/{self.topk_group}/{self.seed}"


@dataclass(frozen=True)
class Settings:
    """What all runs of an output folder have in common."""

    steps: int
    rows: int
    model: dict
    lr: float
    characters: int


def model_config(settings: Settings, topk_group: int = 4) -> ModelConfig:
    return ModelConfig.preset("toy", vocab_size=VOCAB, num_nextn_predict_layers=0, aux_loss_alpha=0.0, n_group=4,
                              topk_group=topk_group, max_position_embeddings=LENGTH, **settings.model)


def settings_of(config: BalanceConfig) -> Settings:
    if config.quick:
        small = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, moe_intermediate_size=32,
                     n_routed_experts=16)
        return Settings(min(config.steps, 40), min(config.rows, 8), small, 3e-3, 150_000)
    return Settings(config.steps, config.rows, dict(moe_intermediate_size=48, n_routed_experts=32), 3e-3, 1_500_000)


def jobs_of(config: BalanceConfig) -> list[Job]:
    """All runs, seed by seed, so that what is there of an unfinished sweep is a whole sweep of fewer seeds."""
    found = []
    for seed in range(1 if config.quick else config.seeds):
        for name, entries in SWEEP.items():
            if not config.quick:
                found += [Job("sweep", name, c, texts, gamma, 4, seed) for c, texts, gamma in entries]
            elif name in QUICK:
                c, texts, gamma = entries[len(entries) // 2]
                found.append(Job("sweep", name, c, texts, gamma, 4, seed))
        limits = (2,) if config.quick else (1, 2, 3)
        found += [Job("nodes", "bias", GAMMA, ("bias",), GAMMA, limit, seed) for limit in limits]
    wanted = {name.strip() for name in config.only.split(";") if name.strip()}
    return [job for job in found if not wanted or (job.group == "sweep" and job.name in wanted)]
