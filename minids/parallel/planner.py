"""The planner: what a layout costs a GPU in memory, wires and time, from the shapes alone [V3 3.1-3.4; 2505.09343 2.3.2].

    python -m minids.parallel.planner                                    # V3 on 2,048 GPUs, and its serving units
    python -m minids.parallel.planner --preset v2_lite --world 64 --pp 1 --ep 64

Memory of training, bytes on each GPU:

    experts here   X = experts' parameters / (PP EP),       others here   W = all other parameters / PP
    weights        copies (1 X + b W)         FP8 experts, b = FP8 and BF16 mixed; DualPipe keeps 2 copies of each stage
    gradients      copies 4 (X + W)           FP32, summed over micro-batches
    master, moments    (4 + 2 + 2) (X / replicas + W / DP)         ZeRO-1: FP32 and twice BF16, each number once a replica
    activations    micro-batches in flight x layers here x tokens x (what V3's recomputation leaves of a token)

Wires, a token and layer, each way: FP8 there, BF16 back, to M (1 - 1/nodes) other nodes over InfiniBand and to K (1 -
1/GPUs) other GPUs over NVLink, evenly chosen. Scales are counted as 4 bytes, as in nodes.py; as one byte, which is how
dispatch.py sends a power of two, a row is 2% shorter. Times beside them: minids/pipeline/chunk.py.

Serving: every expert slot of every layer lies on a GPU; `ServingUnit` divides. The end of decoding speed with one expert a
device and full overlap of two micro-batches [2505.09343 2.3.2] is pure wire time:

    t_comm = (1 B + 2 B) x tokens x (K + 1) x D / bandwidth,      time a token = layers x 2 t_comm

Simplifications: equal stages (their parameters are the model's share, embedding, head and MTP included); no allocator, no
buffers of NCCL. The one copy of a stage's master and moments is split over both mirror ranks of DualPipe too, as
expert_pipeline.py does it.
"""

import argparse
from dataclasses import dataclass
from math import ceil

from minids.config import ModelConfig
from minids.fp8.memory import formula
from minids.parallel.eplb import check_positive
from minids.parallel.mesh import Layout
from minids.parallel.nodes import combine_bytes, dispatch_bytes
from minids.pipeline.chunk import ChunkTimes, Machine, v3_times

MASTER, MOMENTS, GRADIENT = 4, 2 * 2, 4  # bytes a parameter: FP32; two in BF16; FP32 [V3 3.3.3]
DUALPIPE_COPIES = 2  # of the parameters [V3 table 2]


@dataclass(frozen=True)
class Parameters:
    """Of the whole model, MTP modules included."""

    experts: int  # routed
    fp8: int  # of the others: linears that FP8 training multiplies in FP8
    others: int  # embedding, head, gates, norms, eh_proj

    @property
    def dense(self) -> int:
        return self.fp8 + self.others

    @classmethod
    def of(cls, cfg: ModelConfig) -> "Parameters":
        total = cfg.count()
        layers = range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers)
        sizes = [(name, n * a * b) for i in layers for name, (n, a, b) in cfg.linears(cfg.is_moe_layer(i)).items()]
        experts = sum(size for name, size in sizes if name.startswith("experts."))
        fp8 = sum(size for _, size in sizes) - experts
        return cls(experts, fp8, total["main"] + total["mtp"] - experts - fp8)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a training run."""

    expert_weights: float
    dense_weights: float
    gradients: float
    master: float
    moments: float
    activations: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def activation_bytes(cfg: ModelConfig) -> float:
    """Bytes that a token keeps in one MoE layer for backward under V3's recomputation [V3 3.2.3, 3.3.3]: the inputs of
    both norms in BF16; Q's and the latent's, from which the core of attention runs again; o_proj's in E5M6; SwiGLU's in
    FP8; and, on the experts' side, the rows that came, in FP8, one for each choice."""
    parts = formula(cfg, tokens=1, slots=cfg.num_experts_per_tok, layers=(0, 1), fp8=True)
    rows = cfg.num_experts_per_tok * dispatch_bytes(cfg.hidden_size)
    return sum(parts.values()) + 2 * combine_bytes(cfg.hidden_size) + rows


def training_memory(cfg: ModelConfig, layout: Layout, tokens: int = 4096, copies: int = DUALPIPE_COPIES,
                    in_flight: int | None = None) -> Memory:  # fmt: skip
    """Memory of one GPU. ``tokens``: of a micro-batch on one GPU. ``copies`` of each stage's parameters, 2 for DualPipe.
    ``in_flight``: micro-batches whose activations are kept, PP + 1 for DualPipe [V3 table 2], 1 without a pipeline."""
    check_positive(tokens=tokens, copies=copies, **({} if in_flight is None else {"in_flight": in_flight}))
    layout.check_experts(cfg.n_routed_experts)
    if layout.pp == 1:
        copies = 1
    p = Parameters.of(cfg)
    experts, dense = p.experts / (layout.pp * layout.ep), p.dense / layout.pp
    spread = experts / layout.replicas + dense / layout.dp
    layers = (cfg.num_hidden_layers + cfg.num_nextn_predict_layers) / layout.pp
    kept = in_flight or (layout.pp + 1 if layout.pp > 1 else 1)
    return Memory(
        expert_weights=copies * experts, dense_weights=copies * (p.fp8 + 2 * p.others) / layout.pp,
        gradients=copies * GRADIENT * (experts + dense), master=MASTER * spread, moments=MOMENTS * spread,
        activations=kept * layers * tokens * activation_bytes(cfg))  # fmt: skip


@dataclass(frozen=True)
class LayerWires:
    """Of one token and MoE layer, one way there (dispatch) or back (combine); means under an even choice."""

    nodes: float  # other nodes that it is sent to
    gpus: float  # other GPUs of its nodes that it is forwarded to
    dispatch: int  # bytes of a row
    combine: int

    @classmethod
    def of(cls, cfg: ModelConfig, layout: Layout) -> "LayerWires":
        reached = min(cfg.topk_group, layout.nodes, cfg.num_experts_per_tok)
        return cls(reached * (1 - 1 / layout.nodes), cfg.num_experts_per_tok * (1 - 1 / layout.gpus),
                   dispatch_bytes(cfg.hidden_size), combine_bytes(cfg.hidden_size))  # fmt: skip

    @property
    def ib_bytes(self) -> float:
        """There and back."""
        return self.nodes * (self.dispatch + self.combine)

    @property
    def nvlink_bytes(self) -> float:
        return self.gpus * (self.dispatch + self.combine)


@dataclass(frozen=True)
class Ratio:
    """Communication over computation of one MoE layer: 1 is V3's "approximately 1:1"."""

    forward: float
    both: float  # forward and backward

    @classmethod
    def of(cls, times: ChunkTimes) -> "Ratio":
        forward = (times.dispatch_f + times.combine_f) / (times.attention_f + times.mlp_f)
        return cls(forward, times.communication / times.computation)


def layer_times(cfg: ModelConfig, layout: Layout, tokens: int = 4096, machine: Machine | None = None) -> ChunkTimes:
    """Seconds of a MoE layer's parts for ``tokens`` tokens of one GPU, communication and computation each alone."""
    base = machine or Machine()
    fitted = Machine(base.fp8_flops, base.bf16_flops, base.infiniband, base.nvlink, layout.nodes, layout.gpus)
    return v3_times(tokens, cfg, fitted)


@dataclass(frozen=True)
class ServingUnit:
    """The smallest group of GPUs that serves a whole model [V3 3.4]. ``slots`` of routed experts, redundant ones included,
    on ``expert_gpus`` of the ``gpus``."""

    gpus: int
    tp: int  # of attention
    redundant: int
    n_experts: int = 256
    expert_gpus: int | None = None  # all, if None

    def __post_init__(self):
        check_positive(gpus=self.gpus, tp=self.tp, n_experts=self.n_experts)
        if self.gpus % self.tp:
            raise ValueError(f"tp={self.tp}: allowed are divisors of gpus={self.gpus}")
        if self.redundant < 0 or self.slots % (self.expert_gpus or self.gpus):
            raise ValueError(f"redundant={self.redundant}: allowed are numbers from 0 up for which n_experts + redundant "
                             f"= {self.slots} slots divide over {self.expert_gpus or self.gpus} GPUs")  # fmt: skip

    @classmethod
    def prefill(cls) -> "ServingUnit":
        """4 nodes of 8 GPUs: TP4, DP8, EP32, 32 redundant experts."""
        return cls(gpus=32, tp=4, redundant=32)

    @classmethod
    def decode(cls) -> "ServingUnit":
        """40 nodes: TP4, DP80, EP320; 256 GPUs hold one routed expert each, the others redundant and shared ones."""
        return cls(gpus=320, tp=4, redundant=0, expert_gpus=256)

    @property
    def dp(self) -> int:
        return self.gpus // self.tp

    @property
    def slots(self) -> int:
        return self.n_experts + self.redundant

    @property
    def experts_per_gpu(self) -> int:
        return self.slots // (self.expert_gpus or self.gpus)

    @property
    def other_gpus(self) -> int:
        """That hold redundant and shared experts."""
        return self.gpus - (self.expert_gpus or self.gpus)

    def weight_bytes(self, cfg: ModelConfig) -> float:
        """FP8 weights of one GPU that holds routed experts: its experts of all main layers, its share of the rest."""
        main = cfg.replace(num_nextn_predict_layers=0)
        p = Parameters.of(main)
        return self.experts_per_gpu * p.experts / cfg.n_routed_experts + (p.fp8 + 2 * p.others) / self.tp


def decode_limit(hidden: int = 7000, layers: int = 61, tokens: int = 32, experts: int = 9, bandwidth: float = 50e9,
                 there: int = 1, back: int = 2) -> tuple[float, float, float]:  # fmt: skip
    """(seconds of one layer's dispatch and combine, seconds a token, tokens a second and request): the upper bound of
    [2505.09343 2.3.2], which rounds D to 7K. ``tokens`` a device and step; ``experts``: 8 and the shared one; ``there``,
    ``back``: bytes a number. While one of two micro-batches communicates the other computes, so a layer takes 2 t_comm."""
    check_positive(hidden=hidden, layers=layers, tokens=tokens, experts=experts)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth={bandwidth}: allowed are numbers above 0, in bytes a second")
    once = (there + back) * tokens * experts * hidden / bandwidth
    each = layers * 2 * once
    return once, each, 1 / each


def report(cfg: ModelConfig, layout: Layout, tokens: int = 4096) -> str:
    """A readable plan."""
    gb, memory, p = 1e9, training_memory(cfg, layout, tokens), Parameters.of(cfg)
    wires, times = LayerWires.of(cfg, layout), layer_times(cfg, layout, tokens)
    ratio = Ratio.of(times)
    lines = [f"{layout.world} GPUs = PP {layout.pp} x DP {layout.dp}; EP {layout.ep} over {layout.nodes} nodes, "
             f"{layout.replicas} replicas, {ceil(cfg.n_routed_experts / layout.ep)} experts a layer and GPU",
             f"parameters: {p.experts:,} in experts, {p.dense:,} in all else", "", "memory of a GPU, GB"]  # fmt: skip
    lines += [f"  {name.replace('_', ' '):<16}{size / gb:8.2f}" for name, size in vars(memory).items()]
    lines += [f"  {'total':<16}{memory.total / gb:8.2f}", "",
              f"a token and MoE layer: {wires.dispatch:,} bytes there, {wires.combine:,} back, to {wires.nodes:g} other "
              f"nodes and {wires.gpus:g} other GPUs",
              f"  InfiniBand {wires.ib_bytes:,.0f} bytes, NVLink {wires.nvlink_bytes:,.0f}, forward; backward the same",
              f"{tokens} tokens: all-to-all {1e3 * times.communication:.1f} ms, computation {1e3 * times.computation:.1f} "
              f"ms, ratio {ratio.both:.2f} (forward alone {ratio.forward:.2f})"]  # fmt: skip
    return "\n".join(lines)


def serving_report(cfg: ModelConfig) -> str:
    lines = []
    for name, unit in (("prefill", ServingUnit.prefill()), ("decode", ServingUnit.decode())):
        others = f", {unit.other_gpus} for redundant and shared ones" if unit.other_gpus else ""
        each = "1 expert" if unit.experts_per_gpu == 1 else f"{unit.experts_per_gpu} experts"
        lines.append(f"{name}: {unit.gpus} GPUs, TP {unit.tp} x DP {unit.dp}, {each} a GPU{others}; "
                     f"{unit.weight_bytes(cfg) / 1e9:.1f} GB of weights")  # fmt: skip
    once, each, speed = decode_limit()
    lines.append(f"decoding, one expert a device: {1e6 * once:.2f} us a dispatch and combine, {1e3 * each:.2f} ms a token, "
                 f"at most {int(speed)} tokens a second")  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minids.parallel.planner", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="v3", help="toy, small, v2_lite, v3, or the path of a config.json")
    for name, default in (("world", 2048), ("pp", 16), ("ep", 64), ("gpus-per-node", 8), ("tokens", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    try:
        given = options.preset
        cfg = ModelConfig.from_json(given) if given.endswith(".json") else ModelConfig.preset(given)
        layout = Layout(options.world, options.ep, options.pp, options.gpus_per_node)
        print(report(cfg, layout, options.tokens))
    except ValueError as error:
        parser.error(str(error))
    if cfg.n_routed_experts == 256:
        print("\n" + serving_report(cfg))


if __name__ == "__main__":
    main()
