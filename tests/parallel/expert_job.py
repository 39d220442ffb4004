"""Run by test_processes.py in a fresh process, FOLDER as its argument: the comparison of minids.parallel.check, then what
pipelines that share experts do in which order, what they keep, and mistakes; or `train --expert-parallel` with settings
from FOLDER/settings.json, a list of runs. On 4 forked ranks."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from minids.data import DataConfig
from minids.parallel import check, dispatch, expert_pipeline
from minids.parallel.check import Case
from minids.parallel.mesh import Layout, Mesh
from minids.pipeline.check import LAMBDA, batches, tiny_config
from minids.pipeline.launch import free_port, start_local
from minids.pipeline.torch_engine import DirectedStage
from minids.train.settings import RecipeConfig, TrainConfig
from minids.train.trainer import train

CPU, FP32 = torch.device("cpu"), torch.float32


def trace(mesh: Mesh) -> tuple[list[str], int]:
    """One step of dualpipe: this rank's all-to-alls, each with the action that makes it; and the numbers in its slices of
    the optimizer's state."""
    calls, now, kept = [], [""], {}
    count = dispatch.Hop._count

    def tell(hop, what, counts, rows):
        calls.append(f"{now[0]} {what}")
        count(hop, what, counts, rows)

    def named(name):
        real = kept[name] = getattr(DirectedStage, name)

        def call(self, chunk, *args, **options):
            now[0] = f"{name} stage {self.stage_index} micro-batch {chunk}"
            return real(self, chunk, *args, **options)

        return call

    for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
        setattr(DirectedStage, name, named(name))
    dispatch.Hop._count = tell
    cfg = tiny_config(4)
    engine = check.sharded(Case("", "two_hop", pipeline="dualpipe"), cfg, mesh, check.train_config(CPU, FP32), FP32)
    engine.compute_gradients(*batches(0, cfg.vocab_size)[0], LAMBDA)
    dispatch.Hop._count = count
    for name, real in kept.items():
        setattr(DirectedStage, name, real)
    whole = 0
    for bucket in engine.optimizer.buckets:
        start, size = bucket.peers.rank * len(bucket.piece), sum(bucket.sizes)
        whole += max(0, min(size, start + len(bucket.piece)) - start)  # without what fills up
    return calls, whole


def broken() -> list[tuple[str, object, str, object]]:
    """(case, object, attribute, what it is replaced with): mistakes that the comparison must see."""
    def of_this_pipeline(self, tensor):
        dist.all_reduce(tensor, group=self.group)

    def of_this_stage(self):
        norm = torch.nn.utils.get_total_norm([bucket.piece.grad for bucket in self.buckets])
        return self.mesh.peers["data"].all_reduce(norm.double().square()).sqrt().float()

    engine = expert_pipeline.ExpertPipeline
    return [("mirror ranks not summed", expert_pipeline, "connect_holders", lambda *_: {}),
            ("norm of one stage", expert_pipeline.StageOptimizer, "total_norm", of_this_stage),
            ("loads of one pipeline", engine, "_sum_everywhere", of_this_pipeline),
            ("all pipelines have the same rows", engine, "_own_rows", lambda self, batch: batch[:4])]  # fmt: skip


def compare_ranks(rank: int, options, out: Path) -> None:
    check.run(rank, options)
    cfg, config = tiny_config(4), check.train_config(CPU, FP32)
    mesh = Mesh.connect(Layout(4, 2, 2, gpus_per_node=1))
    traces = [None] * 4
    dist.all_gather_object(traces, trace(mesh))
    found = []
    for case, target, name, value in broken():
        kept = getattr(target, name)
        setattr(target, name, value)
        found.append(check.run_case(Case(case, pipeline="dualpipe"), mesh, cfg, config, FP32))
        setattr(target, name, kept)
    if rank == 0:
        parameters = sum(p.numel() for p in check.draw(cfg, "cpu", FP32).parameters())
        (out / "more.json").write_text(json.dumps({"calls": [calls for calls, _ in traces], "parameters": parameters,
            "kept": [whole for _, whole in traces], "broken": [asdict(line) for line in found]}))  # fmt: skip


def rank_process(rank: int, settings: dict, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CI": "1"}  # fmt: skip
    torch.set_num_threads(1)
    data, recipe = DataConfig(**settings.pop("data")), RecipeConfig(**settings.pop("recipe"))
    train(TrainConfig(data=data, recipe=recipe, out=Path(settings.pop("out")), **settings))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "settings.json").exists():
        check.start_local = lambda _, ranks, options: start_local(compare_ranks, ranks, options, folder)
        check.main(["--layers", "4", "--json", str(folder / "check.json")])
    else:
        for run in json.loads((folder / "settings.json").read_text()):
            torch.multiprocessing.start_processes(rank_process, (run, free_port()), nprocs=4, start_method="fork")
