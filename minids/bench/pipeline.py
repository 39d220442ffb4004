"""Pipelines executed: is every schedule one process's step, and does a step take the time that the simulator says?

    torchrun --nproc-per-node 4 -m minids.bench.pipeline --device cuda --out FILE.json     # 4 GPUs, NCCL, a GPU a process
    torchrun --nproc-per-node 2 -m minids.bench.pipeline --device cuda --out FILE.json     # 2 GPUs
    torchrun --nproc-per-node 4 -m minids.bench.pipeline --rounds 1                        # no GPU: gloo
    python -m minids.bench pipeline                                                        # starts 4 processes itself

First the comparison of minids.pipeline.check, for every schedule. Then step times of a larger model, the same layers for
all schedules: each rank times F, B, I and W of its own stages alone, these times (one a stage) go into Schedule.simulate,
and the makespan that comes out stands beside the median of real steps. The ratio of the two says what the simulator leaves
out (starting kernels, waiting for transfers, sharing a machine); ratios to 1F1B compare the order of the schedules. One
step more is recorded action by action (pipeline_record.py), to be drawn beside the simulated one.

FILE is written after each schedule and completed by a later run with the same settings (``--schedules zbv``), so that a
schedule that fails costs only itself. One that takes longer than ``--limit`` seconds counts as a hang: all ranks say where
they stand, and end.

Simplifications: a pair F&B runs as F, then B, on one stream, so the pair time is their sum. On a CPU with fewer cores than
ranks the ranks take turns, and the prediction for free ranks must fall short.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from minids.bench.common import Report, environment, synchronize
from minids.bench.pipeline_record import gather_rows, record
from minids.config import ModelConfig
from minids.pipeline.check import compare, tiny_config
from minids.pipeline.launch import deadline, device_of, initialise
from minids.pipeline.messages import transfer
from minids.pipeline.runtime import Pipeline, Placement
from minids.pipeline.schedules import NAMES
from minids.pipeline.torch_engine import DirectedStage, Engine
from minids.train.settings import TrainConfig

LIMIT = 1e-5  # of the largest difference of a gradient to one process, relative
RANKS = int(os.environ.get("WORLD_SIZE", 4))
LAYERS, MICRO_BATCHES = 8, 16
# changes of the model, rows and tokens of a micro-batch, precision: a stage should take milliseconds, or its start is all
# that is timed. Few experts, whose weights are read for every micro-batch; BF16, or autocast would cast them as often.
SIZES = {
    "cuda": (dict(hidden_size=3072, intermediate_size=8192, moe_intermediate_size=1536, num_attention_heads=16,
                  num_key_value_heads=16, vocab_size=16384, n_routed_experts=8, num_experts_per_tok=4, n_group=4,
                  topk_group=2, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                  v_head_dim=128), 2, 4096, "bf16"),
    "cpu": (dict(), 1, 64, "fp32"),
}  # fmt: skip


def bench_model(device: torch.device) -> tuple[ModelConfig, int, int, str]:
    """The model whose steps are timed, rows and tokens a row of a micro-batch, the precision."""
    changes, *rest = SIZES[device.type]
    return ModelConfig.preset("toy").replace(
        **{"num_hidden_layers": LAYERS, "max_position_embeddings": 4096, "initializer_range": 0.02, **changes}), *rest


def timed(call: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def stage_times(engine: Engine, stage: DirectedStage, rounds: int) -> dict[str, float]:
    """Median seconds of F, B, I and W of one stage alone; its buffers hold what the last step left there."""
    stage.clear_runtime_states()
    found: dict[str, list[float]] = {kind: [] for kind in "FBIW"}

    def backward(full: bool) -> None:
        loss = engine._maybe_get_loss(stage, 0)
        stage.backward_one_chunk(0, loss=loss, full_backward=full)
        stage.bwd_cache.clear()

    def forward() -> None:
        output = stage.forward_one_chunk(0, ())
        engine._maybe_compute_loss(stage, output, None, 0)

    for _ in range(rounds + 1):
        found["F"].append(timed(forward))
        found["B"].append(timed(lambda: backward(True)))
        forward()
        found["I"].append(timed(lambda: backward(False)))
        found["W"].append(timed(lambda: stage.backward_weight_one_chunk(0)))
    stage.clear_runtime_states()
    return {kind: median(seconds[1:]) for kind, seconds in found.items()}  # the first round warms up


def all_stage_times(pipeline: Pipeline, engine: Engine, rounds: int) -> dict[str, list[float]]:
    """The times of every stage, on every rank; a stage that lies on two ranks counts with the slower."""
    plan = pipeline.placement.schedule
    table = torch.zeros(plan.stages, 4, dtype=torch.float64, device=pipeline.device)
    for stage in engine._stages:
        times = torch.tensor(list(stage_times(engine, stage, rounds).values()), dtype=torch.float64, device=pipeline.device)
        index = stage.stage_index % plan.stages
        table[index] = torch.maximum(table[index], times)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return {kind: table[:, i].tolist() for i, kind in enumerate("FBIW")}


def hop_seconds(hidden: Tensor, rounds: int = 10) -> float:
    """Median seconds for one hidden state from a rank to its neighbour: half a round trip of ranks 0 and 1."""
    rank, taken = dist.get_rank(), []
    for _ in range(rounds + 2):
        dist.barrier()
        if rank < 2:
            def trip() -> None:
                transfer(dist.isend if rank == 0 else dist.irecv, hidden, 1 - rank)
                transfer(dist.irecv if rank == 0 else dist.isend, hidden, 1 - rank)
            taken.append(timed(trip) / 2)
    found = torch.tensor([median(taken[2:]) if taken else 0.0], dtype=torch.float64, device=hidden.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def step_times(name: str, device: torch.device, rounds: int) -> dict:
    """Seconds of a schedule's step, measured and predicted, with what the prediction was made from."""
    cfg, size, length, precision = bench_model(device)
    config = TrainConfig(pipeline=name, device=str(device), micro_batch=size, precision=precision)
    torch.manual_seed(0)
    pipeline = Pipeline(Placement.plan(config, cfg, dist.get_world_size()), config, device)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, cfg.vocab_size, (MICRO_BATCHES * size, length + 1), generator=generator)
    ids = torch.zeros_like(tokens)
    pipeline.compute_gradients(tokens, ids, 0.3, MICRO_BATCHES)  # warms up, and fills buffers
    engine, steps, whole, rows = pipeline.engine(MICRO_BATCHES, size, length), [], [], []
    run = engine.run
    for _ in range(rounds):
        pipeline.optimizer.zero_grad()
        engine.run = lambda: steps.append(timed(run))  # the list of actions alone; around it labels, loads, reductions
        dist.barrier()
        whole.append(timed(lambda: pipeline.compute_gradients(tokens, ids, 0.3, MICRO_BATCHES)))
    pipeline.optimizer.zero_grad()
    engine.run = lambda: rows.extend(record(engine, run, device))
    dist.barrier()
    pipeline.compute_gradients(tokens, ids, 0.3, MICRO_BATCHES)
    del engine.run  # the class's own again
    measured = torch.tensor([steps, whole], dtype=torch.float64, device=device)
    dist.all_reduce(measured, op=dist.ReduceOp.MAX)  # a step is over when the last rank is
    times = all_stage_times(pipeline, engine, rounds)
    hop = hop_seconds(torch.zeros(size, length, cfg.hidden_size, dtype=pipeline.dtype, device=device))
    weights = [min(w, b) for w, b in zip(times["W"], times["B"], strict=True)]
    timeline = engine.schedule.simulate(f=times["F"], b=times["B"], w=weights, i=times["I"], comm=hop)
    steps, whole = (sorted(row) for row in measured.tolist())
    return {"measured_s": median(steps), "measured_all_s": steps, "with_reductions_s": median(whole),
            "predicted_s": float(timeline.makespan), "ratio": median(steps) / float(timeline.makespan),
            "predicted_bubble_share": [float(share) for share in timeline.bubble_share], "stage_seconds": times,
            "hop_s": hop, "tokens_per_second": MICRO_BATCHES * size * length / median(whole),
            "recorded": gather_rows(rows, device)}  # fmt: skip


def header(device: torch.device) -> dict:
    """What must be the same for figures to stand in one file."""
    cfg, size, length, precision = bench_model(device)
    return {"machine": environment(), "device": device.type, "backend": dist.get_backend(), "ranks": dist.get_world_size(),
            "devices": _device_names(device), "micro_batches": MICRO_BATCHES, "tokens_a_micro_batch": size * length,
            "precision": precision, "parameters": cfg.count()["main"] + cfg.count()["mtp"], "limit": LIMIT}  # fmt: skip


def work(device: torch.device, options: argparse.Namespace) -> dict:
    """The schedules on this process group; rank 0 writes the JSON after each."""
    rank, found = dist.get_rank(), header(device) | {"schedules": {}}
    if options.out is not None and options.out.exists():
        before = json.loads(options.out.read_text())
        if all(before.get(key) == found[key] for key in found if key != "schedules"):
            found["schedules"] = before["schedules"]
    for name in options.schedules:
        started = time.perf_counter()
        with deadline(options.limit, name):
            layers = Placement.plan(TrainConfig(pipeline=name), tiny_config(8 * RANKS), RANKS).schedule.stages
            equal = compare(name, tiny_config(layers), device)
            entry = {"equal": asdict(equal) if equal is not None else None}
            entry |= step_times(name, device, options.rounds)
        found["schedules"][name] = entry | {"seconds": time.perf_counter() - started}
        if device.type == "cuda":
            gc.collect()  # engine and stages point at each other: the last schedule's model and buffers are still there
            torch.cuda.empty_cache()
        if rank == 0:
            print(f"{name:<16}  gradients {equal.gradient:.1e}, next loss {equal.next_loss:.1e}; step "
                  f"{entry['measured_s']:.4f} s, predicted {entry['predicted_s']:.4f} s, ratio {entry['ratio']:.2f}; "
                  f"took {found['schedules'][name]['seconds']:.0f} s", flush=True)  # fmt: skip
            if options.out is not None:
                write_json(options.out, found)
    return found


def write_json(path: Path, found: dict) -> None:
    """Written whole or not at all; lists of numbers stand in one line."""
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), json.dumps(found, indent=2))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def _device_names(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def run(rounds: int) -> Report:
    """For `python -m minids.bench pipeline`: four processes of this machine, a GPU each where there are as many."""
    device = "cuda" if torch.cuda.device_count() >= RANKS else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "-m",
                   "minids.bench.pipeline", "--device", device, "--rounds", str(rounds), "--out", str(out)]  # fmt: skip
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found = json.loads(out.read_text())
    return report_of(found, device)


def report_of(found: dict, device: str) -> Report:
    """The table of what ``work`` wrote; a schedule whose gradients are not those of one process misses its target."""
    report = Report(f"{RANKS} ranks on {found['backend']}, {MICRO_BATCHES} micro-batches of "
                    f"{found['tokens_a_micro_batch']} tokens",
                    ["schedule", "gradients to one process", "step s", "simulated s", "ratio", "to 1F1B", "simulated"], [],
                    data=found)  # fmt: skip
    base = found["schedules"]["1f1b"]
    for name, entry in found["schedules"].items():
        gradient = entry["equal"]["gradient"]
        measured, predicted = entry["measured_s"], entry["predicted_s"]
        report.rows.append([name, gradient, measured, predicted, entry["ratio"], measured / base["measured_s"],
                            predicted / base["predicted_s"]])  # fmt: skip
        if gradient > LIMIT:
            report.missed.append(f"{name}: gradients differ by {gradient:.1e}, wanted at most {LIMIT:.0e}")
    if device == "cpu" and (os.cpu_count() or 1) < RANKS:
        report.notes.append(f"{os.cpu_count()} cores for {RANKS} ranks: they take turns, so steps take longer than the "
                            "simulator says")  # fmt: skip
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node 4 -m minids.bench.pipeline")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--schedules", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7, help="steps to time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one schedule; then it counts as a hang")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" not in os.environ or RANKS not in (2, 4):
        parser.error(f"WORLD_SIZE={os.environ.get('WORLD_SIZE')}: allowed is 2 or 4, set by torchrun")
    with initialise(options.device, patience=45):
        found = work(device_of(options.device), options)
    wrong = [name for name, entry in found["schedules"].items()
             if entry["equal"] is not None and entry["equal"]["gradient"] > LIMIT]  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
