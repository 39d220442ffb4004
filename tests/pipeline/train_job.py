"""Run by test_runtime.py in a fresh process, FOLDER as its argument: `train --pipeline` on 4 forked ranks, settings from
FOLDER/settings.json."""

import json
import os
import sys
from pathlib import Path

import torch

from minids.data import DataConfig
from minids.pipeline.launch import free_port
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.trainer import train


def rank_process(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "CI": "1"}  # fmt: skip
    torch.set_num_threads(1)
    settings = json.loads((Path(folder) / "settings.json").read_text())
    data, recipe = DataConfig(**settings.pop("data")), RecipeConfig(**settings.pop("recipe"))
    train(TrainConfig(data=data, recipe=recipe, out=Path(folder) / "run", **settings))


if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank_process, (sys.argv[1], free_port()), nprocs=4, start_method="fork")
