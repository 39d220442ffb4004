"""Is a step with spread experts the step of one process? Asked of every dispatch, with real processes.

    python -m minids.parallel.check                                            # 4 processes of this machine, gloo
    torchrun --nproc-per-node 2 -m minids.parallel.check --device cuda         # NCCL, a GPU a process
    torchrun --nproc-per-node 4 -m minids.parallel.check --device cuda --backend gloo      # fewer GPUs than processes

For each line of the table a small model with every mechanism switched on takes a step over all ranks, and a second forward
and backward; rank 0 takes the same steps in one process, by minids.train.step. Compared are the losses, all gradients
(relative to the largest of the tensor), the weights after the step, and the loss after it. The processes play nodes of
--gpus-per-node GPUs each: what crosses "nodes" is counted, as rows and bytes, beside what nodes.py says it should be.

Lines that name a schedule are pipelines of two ranks, side by side (expert_pipeline.py): four processes are PP 2 x EP 2, or
PP 2 x 2 replicas; eight are PP 2 x EP 4, or 2 x 2 x 2. There the weights are compared after three steps. In float32 a few
of them are then off by more than their gradients, in one process cut differently just so: Adam divides small gradients by
themselves. ``--dtype fp64`` leaves 1e-15 of gradients, and 1e-9 of weights, whose norm that clips is float32.

FP8 rows are compared with one process whose rows are quantised alike (EP 1, so that nothing travels): the same numbers.
BF16 on the way back is not the same: each GPU and node rounds its own part of a token's sum, where one process rounds the
whole. That is 2^-9 of a number, and enough to turn a token's choice of expert in a later layer here and there.

With ``--dtype bf16`` on CUDA the experts are the BF16 kernels, and differences are those of BF16 sums.

Kept: figures/bench/expert_parallel.json, NCCL on two H200s.
"""

import argparse
import copy
import dataclasses
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.model.balancer import Balancer
from minids.model.transformer import Transformer
from minids.parallel.dispatch import Wire
from minids.parallel.expert_pipeline import ExpertPipeline
from minids.parallel.experts import shard_experts, tally_of
from minids.parallel.mesh import Layout, Mesh
from minids.parallel.nodes import count_copies
from minids.parallel.peers import Tally
from minids.parallel.step import ExpertParallel, check_batch
from minids.pipeline.check import LAMBDA, ROWS, batches, tiny_config
from minids.pipeline.launch import deadline, device_of, initialise, start_local
from minids.pipeline.runtime import Placement
from minids.train.optim import OptimConfig, Optimizer
from minids.train.settings import TrainConfig
from minids.train.state import write_atomic
from minids.train.step import StepResult, compute_gradients, split_rows

LR, GAMMA, SEED = 1e-3, 1e-3, 0
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    name: str
    dispatch: str = "two_hop"
    wire: Wire = Wire()
    zero: bool = True
    replicas: int = 1
    pipeline: str | None = None  # with it PP 2, and DP halved
    steps: int = 1  # before the weights are compared

    @property
    def pp(self) -> int:
        return 1 if self.pipeline is None else 2


CASES = (
    Case("flat, a row a choice", "flat", zero=False),
    Case("a row a GPU", "once", zero=False),
    Case("two hops", "two_hop", zero=False),
    Case("two hops, 2 replicas", "two_hop", zero=False, replicas=2),
    Case("two hops, ZeRO-1", "two_hop"),
    Case("ZeRO-1, 2 replicas", "two_hop", replicas=2),
    Case("FP8 there", "two_hop", Wire("fp8")),
    Case("FP8 there, BF16 back", "two_hop", Wire.v3()),
    Case("1f1b, flat", "flat", pipeline="1f1b", steps=3),
    Case("zb1p, two hops", "two_hop", pipeline="zb1p", steps=3),
    Case("zbv, a row a GPU", "once", pipeline="zbv", steps=3),
    Case("dualpipe, flat", "flat", pipeline="dualpipe", steps=3),
    Case("dualpipe, two hops", "two_hop", pipeline="dualpipe", steps=3),
    Case("dualpipe, 2 replicas", "two_hop", replicas=2, pipeline="dualpipe", steps=3),
)


@dataclass
class Comparison:
    """Largest differences to one process; relative for gradients, absolute for the others; and what was sent."""

    case: str
    loss: float  # next token, nats
    losses: float  # next token, each MTP depth, balance, total
    gradient: float
    gradient_name: str
    grad_norm: float  # before clipping, relative
    weights: float  # after the step, or the third
    loads_equal: bool
    bias: float  # likewise
    next_loss: float
    rows: int  # dispatched in the first forward by all ranks and hops, over all wires and none
    ib_rows: int  # of these across nodes
    ib_rows_expected: int  # the same by nodes.py
    ib_bytes: int
    combine_bytes: int  # back across nodes


def train_config(device: torch.device, dtype: torch.dtype, **changes) -> TrainConfig:
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return TrainConfig(device=str(device), precision=precision, micro_batch=1, document_mask=True,
                       optim=OptimConfig(clip=0.1), **changes)  # fmt: skip


class OneProcess:
    """Somebody who has everything, with the face of `ExpertParallel` around minids.train.step."""

    def __init__(self, cfg: ModelConfig, config: TrainConfig, dtype: torch.dtype):
        self.model = draw(cfg, config.device, dtype)
        self.config, self.balancer = config, Balancer.install(self.model, config.balance)
        self.optimizer = Optimizer(self.model, config.optim, cfg.num_hidden_layers)

    def compute_gradients(self, tokens: Tensor, document_ids: Tensor, mtp_lambda: float) -> StepResult:
        return compute_gradients(self.model, self.optimizer, tokens, document_ids, mtp_lambda, self.config, self.balancer)

    def step(self, lr: float, gamma: float, result: StepResult) -> None:
        self.optimizer.step(lr)
        self.balancer.update(result.loads, gamma)

    def gather_gradients(self) -> dict[str, Tensor]:
        return {name: master.grad.detach().cpu().clone() for name, master in self.optimizer.masters.items()}

    def gather_model(self) -> Transformer:
        return copy.deepcopy(self.model).cpu()


Engine = ExpertParallel | ExpertPipeline | OneProcess


def draw(cfg: ModelConfig, device: str, dtype: torch.dtype) -> Transformer:
    """The model that all start from."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Transformer(cfg)
    finally:
        torch.set_default_dtype(before)


def steps(engine: Engine, data: list, count: int = 1) -> dict:
    """``count`` steps, and forward and backward of another: what is compared of them, whole on rank 0. And the rows that
    the first forward and backward sent."""
    first = engine.compute_gradients(*data[0], LAMBDA)
    tally = Tally() if isinstance(engine, OneProcess) else copy.deepcopy(tally_of(engine.model))
    gradients = engine.gather_gradients()
    engine.step(LR, GAMMA, first)
    norm = engine.optimizer.grad_norm
    for i in range(1, count):
        engine.step(LR, GAMMA, engine.compute_gradients(*data[i % 2], LAMBDA))
    model = engine.gather_model()
    second = engine.compute_gradients(*data[count % 2], LAMBDA)
    return {"first": first, "gradients": gradients, "norm": norm, "second": second, "tally": tally,
            "state": None if model is None else model.state_dict()}  # fmt: skip


def sharded(case: Case, cfg: ModelConfig, mesh: Mesh, config: TrainConfig, dtype: torch.dtype) -> Engine:
    if case.pipeline is not None:
        config = dataclasses.replace(config, pipeline=case.pipeline, expert_parallel=mesh.layout.ep)
        torch.manual_seed(SEED)
        return ExpertPipeline(Placement.plan(config, cfg, mesh.layout.pp), config, mesh, case.dispatch, case.wire,
                              dtype=dtype)  # fmt: skip
    model = shard_experts(draw(cfg, config.device, dtype), mesh, case.dispatch, case.wire)
    return ExpertParallel(cfg, config, mesh, zero=case.zero, dtype=dtype, model=model)


def reference(case: Case, cfg: ModelConfig, config: TrainConfig, dtype: torch.dtype) -> Engine:
    """One process: minids.train.step; with rows in FP8, all experts at home and rows quantised alike."""
    exact = case.wire == Wire()
    return OneProcess(cfg, config, dtype) if exact else sharded(case, cfg, Mesh.alone(), config, dtype)


@torch.no_grad()
def expected_rows(model: Transformer, layout: Layout, dispatch: str, batch: tuple[Tensor, Tensor], device: str) -> int:
    """Rows that cross nodes in a forward of the batch, by minids/parallel/nodes.py, from the routing of one process."""
    inputs, labels, ids = split_rows(*batch, True, device)
    rows, found = len(inputs), 0
    for routing in model.train()(inputs, labels=labels, document_ids=ids).routing:
        rank = torch.arange(rows, device=device) // (rows // layout.dp)
        home = (rank % layout.ep).repeat_interleave(len(routing.indices) // rows)
        n_experts = len(routing.load)
        if dispatch == "flat":
            node = routing.indices // (n_experts // layout.nodes)
            found += int((node != (home // layout.gpus).unsqueeze(1)).sum())
        else:
            copies = count_copies(routing.indices, n_experts, layout.nodes, layout.ep, home)
            found += int((copies.ib if dispatch == "two_hop" else copies.ib_flat).sum())
    return found


def compare(case: str, found: dict, wanted: dict, sent: list[int], by_formula: int) -> Comparison:
    apart = {name: _relative(found["gradients"][name], value) for name, value in wanted["gradients"].items()}
    worst = max(apart, key=apart.get)
    state = {name: float((found["state"][name] - value).abs().max()) for name, value in wanted["state"].items()}
    bias = [value for name, value in state.items() if name.endswith("e_score_correction_bias")]
    a, b = wanted["first"], found["first"]
    losses = [(a.loss, b.loss), (a.balance_loss, b.balance_loss), (a.total, b.total),
              *zip(a.mtp_losses, b.mtp_losses, strict=True)]  # fmt: skip
    return Comparison(
        case=case, loss=b.loss, losses=max(abs(x - y) for x, y in losses), gradient=apart[worst], gradient_name=worst,
        grad_norm=abs(found["norm"] / wanted["norm"] - 1),
        weights=max(value for name, value in state.items() if not name.endswith("e_score_correction_bias")),
        loads_equal=bool(torch.equal(a.loads.cpu(), b.loads.cpu())), bias=max(bias, default=0.0),
        next_loss=abs(wanted["second"].total - found["second"].total), rows=sent[0], ib_rows=sent[1],
        ib_rows_expected=by_formula, ib_bytes=sent[2], combine_bytes=sent[3])  # fmt: skip


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def run_case(case: Case, mesh: Mesh, cfg: ModelConfig, config: TrainConfig, dtype: torch.dtype) -> Comparison | None:
    """The comparison on rank 0, None elsewhere."""
    data = batches(SEED, cfg.vocab_size, max(ROWS, 2 * case.pp * mesh.layout.dp))
    found = steps(sharded(case, cfg, mesh, config, dtype), data, case.steps)
    tally = found["tally"]
    sent = [*tally.total("dispatch")[:1], *tally.total("dispatch", "ib"), tally.total("combine", "ib")[1]]
    sent = mesh.peers["world"].all_reduce(torch.tensor(sent, device=config.device)).tolist()
    if mesh.rank:
        return None
    one = reference(case, cfg, config, dtype)
    by_formula = expected_rows(one.model, mesh.layout, case.dispatch, data[0], config.device)
    return compare(case.name, found, steps(reference(case, cfg, config, dtype), data, case.steps), sent, by_formula)


def meshes(options: argparse.Namespace, device: torch.device) -> dict[tuple[int, int], Mesh]:
    """A mesh for each (pipeline ranks, replicas) that the ranks divide into; groups are made by all ranks in the same
    order. With a pipeline nodes are smaller, so that an expert group lies on as many."""
    found = {}
    for pp, replicas in sorted({(case.pp, case.replicas) for case in CASES}):
        (ep, rest), gpus = divmod(options.ranks, pp * replicas), max(1, options.gpus_per_node // pp)
        if ep and not rest and (ep % gpus == 0 or gpus % ep == 0):
            found[pp, replicas] = Mesh.connect(Layout(options.ranks, ep, pp, gpus), device.type)
    return found


TITLE = (f"{'dispatch':<22}{'loss':>8}  {'losses':>8}{'gradients':>11}{'weights':>9}{'next loss':>11}{'loads':>7}"
         f"{'rows':>8}{'across nodes':>14}{'expected':>10}{'bytes there':>13}{'bytes back':>12}")  # fmt: skip


def line(c: Comparison) -> str:
    return (f"{c.case:<22}{c.loss:8.4f}  {c.losses:8.1e}{c.gradient:11.1e}{c.weights:9.1e}{c.next_loss:11.1e}"
            f"{'same' if c.loads_equal else 'OTHER':>7}{c.rows:8,}{c.ib_rows:14,}{c.ib_rows_expected:10,}{c.ib_bytes:13,}"
            f"{c.combine_bytes:12,}")  # fmt: skip


def run(rank: int, options: argparse.Namespace) -> None:
    """What each process does; rank 0 prints and writes the comparisons."""
    device, dtype, found = device_of(options.device, options.backend), DTYPES[options.dtype], []
    config, cfg = train_config(device, dtype), tiny_config(options.layers, n_routed_experts=8 * max(1, options.ranks // 4))
    by_sizes = meshes(options, device)
    if rank == 0:
        print(f"{options.ranks} ranks, nodes of {options.gpus_per_node}; differences to one process\n{TITLE}", flush=True)
    for case in CASES:
        if (case.pp, case.replicas) not in by_sizes:
            continue
        with deadline(options.limit, case.name):
            result = run_case(case, by_sizes[case.pp, case.replicas], cfg, config, dtype)
        if result is not None:
            found.append(result)
            print(line(result), flush=True)
    if rank == 0 and options.json is not None:
        write_atomic(options.json, json.dumps([asdict(result) for result in found], indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minids.parallel.check", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="processes to start, unless torchrun has started them")
    parser.add_argument("--gpus-per-node", type=int, default=2, help="ranks that count as one node")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="default: nccl for cuda, gloo for cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one line; then it counts as a hang")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.backend == "nccl" and options.device == "cpu":
        parser.error("--backend nccl with --device cpu: allowed is gloo, or --device cuda")
    if options.layers < 1 or options.layers % 4:
        parser.error(f"--layers {options.layers}: allowed are multiples of 4, the stages of zbv on two ranks")
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    try:
        check_batch(ROWS, options.ranks)
        Layout(options.ranks, options.ranks, gpus_per_node=options.gpus_per_node)
    except ValueError as error:
        parser.error(str(error))
    if "RANK" in os.environ:
        with initialise(options.device, backend=options.backend):
            run(int(os.environ["RANK"]), options)
    else:
        start_local(run, options.ranks, options)


if __name__ == "__main__":
    sys.exit(main())
