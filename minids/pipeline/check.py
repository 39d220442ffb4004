"""Is a step over several processes the step of one process? Asked of every schedule, with real processes.

    python -m minids.pipeline.check                            # seven schedules on 4 processes of this machine, gloo
    python -m minids.pipeline.check --schedules dualpipe
    torchrun --nproc-per-node 4 -m minids.pipeline.check --device cuda          # NCCL, a GPU a process
    torchrun --nproc-per-node 4 -m minids.pipeline.check --device cuda --backend gloo        # fewer GPUs than processes

For each schedule: a small model with every mechanism switched on is built in pieces, takes a step, and a second forward
and backward. Rank 0 takes the same steps with the whole model, by minids.train.step. Compared are all gradients and losses,
the loads of all experts, the weights and the balancing bias after the step, and the loss after it. Differences of gradients
are relative to the largest gradient of the tensor.

Kept: figures/bench/pipeline.json has NCCL on two H200s; pipeline_four_ranks.json beside it four ranks that shared one.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from minids.config import ModelConfig
from minids.fp8 import to_fp8
from minids.model.balancer import Balancer
from minids.model.transformer import Transformer
from minids.pipeline.launch import deadline, device_of, initialise, start_local
from minids.pipeline.runtime import Pipeline, Placement
from minids.pipeline.schedules import NAMES
from minids.train.optim import OptimConfig, Optimizer
from minids.train.settings import TrainConfig
from minids.train.state import write_atomic
from minids.train.step import compute_gradients

LR, LAMBDA, GAMMA = 1e-2, 0.3, 1e-3
ROWS, LENGTH, MICRO_BATCHES = 8, 24, 8


@dataclass
class Comparison:
    """Largest differences to one process; relative for gradients, absolute for the others."""

    schedule: str
    loss: float  # of the pipeline, next token, nats
    gradient: float
    gradient_name: str  # where the largest difference is
    losses: float  # next token, each MTP depth, balance
    grad_norm: float  # before clipping, relative
    weights: float  # after the step
    bias: float  # after the step
    loads_equal: bool
    next_loss: float  # of the second batch, after the step
    seconds: float


def tiny_config(layers: int = 8, **changes) -> ModelConfig:
    """A V3 of some 10,000 parameters with dense and MoE layers, groups, bias, balance loss and MTP."""
    values = dict(
        vocab_size=97, hidden_size=32, num_hidden_layers=layers, first_k_dense_replace=1, intermediate_size=48,
        moe_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, n_group=2, topk_group=1, max_position_embeddings=64, initializer_range=0.1,
        aux_loss_alpha=0.01)  # fmt: skip
    return ModelConfig.preset("toy").replace(**values | changes)


def batches(seed: int, vocab: int, rows: int = ROWS) -> list[tuple[Tensor, Tensor]]:
    """Two batches of packed documents of uneven lengths, so that micro-batches count different numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        tokens = torch.randint(0, vocab, (rows, LENGTH + 1), generator=generator)
        ends = torch.rand(rows, LENGTH + 1, generator=generator) < torch.linspace(0.0, 0.4, rows).unsqueeze(1)
        found.append((tokens, ends.cumsum(1)))
    return found


def train_config(schedule: str, device: torch.device, **changes) -> TrainConfig:
    return TrainConfig(pipeline=schedule, device=str(device), precision="fp32", micro_batch=ROWS // MICRO_BATCHES,
                       document_mask=True, optim=OptimConfig(clip=0.1), **changes)  # fmt: skip


def reference(cfg: ModelConfig, config: TrainConfig, data: list, seed: int, dtype: torch.dtype) -> dict:
    """Two steps of one process: what the pipeline is compared with."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(config.device):
            model = Transformer(cfg)
    finally:
        torch.set_default_dtype(before)
    if config.fp8 != "none":
        to_fp8(model, config.fp8)
    balancer = Balancer.install(model, config.balance)
    optimizer = Optimizer(model, config.optim, cfg.num_hidden_layers)
    first = compute_gradients(model, optimizer, *data[0], LAMBDA, config, balancer)
    gradients = {name: master.grad.detach().cpu().clone() for name, master in optimizer.masters.items()}
    optimizer.step(LR)
    balancer.update(first.loads, GAMMA)
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    second = compute_gradients(model, optimizer, *data[1], LAMBDA, config, balancer)
    return {"first": first, "gradients": gradients, "norm": optimizer.grad_norm, "state": state, "second": second}


def compare(schedule: str, cfg: ModelConfig, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32,
            overlap: Callable | None = None, **changes) -> Comparison | None:  # fmt: skip
    """Takes the steps on all ranks; the comparison on rank 0, None elsewhere. ``changes``: of the TrainConfig."""
    config, data = train_config(schedule, device, **changes), batches(seed, cfg.vocab_size)
    started = time.perf_counter()
    torch.manual_seed(seed)
    pipeline = Pipeline(Placement.plan(config, cfg, dist.get_world_size()), config, device,
                        overlap=overlap, dtype=dtype)  # fmt: skip
    first = pipeline.compute_gradients(*data[0], LAMBDA, MICRO_BATCHES)
    gradients = pipeline.gather_gradients()
    pipeline.step(LR, GAMMA, first)
    norm, model = pipeline.optimizer.grad_norm, pipeline.gather_model()
    second = pipeline.compute_gradients(*data[1], LAMBDA, MICRO_BATCHES)
    seconds = time.perf_counter() - started
    if gradients is None:
        return None
    one = reference(cfg, config, data, seed, dtype)
    apart = {name: _relative(gradients[name], wanted) for name, wanted in one["gradients"].items()}
    worst = max(apart, key=apart.get)
    state = {name: float((value - one["state"][name]).abs().max()) for name, value in model.state_dict().items()}
    bias = [value for name, value in state.items() if name.endswith("e_score_correction_bias")]
    a, b = one["first"], first
    losses = [(a.loss, b.loss), (a.balance_loss, b.balance_loss), (a.total, b.total),
              *zip(a.mtp_losses, b.mtp_losses, strict=True)]  # fmt: skip
    return Comparison(
        schedule=schedule, loss=first.loss, gradient=apart[worst], gradient_name=worst,
        losses=max(abs(x - y) for x, y in losses), grad_norm=abs(norm / one["norm"] - 1),
        weights=max(value for name, value in state.items() if not name.endswith("e_score_correction_bias")),
        bias=max(bias, default=0.0), loads_equal=bool(torch.equal(a.loads.cpu(), b.loads.cpu())),
        next_loss=abs(one["second"].total - second.total), seconds=seconds)  # fmt: skip


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def run(rank: int, options: argparse.Namespace) -> None:
    """What each process does; rank 0 prints and writes the comparisons."""
    device = device_of(options.device, options.backend)
    found = []
    for name in options.schedules:
        layers = Placement.plan(TrainConfig(pipeline=name), tiny_config(8 * options.ranks), options.ranks).schedule.stages
        with deadline(options.limit, name):
            result = compare(name, tiny_config(layers, num_nextn_predict_layers=options.mtp), device)
        if result is not None:
            found.append(result)
            print(f"{name:<16}  loss {result.loss:.4f}   differences to one process: gradients {result.gradient:.1e}, "
                  f"losses {result.losses:.1e}, weights after the step {result.weights:.1e}, "
                  f"next loss {result.next_loss:.1e}",
                  flush=True)  # fmt: skip
    if rank == 0 and options.json is not None:
        write_atomic(options.json, json.dumps([asdict(result) for result in found], indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minids.pipeline.check", description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--ranks", type=int, default=4, help="processes to start, unless torchrun has started them")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="default: nccl for cuda, gloo for cpu")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one schedule; then it counts as a hang")
    parser.add_argument("--mtp", type=int, default=1, help="MTP modules")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.backend == "nccl" and options.device == "cpu":
        parser.error("--backend nccl with --device cpu: allowed is gloo, or --device cuda")
    if "RANK" in os.environ:
        options.ranks = int(os.environ["WORLD_SIZE"])
        with initialise(options.device, backend=options.backend):
            run(int(os.environ["RANK"]), options)
    else:
        start_local(run, options.ranks, options)


if __name__ == "__main__":
    sys.exit(main())
