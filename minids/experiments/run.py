"""`python -m minids experiment NAME`: which experiment, and its settings."""

from typing import Annotated

import tyro

from minids.experiments import balance, distill, fp8, mtp, rl

BALANCE = tyro.conf.subcommand("balance", description="Every balancing strategy over a sweep of its coefficient.")
MTP = tyro.conf.subcommand("mtp", description="With and without MTP, at equal tokens and at equal FLOPs.")
FP8 = tyro.conf.subcommand("fp8", description="BF16 against V3's FP8 and others: one model, seed and order of rows.")
RL = tyro.conf.subcommand("rl", description="R1-Zero, the four stages of R1, and distillation, on several seeds.")
DISTILL = tyro.conf.subcommand("distill", description="A student taught by a reasoner, and one by RL, at counted compute.")
ExperimentConfig = (
    Annotated[balance.BalanceConfig, BALANCE] | Annotated[mtp.MTPConfig, MTP] | Annotated[fp8.Fp8Config, FP8]
    | Annotated[rl.RLExperimentConfig, RL] | Annotated[distill.DistillExperimentConfig, DISTILL]
)


def run_experiment(config: balance.BalanceConfig | mtp.MTPConfig | fp8.Fp8Config | rl.RLExperimentConfig
                   | distill.DistillExperimentConfig) -> dict | list[dict]:  # fmt: skip
    """Returns what the experiment's JSON files hold."""
    kinds = {balance.BalanceConfig: balance, mtp.MTPConfig: mtp, fp8.Fp8Config: fp8, rl.RLExperimentConfig: rl,
             distill.DistillExperimentConfig: distill}  # fmt: skip
    return kinds[type(config)].run(config)
