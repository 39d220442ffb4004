"""The layers of `minids.bench.gpu`: MoE forward, MLA decoding, and the small operations (see `gpu_cases`).

Shapes: T tokens, E experts, V vocabulary, B rows, H heads, C latent, R rope.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import kernels
from minids.bench.gpu_cases import (
    BF16,
    CHECKED,
    CHOSEN,
    EXPERTS,
    HIDDEN,
    TOKENS,
    WIDTH,
    Builders,
    Case,
    Limits,
    error,
    normal,
)  # fmt: skip
from minids.kernels import latent_attention, routing
from minids.model.moe import plan_dispatch
from minids.model.router import Routing

DECODING = [(128, 128, 4096), (128, 128, 8192), (128, 16, 8192), (16, 128, 4096)]  # heads, rows, tokens of peers.md


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


def mla_decoding(limits: Limits) -> Builders:
    """One new token a row over the paged cache of the published sizes."""
    c, r = 512, 64

    def case(h: int, b: int, length: int) -> Case:
        n_pages = length // 64
        pages, q = normal(1 + b * n_pages, 64, c + r) / 8, normal(b, h, c + r) / 8
        table = (1 + torch.randperm(b * n_pages, device="cuda", dtype=torch.int32)).view(b, n_pages)
        lengths = torch.full((b,), length, device="cuda", dtype=torch.int32)
        scale = 192**-0.5

        def ours() -> Tensor:
            return kernels.mla_decode(q, pages, table, lengths, rank=c, scale=scale)

        def plain() -> Tensor:  # as in the release: gather, two products and a softmax
            latent = pages[table].flatten(1, 2)
            weights = torch.softmax(torch.einsum("bhc,btc->bht", q, latent).float() * scale, -1).to(BF16)
            return torch.einsum("bht,btc->bhc", weights, latent[..., :c])

        candidates = {"minids": ours, "einsum": plain} | flashinfer_mla(q, pages, table, lengths, c, scale)
        exact = latent_attention.reference(q[:2], pages, table[:2], lengths[:2], c, scale)
        work = 2.0 * b * length * h * (2 * c + r)
        floor = max(work / limits["bf16"], 2.0 * b * length * (c + r) / limits["copy"])
        found = error(ours()[:2], exact)
        return Case("MLA decoding", f"{h} heads, {b} x {length}", "TFLOP/s", work, floor, candidates, found)

    return [lambda shape=shape: case(*shape) for shape in DECODING]


def flashinfer_mla(
    q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, c: int, scale: float
) -> dict[str, Callable[[], Tensor]]:
    """FlashInfer's FA3 kernel, if it is installed."""
    try:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper
    except ImportError:
        return {}
    b, h, d = q.shape
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), backend="fa3")
    rows = torch.arange(b + 1, dtype=torch.int32, device="cuda")
    wrapper.plan(rows, rows * table.shape[1], table.flatten(), lengths, h, c, d - c, 64, False, scale, BF16, BF16)
    q_c, q_r = q[..., :c].contiguous(), q[..., c:].contiguous()
    return {"FlashInfer FA3": lambda: wrapper.run(q_c, q_r, pages[..., :c], pages[..., c:])}
