"""Inside a chunk: how a forward and a backward hide each other's all-to-all [V3 section 3.2.1, Figure 4].

One MoE layer of a micro-batch computes, talks, computes, talks. Alone it can do only one at a time:

    forward    ATTN -> dispatch -> MLP -> combine
    backward   combine -> MLP (B, W) -> dispatch -> ATTN (B, W)        each the gradient of its namesake

Two micro-batches that do not depend on each other, one going forward and one backward, can take turns: one computes while
the other talks. Two queues, each in a fixed order, an entry starting when what it needs is ready (k counts layers):

    compute    ATTN(F) | MLP(B) MLP(W) | MLP(F)       | ATTN(B) ATTN(W) | ATTN(F) of k+1 ...
    network    comb(B) | disp(F)       | disp(B)      | comb(F)         | comb(B) of k+1 ...

Everything is hidden if each entry of the network fits under its slot: comb(B) <= ATTN(F), disp(F) <= MLP(B) + MLP(W),
disp(B) <= MLP(F), comb(F) <= ATTN(B) + ATTN(W). The sum over a layer gives what no order can avoid: communication must not
take longer than computation, a ratio of 1.

The network needs processors too. Of 132 SMs, s send and receive: computation slows down by 132 / (132 - s), and bandwidth
grows with s until the links are full. V3 needs 20 for that. Simplification: bandwidth grows in proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from minids.config import ModelConfig

COMPUTE, NETWORK = "compute", "network"
SMS = 132  # of an H800
FULL_SMS = 20  # fill InfiniBand and NVLink [V3 section 3.2.2]


@dataclass(frozen=True)
class ChunkTimes:
    """Times of one layer, forward (f), input gradient (b), weight gradient (w), in any one unit."""

    attention_f: float
    attention_b: float
    attention_w: float
    mlp_f: float
    mlp_b: float
    mlp_w: float
    dispatch_f: float
    combine_f: float
    dispatch_b: float  # gradient of the dispatch: sums up, like a combine
    combine_b: float  # gradient of the combine: spreads, like a dispatch

    def __post_init__(self):
        for field in fields(self):
            if not 0 <= getattr(self, field.name) < float("inf"):
                raise ValueError(f"{field.name} must be a time of at least 0, got {getattr(self, field.name)!r}")

    @property
    def computation(self) -> float:
        """Of a forward and a backward of one layer together."""
        return self.attention_f + self.attention_b + self.attention_w + self.mlp_f + self.mlp_b + self.mlp_w

    @property
    def communication(self) -> float:
        return self.dispatch_f + self.combine_f + self.dispatch_b + self.combine_b

    def slots(self) -> dict[str, tuple[float, float]]:
        """Entry of the network -> (its time, the computation that it lies under)."""
        return {
            "combine_b": (self.combine_b, self.attention_f),
            "dispatch_f": (self.dispatch_f, self.mlp_b + self.mlp_w),
            "dispatch_b": (self.dispatch_b, self.mlp_f),
            "combine_f": (self.combine_f, self.attention_b + self.attention_w),
        }

    def fits(self) -> bool:
        """Whether every entry of the network fits under its slot: enough, though not necessary, to hide all of it."""
        return all(time <= slot for time, slot in self.slots().values())

    def with_sms(self, sms: int, full: int = FULL_SMS) -> "ChunkTimes":
        """These times, given for all SMs computing and full links, when `sms` of them communicate."""
        if not 1 <= sms < SMS:
            raise ValueError(f"sms must be 1 to {SMS - 1}, got {sms}")
        slower = {COMPUTE: SMS / (SMS - sms), NETWORK: 1 / min(sms / full, 1.0)}
        names = {field.name: NETWORK if field.name[0] in "dc" else COMPUTE for field in fields(self)}  # dispatch, combine
        return replace(self, **{name: getattr(self, name) * slower[queue] for name, queue in names.items()})


@dataclass(frozen=True)
class Entry:
    """One piece of work in one of the two queues. part: "F", "B" or "W"."""

    queue: str
    name: str  # attention, mlp, dispatch, combine or hand_over
    part: str
    layer: int
    start: float
    end: float


# (queue, name, part, layer, what it needs as (name, part, layer) or None)
Job = tuple[str, str, str, int, tuple[str, str, int] | None]


def pair_jobs(layers: int) -> list[Job]:
    """A forward and a backward of `layers` layers, in the order in which each queue is filled."""
    jobs: list[Job] = [(COMPUTE, "attention", "F", 0, None), (NETWORK, "combine", "B", 0, None)]
    for k in range(layers):
        jobs += [
            (COMPUTE, "mlp", "B", k, ("combine", "B", k)), (NETWORK, "dispatch", "F", k, ("attention", "F", k)),
            (COMPUTE, "mlp", "W", k, ("mlp", "B", k)),
            (COMPUTE, "mlp", "F", k, ("dispatch", "F", k)), (NETWORK, "dispatch", "B", k, ("mlp", "B", k)),
            (COMPUTE, "attention", "B", k, ("dispatch", "B", k)), (NETWORK, "combine", "F", k, ("mlp", "F", k)),
            (COMPUTE, "attention", "W", k, ("attention", "B", k)),
        ]  # fmt: skip
        if k + 1 < layers:
            jobs += [(COMPUTE, "attention", "F", k + 1, ("combine", "F", k)),
                     (NETWORK, "combine", "B", k + 1, ("attention", "B", k))]  # fmt: skip
    return jobs


def forward_jobs(layers: int) -> list[Job]:
    """A forward alone: nothing to hide behind."""
    jobs: list[Job] = []
    for k in range(layers):
        jobs += [(COMPUTE, "attention", "F", k, ("combine", "F", k - 1) if k else None),
                 (NETWORK, "dispatch", "F", k, ("attention", "F", k)), (COMPUTE, "mlp", "F", k, ("dispatch", "F", k)),
                 (NETWORK, "combine", "F", k, ("mlp", "F", k))]  # fmt: skip
    return jobs


def backward_jobs(layers: int, weights: bool = True) -> list[Job]:
    """A backward alone. Its weight gradients can hide part of its communication; without them (I) nothing does."""
    jobs: list[Job] = []
    for k in range(layers):
        jobs += [(NETWORK, "combine", "B", k, ("attention", "B", k - 1) if k else None),
                 (COMPUTE, "mlp", "B", k, ("combine", "B", k)), (NETWORK, "dispatch", "B", k, ("mlp", "B", k)),
                 *([(COMPUTE, "mlp", "W", k, ("mlp", "B", k))] if weights else []),
                 (COMPUTE, "attention", "B", k, ("dispatch", "B", k)),
                 *([(COMPUTE, "attention", "W", k, ("attention", "B", k))] if weights else [])]  # fmt: skip
    return jobs


def run_queues(jobs: Sequence[Job], times: ChunkTimes) -> list[Entry]:
    """Start and end of every job: when its queue is free and what it needs is there."""
    free = {COMPUTE: 0, NETWORK: 0}
    ends: dict[tuple[str, str, int], float] = {}
    entries = []
    for queue, name, part, layer, need in jobs:
        start = max(free[queue], ends[need] if need is not None else 0)
        end = start + getattr(times, f"{name}_{part.lower()}")
        free[queue] = ends[name, part, layer] = end
        entries.append(Entry(queue, name, part, layer, start, end))
    return entries


def span(entries: Sequence[Entry]) -> float:
    return max(entry.end for entry in entries)


def exposed(entries: Sequence[Entry]) -> float:
    """Time in which nothing is computed."""
    return span(entries) - sum(entry.end - entry.start for entry in entries if entry.queue == COMPUTE)


def stage_times(times: ChunkTimes, layers: int) -> dict[str, float]:
    """f, b, w, fb and i of a stage of `layers` layers, as `simulate` takes them, communication included.

    i is more than b - w where a full backward hides communication behind its own weight gradients.
    """
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    backward, inputs = (span(run_queues(backward_jobs(layers, weights), times)) for weights in (True, False))
    return {
        "f": span(run_queues(forward_jobs(layers), times)),
        "b": backward,
        "w": min(layers * (times.attention_w + times.mlp_w), backward),
        "fb": span(run_queues(pair_jobs(layers), times)),
        "i": inputs,
    }


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU in training. The first two are assumptions: what large matrix products reach, not the peak."""

    fp8_flops: float = 800e12  # of 1979e12: linear layers
    bf16_flops: float = 500e12  # of 989e12: the attention core
    infiniband: float = 50e9  # bytes a second and GPU, in and out each [V3 section 3.2.2]
    nvlink: float = 160e9
    nodes: int = 8  # the experts' nodes: EP 64
    gpus_per_node: int = 8


def v3_times(tokens: int = 4096, config: ModelConfig | None = None, machine: Machine | None = None) -> ChunkTimes:
    """Seconds of one MoE layer of V3 for one micro-batch of `tokens` tokens in one sequence, from FLOPs and bytes.

    Node-limited routing sends a token once to each of its (at most 4) nodes over InfiniBand and from there to its experts
    over NVLink, both at once, so the slower counts. Of uniformly chosen nodes 1 in `nodes` is the token's own. Dispatch and
    the combine's gradient are FP8 with a 4-byte scale for 128 numbers, combine and the dispatch's gradient BF16 [V3 3.3.2].
    """
    cfg, m = config or ModelConfig.preset("v3"), machine or Machine()
    attention = sum(a * b for name, (_, a, b) in cfg.linears(moe=True).items() if "expert" not in name)
    experts = (cfg.num_experts_per_tok + cfg.n_shared_experts) * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    linear, mlp = (2 * tokens * weights / m.fp8_flops for weights in (attention, experts))
    pairs = tokens * tokens / 2 * cfg.num_attention_heads
    core = 2 * pairs * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim) / m.bf16_flops

    copies = cfg.topk_group * (1 - 1 / m.nodes)
    local = cfg.num_experts_per_tok * (1 - 1 / m.gpus_per_node)

    def all_to_all(bytes_a_token: float) -> float:
        return tokens * bytes_a_token * max(copies / m.infiniband, local / m.nvlink)

    fp8, bf16 = cfg.hidden_size * (1 + 4 / 128), 2 * cfg.hidden_size
    return ChunkTimes(
        attention_f=linear + core, attention_b=linear + 2.5 * core, attention_w=linear,  # 2.5: the core is recomputed
        mlp_f=mlp, mlp_b=mlp, mlp_w=mlp,
        dispatch_f=all_to_all(fp8), combine_f=all_to_all(bf16), dispatch_b=all_to_all(bf16), combine_b=all_to_all(fp8),
    )  # fmt: skip
