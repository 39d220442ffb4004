"""The optimizer's state of a pipeline in an ordinary checkpoint: as one process would have written it, to be read by any.

A rank owns moments of its own parameters alone. They are gathered on rank 0 like the weights, under the names that
minids.train.trainer gives them, so that a checkpoint does not know how many ranks made it. To resume, every rank reads what
it holds. On the same schedule the run goes on bit for bit; on another one, or on one process, all numbers are taken over
just as exactly, and only the order of later sums differs.

    optimizer/exp_avg/NAME, exp_avg_sq, step     of every parameter that had a gradient
    optimizer/master/NAME                        FP32 masters, where weights have fewer bits
    rng/...                                      rank 0's generators (a step draws no random numbers)

Simplification: rank 0 holds all moments, and every rank for a moment the whole model, in host memory. For models that do
not fit there each rank would write a part (torch.distributed.checkpoint).
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from minids import checkpoint
from minids.pipeline.runtime import Pipeline
from minids.pipeline.stages import model_on_meta
from minids.train.optim import FULL, MOMENTS

KINDS = ("step", "exp_avg", "exp_avg_sq", "master")


def _shapes(pipeline: Pipeline) -> dict[str, Tensor]:
    """KIND/NAME -> its shape and dtype (on meta) for all that an optimizer of the whole model may hold."""
    moments, found = MOMENTS[pipeline.config.optim.moments], {}
    for name, weight in model_on_meta(pipeline.cfg, pipeline.dtype).named_parameters():
        found[f"step/{name}"] = torch.empty((), device="meta")
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}/{name}"] = torch.empty(weight.shape, dtype=moments, device="meta")
        if weight.dtype not in FULL:
            found[f"master/{name}"] = torch.empty(weight.shape, device="meta")
    return found


def gather_state(pipeline: Pipeline) -> tuple[dict[str, Tensor], dict] | None:
    """On rank 0 what ``Optimizer.state`` of one process would return, on the CPU; None elsewhere. All ranks call it."""
    tensors, values = pipeline.optimizer.state()
    shapes = _shapes(pipeline)
    # Moments begin with the first gradient: who has which is known to the owner alone.
    there = torch.tensor([float(key in tensors) for key in shapes], device=pipeline.device)
    dist.all_reduce(there, op=dist.ReduceOp.MAX, group=pipeline.group)
    kept = {key: like for (key, like), one in zip(shapes.items(), there.tolist(), strict=True) if one}
    found = pipeline.gather(tensors, kept)
    return None if found is None else (found, values)


@torch.no_grad()
def load_state(pipeline: Pipeline, folder: Path) -> dict:
    """Take over weights, balancing bias and moments from a checkpoint; returns its values (trainer.json).

    Raises ValueError for a checkpoint that does not fit the model.
    """
    values = json.loads((folder / "trainer.json").read_text())
    whole = checkpoint.load(folder, dtype=pipeline.dtype, device="cpu").state_dict()
    own = pipeline.model.state_dict()
    if missing := own.keys() - whole.keys():
        raise ValueError(f"--resume: {folder} has no {sorted(missing)[0]}, which this rank's stages hold")
    for name, tensor in own.items():
        tensor.copy_(whole[name])
    del whole
    with safe_open(folder / "trainer.safetensors", "pt") as file:
        wanted = {f"{kind}/{name}" for kind in KINDS for name in pipeline.optimizer.masters}
        keys = wanted & {key.removeprefix("optimizer/") for key in file.keys()}
        pipeline.optimizer.load_state({key: file.get_tensor(f"optimizer/{key}") for key in keys}, values["optimizer"])
    return values


def load_rng(folder: Path) -> dict[str, Tensor]:
    """The generators' states, as ``minids.train.state.set_rng_state`` takes them."""
    with safe_open(folder / "trainer.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith("rng/")}
