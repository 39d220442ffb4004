"""`python -m minids experiment NAME`: which experiment, and its settings."""

from typing import Annotated

import tyro

from minids.experiments import balance, mtp

BALANCE = tyro.conf.subcommand("balance", description="Every balancing strategy over a sweep of its coefficient.")
MTP = tyro.conf.subcommand("mtp", description="With and without MTP, at equal tokens and at equal FLOPs.")
ExperimentConfig = Annotated[balance.BalanceConfig, BALANCE] | Annotated[mtp.MTPConfig, MTP]


def run_experiment(config: balance.BalanceConfig | mtp.MTPConfig) -> dict:
    """Returns what the experiment's JSON file holds."""
    experiment = balance if isinstance(config, balance.BalanceConfig) else mtp
    return experiment.run(config)
