"""`python -m minids experiment NAME`: which experiment, and its settings."""

from dataclasses import dataclass
from typing import Literal

import tyro

from minids.experiments import balance


@dataclass
class ExperimentConfig(balance.BalanceConfig):
    """Run an experiment of many small trainings; finished runs are kept and skipped."""

    name: tyro.conf.Positional[Literal["balance"]] = "balance"
    """balance: every balancing strategy over a sweep of its coefficient."""


def run_experiment(config: ExperimentConfig) -> dict:
    """Returns what the experiment's JSON file holds."""
    return balance.run(config)
