"""Kernels on the GPU beside their peers: `python -m minids.bench gpu --json figures/bench/gpu.json`.

The published shapes of V3: quantisation, FP8 products for prefill and decoding, the experts' grouped products, and a whole
MoE layer forward. Every candidate of a row, peers included, runs in the same rounds in rotating order; the figure is the
median over rounds of medians of `triton.testing.do_bench`, which empties the L2 cache before each call. Calls are
recorded as CUDA graphs, so that nobody's Python is timed. Inputs are fresh random numbers with outliers, never zeros.

Beside each time stands its error: ||out - exact|| / ||exact|| against an FP32 computation from the same inputs (for
quantisation: whether the bits are the reference's). And the share of the floor: the larger of bytes over the measured
copy rate and operations over the measured rate of the tensor core (FP8: one scale a tensor, fast accumulation), over
the time.

Peers: torch's device copy; cuBLAS in BF16; cuBLASLt's block-scaled FP8 (`torch.nn.functional.scaled_mm`);
`torch._grouped_mm`. Rates: TB/s or TFLOP/s. Shapes: M rows, N outputs, K inputs, E experts, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import kernels
from minids.bench.common import Report
from minids.kernels import gemm_fp8, grouped_fp8, quantize
from minids.model.moe import plan_dispatch
from minids.model.router import Routing

BF16 = torch.bfloat16
PREFILL = [
    (4096, 2112, 7168), (4096, 24576, 1536), (4096, 32768, 512),
    (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048),
]  # fmt: skip
DECODE = [(128, 4096, 7168), (128, 7168, 2048), (64, 24576, 1536)]
TOKENS, HIDDEN, EXPERTS, WIDTH, CHOSEN = 4096, 7168, 32, 2048, 8  # the MoE layer of peers.md
CHECKED = 256  # rows that are compared with the exact result


@dataclass
class Case:
    """One row: what it does, its work, the candidates (ours is "minids"), and the error of ours."""

    operation: str
    shape: str
    unit: str  # "TB/s" or "TFLOP/s"
    work: float  # bytes or operations, as the unit says
    floor: float  # seconds
    candidates: dict[str, Callable[[], object]]
    error: float


def run(rounds: int) -> Report:
    columns = ["operation", "shape", "minids", "unit", "of floor", "error", "best peer", "its rate", "ratio"]
    report = Report("Kernels on the GPU", columns, [])
    if not torch.cuda.is_available():
        report.notes.append("There is no CUDA device here: nothing was measured.")
        return report
    torch.manual_seed(0)
    limits = measure_limits(rounds)
    rows = []
    for build in (quantizations, fp8_products, grouped_products, moe_layers):
        for make in build(limits):
            rows.append(measure(make(), rounds))
            report.rows.append(table_row(rows[-1]))
            torch.cuda.empty_cache()
    report.notes = [f"limits: {', '.join(f'{name} {value:.4g}' for name, value in limits.items())}", *summaries(rows)]
    report.data = {"limits": limits, "rows": rows, "triton": kernels.backend.triton.__version__}
    report.missed = missed(rows)
    return report


# ---- measuring ----


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times all candidates of a case; a peer that cannot run is named with its error."""
    graphs, refused = {}, {}
    for name, call in case.candidates.items():
        try:
            graphs[name] = record(call)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if name == "minids":
                raise
            refused[name] = str(error).splitlines()[0][:120]
    times = time_all(graphs, rounds)
    seconds = {name: median(values) for name, values in times.items()}
    peers = {name: value for name, value in seconds.items() if name != "minids"}
    best = min(peers, key=peers.get) if peers else None
    return {
        "operation": case.operation, "shape": case.shape, "unit": case.unit, "seconds": seconds, "refused": refused,
        "rate": {name: case.work / value / 1e12 for name, value in seconds.items()},
        "share_of_floor": case.floor / seconds["minids"], "error": case.error, "best_peer": best,
        "ratio": median(p / m for p, m in zip(times[best], times["minids"], strict=True)) if best else None,
    }  # fmt: skip


def record(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """One call as a graph, after a first one that compiles."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def time_all(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, candidates in rotating order."""
    from triton.testing import do_bench

    names, times = list(graphs), {name: [] for name in graphs}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(do_bench(graphs[name].replay, warmup=5, rep=20, return_mode="median") / 1e3)
    return times


def measure_limits(rounds: int) -> dict[str, float]:
    """The device's own limits: bytes and operations a second."""
    x = normal(8192, 7168)
    y, n = torch.empty_like(x), 8192
    a, b = normal(n, n), normal(n, n)
    one = torch.ones((), device="cuda")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    times = time_all({
        "copy": record(lambda: y.copy_(x)),
        "bf16": record(lambda: a @ b.t()),
        "fp8": record(lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=BF16, use_fast_accum=True)),
    }, rounds)  # fmt: skip
    work = {"copy": 2.0 * x.numel() * x.element_size(), "bf16": 2.0 * n**3, "fp8": 2.0 * n**3}
    return {name: work[name] / median(times[name]) for name in times}


def normal(*shape: int) -> Tensor:
    """Fresh BF16 numbers; one in a thousand is 50 times as large."""
    x = torch.randn(*shape, device="cuda", dtype=BF16)
    return torch.where(torch.rand(*shape, device="cuda", dtype=BF16) < 1e-3, 50 * x, x)


def error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||."""
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- the operations ----


def quantizations(limits: dict[str, float]) -> list[Callable[[], Case]]:
    m, k = 8192, 7168
    n = m * k

    def case(name: str, n_bytes: float, call: Callable[[Tensor], Any], expected: Callable[[Tensor], Any]) -> Case:
        x = normal(m, k)
        same = all(torch.equal(a.float(), b.float()) for a, b in zip(call(x), expected(x), strict=True))
        moved = torch.empty(int(n_bytes) // 4, device="cuda", dtype=BF16)  # a copy that moves as many bytes
        target = torch.empty_like(moved)
        candidates = {"minids": lambda: call(x), "copy": lambda: target.copy_(moved)}
        found = 0.0 if same else float("nan")
        return Case(name, f"{m} x {k}", "TB/s", n_bytes, n_bytes / limits["copy"], candidates, found)

    def transposed(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize.reference(x.t())

    def block(x: Tensor) -> Case:
        q, s = kernels.quantize_block(x)
        return case("dequantise 128 x 128", n * 3, lambda _: (kernels.dequantize_block(q, s),),
                    lambda _: (kernels.dequantize_block(q, s, backend="torch"),))  # fmt: skip

    one, both = n * (3 + 4 / 128), n * (4 + 8 / 128)
    return [
        lambda: case("quantise 1 x 128", one, kernels.quantize_tile, quantize.reference),
        lambda: case("quantise 1 x 128, column-major", one, lambda x: kernels.quantize_tile(x, column_major=True),
                     quantize.reference),
        lambda: case("quantise 128 x 1, transposed", one, lambda x: kernels.quantize_tile_t(x, column_major=True),
                     transposed),
        lambda: case("quantise both ways", both, lambda x: kernels.quantize_tile_both(x, column_major=True),
                     lambda x: (*quantize.reference(x), *transposed(x))),
        lambda: case("quantise 128 x 128", n * 3, kernels.quantize_block,
                     lambda x: kernels.quantize_block(x, backend="torch")),
        lambda: block(normal(m, k)),
    ]  # fmt: skip


def fp8_products(limits: dict[str, float]) -> list[Callable[[], Case]]:
    def case(name: str, m: int, n: int, k: int, wgrad: bool = False) -> Case:
        x, w = normal(m, k), normal(n, k)
        a, b = kernels.quantize_tile(x, column_major=True), kernels.quantize_block(w)
        if wgrad:
            b = kernels.quantize_tile(w, column_major=True)
        dtype = torch.float32 if wgrad else BF16
        rows = slice(0, CHECKED)
        exact = gemm_fp8.reference(a[0][rows], a[1][rows], *b)
        n_bytes = m * k * (1 + 4 / 128) + n * k + m * n * dtype.itemsize
        candidates = {
            "minids": lambda: kernels.fp8_gemm(*a, *b, out_dtype=dtype),
            "cuBLASLt": lambda: block_scaled(*a, *b, dtype, wgrad),
            "BF16": lambda: x @ w.t(),
        }
        floor = max(n_bytes / limits["copy"], 2 * m * n * k / limits["fp8"])
        found = error(kernels.fp8_gemm(*a, *b, out_dtype=dtype)[rows], exact)
        return Case(name, f"{m}, {n}, {k}", "TFLOP/s", 2.0 * m * n * k, floor, candidates, found)

    named = [("FP8 prefill", shape) for shape in PREFILL] + [("FP8 decoding", shape) for shape in DECODE]
    wgrads = [(7168, 2048, 4096), (4096, 7168, 4096)]
    return [lambda name=name, shape=shape: case(name, *shape) for name, shape in named] + [
        lambda shape=shape: case("FP8 weight gradient", *shape, wgrad=True) for shape in wgrads
    ]


def block_scaled(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, rows: bool) -> Tensor:
    """cuBLASLt's product: B with a scale a row and 128, or a block of 128 x 128."""
    kind = F.ScalingType
    recipe, b_scale = (kind.BlockWise1x128, b_scale) if rows else (kind.BlockWise128x128, b_scale.t())
    return F.scaled_mm(a, b.t(), a_scale, kind.BlockWise1x128, b_scale, recipe, output_dtype=dtype)


def loads(rows: int, multiple: int) -> Tensor:
    """The ends of EXPERTS ragged blocks of rows, the second one empty."""
    weight = torch.rand(EXPERTS) + 0.2
    weight[1] = 0
    load = (weight / weight.sum() * rows / multiple).long() * multiple
    load[-1] += rows - load.sum()
    return load.cumsum(0).int().cuda()


def grouped_products(limits: dict[str, float]) -> list[Callable[[], Case]]:
    m = TOKENS * CHOSEN

    def case(kind: str, n: int, k: int) -> Case:
        ends = loads(m, 128)
        x, dy, w = normal(m, k), normal(m, n), normal(EXPERTS, n, k)
        first, w_t = ends[0].item(), w.transpose(1, 2)
        rows, work = slice(0, min(CHECKED, first)), 2.0 * m * n * k
        if kind == "BF16 forward":
            minids, peer = lambda: kernels.grouped_gemm(x, w, ends), lambda: torch._grouped_mm(x, w_t, offs=ends)
            found = error(minids()[rows], x[rows].float() @ w[0].float().t())
        elif kind == "BF16 input gradient":
            minids, peer = lambda: kernels.grouped_gemm(dy, w_t, ends), lambda: torch._grouped_mm(dy, w, offs=ends)
            found = error(minids()[rows], dy[rows].float() @ w[0].float())
        elif kind == "BF16 weight gradient":
            minids, peer = lambda: kernels.grouped_wgrad(dy, x, ends), lambda: torch._grouped_mm(dy.t(), x, offs=ends)
            found = error(minids()[0], dy[:first].float().t() @ x[:first].float())
        elif kind == "FP8 forward":
            a, b = kernels.quantize_tile(x, column_major=True), kernels.quantize_block(w)
            minids, peer = lambda: kernels.grouped_fp8_gemm(*a, *b, ends), lambda: torch._grouped_mm(x, w_t, offs=ends)
            found = error(minids()[rows], gemm_fp8.reference(a[0][rows], a[1][rows], b[0][0], b[1][0]))
        else:
            minids, peer = lambda: kernels.grouped_fp8_wgrad(dy, x, ends), lambda: torch._grouped_mm(dy.t(), x, offs=ends)
            pairs = [kernels.quantize_tile_t(t[:first]) for t in (dy, x)]
            found = error(minids()[0], grouped_fp8.wgrad_reference(*pairs[0], *pairs[1], ends[:1])[0])
        fp8 = kind.startswith("FP8")
        sizes = [x.numel(), dy.numel(), w.numel()]
        n_bytes = sum(sizes) * (1 if fp8 else 2)
        floor = max(n_bytes / limits["copy"], work / limits["fp8" if fp8 else "bf16"])
        candidates = {"minids": minids, "torch BF16": peer}
        return Case(f"grouped {kind}", f"{m}, {n}, {k}", "TFLOP/s", work, floor, candidates, found)

    kinds = ["BF16 forward", "BF16 input gradient", "BF16 weight gradient", "FP8 forward", "FP8 weight gradient"]
    shapes = [(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    return [lambda kind=kind, shape=shape: case(kind, *shape) for kind in kinds for shape in shapes]


def moe_layers(limits: dict[str, float]) -> list[Callable[[], Case]]:
    """The routed experts forward, from tokens and their routing (planned before) to tokens."""

    def case(fp8: bool) -> Case:
        x = normal(TOKENS, HIDDEN)
        up, down = normal(EXPERTS, 2 * WIDTH, HIDDEN) / 85, normal(EXPERTS, HIDDEN, WIDTH) / 45
        scores = torch.rand(TOKENS, EXPERTS, device="cuda")
        weights, indices = scores.topk(CHOSEN)
        load = torch.bincount(indices.flatten(), minlength=EXPERTS)
        plan = plan_dispatch(Routing(weights, indices, scores, load), 128 if fp8 else 1)
        weight_M = torch.cat([weights.flatten(), weights.new_zeros(1)])[plan.choice_M]  # 0 in slots that fill up
        up_q, down_q = kernels.quantize_block(up), kernels.quantize_block(down)

        def ours() -> Tensor:
            if fp8:
                q, s = kernels.quantize_tile(x, column_major=True)  # once a token, then copied to its slots
                slots = q.view(torch.uint8).index_select(0, plan.token_M).view(q.dtype)
                s_slots = s.t().index_select(1, plan.token_M).t()
                both = kernels.grouped_fp8_gemm(slots, s_slots, *up_q, plan.ends_E)
                y = kernels.grouped_fp8_gemm(*kernels.swiglu_quantize(both, weight_M), *down_q, plan.ends_E)
            else:
                both = kernels.grouped_gemm(x.index_select(0, plan.token_M), up, plan.ends_E)
                y = kernels.grouped_gemm(kernels.swiglu(both, weight_M), down, plan.ends_E)
            return kernels.combine(y, plan.slot_NK)

        def peer() -> Tensor:
            both = torch._grouped_mm(x.index_select(0, plan.token_M), up.transpose(1, 2), offs=plan.ends_E)
            gate, rest = both.chunk(2, -1)
            h = F.silu(gate) * rest * weight_M[:, None].to(BF16)
            y = torch._grouped_mm(h, down.transpose(1, 2), offs=plan.ends_E)
            return torch.zeros_like(x).index_add_(0, plan.token_M, y)

        work = 2.0 * TOKENS * CHOSEN * 3 * HIDDEN * WIDTH
        found = error(ours()[:8], exact_moe(x[:8], weights[:8], indices[:8], up, down))
        name = f"MoE forward {'FP8' if fp8 else 'BF16'}"
        candidates = {"minids": ours, "torch BF16": peer}
        shape = f"{TOKENS} x {HIDDEN}, {EXPERTS} of {WIDTH}, top {CHOSEN}"
        return Case(name, shape, "TFLOP/s", work, work / limits["fp8" if fp8 else "bf16"], candidates, found)

    return [lambda: case(False), lambda: case(True)]


def exact_moe(x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The routed experts' sum in FP32, token by token."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for n in range(len(x)):
        for weight, e in zip(weights[n], indices[n].tolist(), strict=True):
            gate, rest = (up[e].float() @ x[n].float()).chunk(2)
            out[n] += down[e].float() @ (F.silu(gate) * rest * weight)
    return out


# ---- reporting ----


def table_row(row: dict[str, Any]) -> list[Any]:
    best = row["best_peer"]
    return [
        row["operation"], row["shape"], row["rate"]["minids"], row["unit"], row["share_of_floor"], f"{row['error']:.1e}",
        best or "-", row["rate"][best] if best else None, row["ratio"],
    ]  # fmt: skip


def against(row: dict[str, Any], peer: str) -> float:
    """How many times the peer's rate ours is; NaN if it did not run."""
    return row["rate"]["minids"] / row["rate"].get(peer, float("nan"))


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def of(rows: list[dict[str, Any]], operation: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["operation"] == operation]


def summaries(rows: list[dict[str, Any]]) -> list[str]:
    mean = geometric_mean([against(row, "cuBLASLt") for row in of(rows, "FP8 prefill")])
    return [f"FP8 prefill against cuBLASLt, geometric mean of six shapes: {mean:.3f}"]


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The issue's minimum targets that these rows do not reach."""
    targets = [
        ("quantise 1 x 128, TB/s", of(rows, "quantise 1 x 128")[0]["rate"]["minids"], 3.5),
        ("FP8 prefill, geometric mean against cuBLASLt",
         geometric_mean([against(row, "cuBLASLt") for row in of(rows, "FP8 prefill")]), 0.85),
        ("MoE forward BF16, TFLOP/s", of(rows, "MoE forward BF16")[0]["rate"]["minids"], 550),
        ("MoE forward FP8, TFLOP/s", of(rows, "MoE forward FP8")[0]["rate"]["minids"], 800),
    ]  # fmt: skip
    targets += [(f"FP8 decoding {r['shape']}, against the better peer", r["ratio"], 1.0) for r in of(rows, "FP8 decoding")]
    return [f"{name}: {found:.3g}, wanted {wanted}" for name, found, wanted in targets if not found >= wanted]
