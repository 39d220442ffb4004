"""The operations of `minids.bench.gpu`: what each computes, its floor, its peers, and its error against FP32.

Each function returns builders, so that one case's tensors are gone before the next one's are made. Inputs are fresh random
numbers with outliers. Shapes: M rows, N outputs, K inputs, E experts, T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import kernels
from minids.kernels import gemm_fp8, grouped_fp8, quantize, routing
from minids.model.moe import plan_dispatch
from minids.model.router import Routing

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



def quantizations(limits: Limits) -> Builders:
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


def grouped_products(limits: Limits) -> Builders:
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


def moe_layers(limits: Limits) -> Builders:
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


def small_operations(limits: Limits) -> Builders:
    """RMSNorm, router, cross entropy, SwiGLU: rates in bytes that must move."""
    m, d, v = 8192, 7168, 129280

    def case(name: str, shape: str, n_bytes: float, minids: Callable, peer: Callable, found: float) -> Case:
        floor = n_bytes / limits["copy"]
        return Case(name, shape, "TB/s", n_bytes, floor, {"minids": minids, "torch": peer}, found)

    def norm() -> Case:
        x, weight = normal(m, d), torch.rand(d, device="cuda", dtype=BF16)
        exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        return case("RMSNorm", f"{m} x {d}", 4.0 * m * d, lambda: kernels.rms_norm(x, weight),
                    lambda: F.rms_norm(x, (d,), weight, 1e-6), error(kernels.rms_norm(x, weight), exact))  # fmt: skip

    def norm_backward() -> Case:
        x, dy, weight = normal(m, d), normal(m, d), torch.rand(d, device="cuda", dtype=BF16)
        _, r = torch.ops.minids.rms_norm(x, weight, 1e-6)
        wide = x.double().requires_grad_()
        (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()).backward(dy.double())
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = F.rms_norm(leaves[0], (d,), leaves[1], 1e-6)

        def ours() -> tuple[Tensor, Tensor]:
            return torch.ops.minids.rms_norm_backward(dy, x, weight, r)

        return case("RMSNorm backward", f"{m} x {d}", 6.0 * m * d, ours,
                    lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), error(ours()[0], wide.grad))  # fmt: skip

    def route() -> Case:
        logits, bias = torch.randn(m, 256, device="cuda"), torch.rand(256, device="cuda") * 0.01
        sizes = {"n_group": 8, "topk_group": 4, "k": 8, "scale": 2.5}
        weights, indices, _ = kernels.router(logits, bias, **sizes)
        exact_weights, exact_indices, _ = routing.reference(logits.double(), bias.double(), *sizes.values())
        order, exact_order = indices.argsort(-1), exact_indices.argsort(-1)
        found = error(weights.gather(-1, order), exact_weights.gather(-1, exact_order))
        shape = f"{m} x 256, 8 of 4 groups of 8"
        return case("router", shape, 8.0 * m * 256, lambda: kernels.router(logits, bias, **sizes),
                    lambda: routing.reference(logits, bias, *sizes.values()), found)  # fmt: skip

    def loss() -> Case:
        logits, labels = normal(2048, v), torch.randint(0, v, (2048,), device="cuda")
        exact = F.cross_entropy(logits[:CHECKED].double(), labels[:CHECKED], reduction="none")
        scratch = logits.clone()
        found = error(kernels.cross_entropy_(scratch, labels)[:CHECKED], exact)
        leaf = logits.clone().requires_grad_()

        def peer() -> Tensor:
            return torch.autograd.grad(F.cross_entropy(leaf.float(), labels, reduction="sum"), leaf)[0]

        # Ours overwrites its input, so it is given a fresh copy each time, which is timed and counted with it.
        return case("copy, cross entropy and gradient", f"2048 x {v}", 8.0 * 2048 * v,
                    lambda: kernels.cross_entropy_(scratch.copy_(logits), labels), peer, found)  # fmt: skip

    def gated() -> Case:
        both, weight = normal(m, 2 * WIDTH), torch.rand(m, device="cuda")
        gate, up = both.double().chunk(2, -1)
        q, s = kernels.swiglu_quantize(both, weight)
        dequantized = (q.float().unflatten(1, (-1, 128)) * s[..., None]).flatten(1)
        found = error(dequantized, F.silu(gate) * up * weight[:, None].double())

        def peer() -> tuple[Tensor, Tensor]:
            gate, up = both.chunk(2, -1)
            return kernels.quantize_tile(F.silu(gate) * up * weight[:, None].to(BF16))

        return case("SwiGLU, quantised", f"{m} x {WIDTH}", m * WIDTH * (5 + 4 / 128),
                    lambda: kernels.swiglu_quantize(both, weight), peer, found)  # fmt: skip

    return [norm, norm_backward, route, loss, gated]

