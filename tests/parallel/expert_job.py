"""Run by test_processes.py in a fresh process, FOLDER as its argument: the comparison of minids.parallel.check, and `train
--expert-parallel`, on 4 forked ranks; settings from FOLDER/settings.json, a list of runs."""

import json
import os
import sys
from pathlib import Path

import torch

from minids.data import DataConfig
from minids.parallel import check
from minids.pipeline.launch import free_port
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.trainer import train


def rank_process(rank: int, settings: dict, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CI": "1"}  # fmt: skip
    torch.set_num_threads(1)
    data, recipe = DataConfig(**settings.pop("data")), RecipeConfig(**settings.pop("recipe"))
    train(TrainConfig(data=data, recipe=recipe, out=Path(settings.pop("out")), **settings))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "settings.json").exists():
        check.main(["--layers", "3", "--json", str(folder / "check.json")])
    else:
        for run in json.loads((folder / "settings.json").read_text()):
            torch.multiprocessing.start_processes(rank_process, (run, free_port()), nprocs=4, start_method="fork")
