"""The products of `minids.bench.gpu`: what each computes, its floor, its peers, and its error against FP32.

Each function returns builders, so that one case's tensors are gone before the next one's are made. Inputs are fresh random
numbers with outliers. Shapes: M rows, N outputs, K inputs, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import kernels
from minids.kernels import gemm_fp8, grouped_fp8, quantize

Limits = dict[str, float]
Builders = list[Callable[[], "Case"]]
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


def normal(*shape: int) -> Tensor:
    """Fresh BF16 numbers; one in a thousand is 50 times as large."""
    x = torch.randn(*shape, device="cuda", dtype=BF16)
    return torch.where(torch.rand(*shape, device="cuda", dtype=BF16) < 1e-3, 50 * x, x)


def error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||."""
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


def steady(call: Callable[[], Tensor], times: int = 8) -> Tensor:
    """The result of the call. Raises RuntimeError if it has other bits at a later time: none of these sums is in an order
    left to chance, and a race shows so long before it shows in the norm of the whole."""
    first = call()
    for number in range(2, times + 1):
        if wrong := int((call() != first).sum()):
            raise RuntimeError(f"not the same twice: {wrong} of {first.numel()} numbers differ in call {number}")
    return first


def reset_after_capture() -> None:
    """A capture that failed leaves its stream current and the random generator believing that it is recorded."""
    if not torch.cuda.is_available():
        return
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()
    fresh = torch.Generator(device="cuda")
    fresh.manual_seed(0)
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh.graphsafe_get_state())


def quantizations(limits: Limits) -> Builders:
    def case(name: str, size: tuple[int, int], bytes_each: float, call: Callable[..., Any], expected: Callable[..., Any],
             prepare: Callable[[Tensor], tuple] = lambda x: (x,)) -> Case:  # fmt: skip
        (m, k), inputs = size, prepare(normal(*size))
        same = all(torch.equal(a.float(), b.float()) for a, b in zip(call(*inputs), expected(*inputs), strict=True))
        n_bytes = m * k * bytes_each
        moved = torch.empty(int(n_bytes) // 4, device="cuda", dtype=BF16)  # a copy that moves as many bytes
        target = torch.empty_like(moved)
        candidates = {"minids": lambda: call(*inputs), "copy": lambda: target.copy_(moved)}
        found = 0.0 if same else float("nan")
        return Case(name, f"{m} x {k}", "TB/s", n_bytes, n_bytes / limits["copy"], candidates, found)

    def transposed(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize.reference(x.t())

    one, both, x = 3 + 4 / 128, 4 + 8 / 128, (8192, 7168)
    return [
        lambda: case("quantise 1 x 128", x, one, kernels.quantize_tile, quantize.reference),
        lambda: case("quantise 1 x 128, power-of-two scales", x, one, lambda x: kernels.quantize_tile(x, scale="ue8m0"),
                     lambda x: quantize.reference(x, "ue8m0")),
        lambda: case("quantise 1 x 128, column-major", x, one, lambda x: kernels.quantize_tile(x, column_major=True),
                     quantize.reference),
        lambda: case("quantise 128 x 1, transposed", x, one, lambda x: kernels.quantize_tile_t(x, column_major=True),
                     transposed),
        lambda: case("quantise both ways", x, both, lambda x: kernels.quantize_tile_both(x, column_major=True),
                     lambda x: (*quantize.reference(x), *transposed(x))),
        lambda: case("quantise 128 x 128", x, 3, kernels.quantize_block,
                     lambda x: kernels.quantize_block(x, backend="torch")),
        lambda: case("dequantise 128 x 128", (18432, 7168), 3, lambda q, s: (kernels.dequantize_block(q, s),),
                     lambda q, s: (kernels.dequantize_block(q, s, backend="torch"),), kernels.quantize_block),
    ]  # fmt: skip


def fp8_products(limits: Limits) -> Builders:
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
        if not wgrad:
            candidates["DeepGEMM in FlashInfer"] = deep_gemm(*a, *b, exact)
        floor = max(n_bytes / limits["copy"], 2 * m * n * k / limits["fp8"])
        found = error(steady(candidates["minids"])[rows], exact)
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


def deep_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, exact: Tensor) -> Callable[[], Tensor]:
    """FlashInfer's port of DeepGEMM, checked against `exact` at its first call, which compiles for minutes on a new
    machine. Raises ImportError there if it is not installed, RuntimeError if both layouts of A's scales give wrong sums."""
    chosen: list[Tensor] = []

    def choose_layout(gemm: Callable[..., Tensor]) -> Tensor:
        row_major, column_major = a_scale.contiguous(), a_scale.t().contiguous().view(a_scale.shape)
        for scales in (row_major, column_major):
            if error(gemm(a, b, scales, b_scale)[:CHECKED], exact) < 1e-2:
                return scales
        raise RuntimeError("wrong results with both layouts of A's scales")

    def run() -> Tensor:
        from flashinfer.gemm import fp8_blockscale_gemm_sm90 as gemm

        if not chosen:
            chosen.append(choose_layout(gemm))
        return gemm(a, b, chosen[0], b_scale)

    return run


def loads(rows: int, multiple: int) -> Tensor:
    """The ends of EXPERTS ragged blocks of rows, the second one empty."""
    weight = torch.rand(EXPERTS) + 0.2
    weight[1] = 0
    load = (weight / weight.sum() * rows / multiple).long() * multiple
    load[-1] += rows - load.sum()
    return load.cumsum(0).int().cuda()


def grouped_floor(kind: str, rows: int, weights: int, work: float, limits: Limits) -> float:
    """Seconds. rows, weights: how many numbers both (M, N) and (M, K) have, and the experts' matrices."""
    if kind == "FP8 weight gradient":  # first BF16 is read and written in FP8, transposed; then the product, FP32 out
        return 3 * rows / limits["copy"] + max((rows + 4 * weights) / limits["copy"], work / limits["fp8"])
    fp8 = kind.startswith("FP8")
    return max((1 if fp8 else 2) * (rows + weights) / limits["copy"], work / limits["fp8" if fp8 else "bf16"])


def grouped_products(limits: Limits) -> Builders:
    m = TOKENS * CHOSEN

    def case(kind: str, n: int, k: int) -> Case:
        ends = loads(m, 128)
        x, dy, w = normal(m, k), normal(m, n), normal(EXPERTS, n, k)
        first, w_t = ends[0].item(), w.transpose(1, 2)
        rows, work = slice(0, min(CHECKED, first)), 2.0 * m * n * k
        if kind == "BF16 forward":
            minids, peer = lambda: kernels.grouped_gemm(x, w, ends), lambda: torch._grouped_mm(x, w_t, offs=ends)
            found = error(steady(minids)[rows], x[rows].float() @ w[0].float().t())
        elif kind == "BF16 input gradient":
            minids, peer = lambda: kernels.grouped_gemm(dy, w_t, ends), lambda: torch._grouped_mm(dy, w, offs=ends)
            found = error(steady(minids)[rows], dy[rows].float() @ w[0].float())
        elif kind == "BF16 weight gradient":
            minids, peer = lambda: kernels.grouped_wgrad(dy, x, ends), lambda: torch._grouped_mm(dy.t(), x, offs=ends)
            found = error(steady(minids)[0], dy[:first].float().t() @ x[:first].float())
        elif kind == "FP8 forward":
            a, b = kernels.quantize_tile(x, column_major=True), kernels.quantize_block(w)
            minids, peer = lambda: kernels.grouped_fp8_gemm(*a, *b, ends), lambda: torch._grouped_mm(x, w_t, offs=ends)
            found = error(steady(minids)[rows], gemm_fp8.reference(a[0][rows], a[1][rows], b[0][0], b[1][0]))
        else:
            minids, peer = lambda: kernels.grouped_fp8_wgrad(dy, x, ends), lambda: torch._grouped_mm(dy.t(), x, offs=ends)
            pairs = [kernels.quantize_tile_t(t[:first]) for t in (dy, x)]
            found = error(steady(minids)[0], grouped_fp8.wgrad_reference(*pairs[0], *pairs[1], ends[:1])[0])
        floor = grouped_floor(kind, x.numel() + dy.numel(), w.numel(), work, limits)
        candidates = {"minids": minids, "torch BF16": peer}
        return Case(f"grouped {kind}", f"{m}, {n}, {k}", "TFLOP/s", work, floor, candidates, found)

    kinds = ["BF16 forward", "BF16 input gradient", "BF16 weight gradient", "FP8 forward", "FP8 weight gradient"]
    shapes = [(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    return [lambda kind=kind, shape=shape: case(kind, *shape) for kind in kinds for shape in shapes]
