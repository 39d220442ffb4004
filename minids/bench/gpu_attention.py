"""The attention rows of `minids.bench.gpu`: MLA decoding over the paged cache, the naive attention of training and prefill.

Shapes: B rows, H heads, T tokens, C latent, R rope.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import kernels
from minids.bench.gpu_cases import BF16, Builders, Case, Limits, error, normal
from minids.kernels import latent_attention
from minids.model.attention import attend

C, R = 512, 64
DECODING = [(128, 128, 4096), (128, 128, 8192), (128, 16, 8192), (128, 1, 131072), (16, 128, 4096)]  # heads, rows, tokens
PREFILL = (128, 4096)  # heads, tokens
SCALE = 192**-0.5


def mla_decoding(limits: Limits) -> Builders:
    """One new token a row; for 16 heads the rate is that of the cache's bytes."""

    def case(h: int, b: int, length: int) -> Case:
        n_pages = length // 64
        pages, q = normal(1 + b * n_pages, 64, C + R) / 8, normal(b, h, C + R) / 8
        table = (1 + torch.randperm(b * n_pages, device="cuda", dtype=torch.int32)).view(b, n_pages)
        lengths = torch.full((b,), length, device="cuda", dtype=torch.int32)

        def ours() -> Tensor:
            return kernels.mla_decode(q, pages, table, lengths, rank=C, scale=SCALE)

        def plain() -> Tensor:  # as in the release: gather, two products and a softmax
            latent = pages[table].flatten(1, 2)
            weights = torch.softmax(torch.einsum("bhc,btc->bht", q, latent).float() * SCALE, -1).to(BF16)
            return torch.einsum("bht,btc->bhc", weights, latent[..., :C])

        candidates = {"minids": ours, "einsum": plain, "FlashInfer FA3": flashinfer_mla(q, pages, table, lengths)}
        exact = latent_attention.reference(q[:2], pages, table[:2], lengths[:2], C, SCALE)
        operations, n_bytes = 2.0 * b * length * h * (2 * C + R), 2.0 * b * length * (C + R)
        floor = max(operations / limits["bf16"], n_bytes / limits["copy"])
        unit, work = ("TB/s", n_bytes) if h < 64 else ("TFLOP/s", operations)
        return Case("MLA decoding", f"{h} heads, {b} x {length}", unit, work, floor, candidates, error(ours()[:2], exact))

    return [lambda shape=shape: case(*shape) for shape in DECODING]


def flashinfer_mla(q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
    """FlashInfer's FA3 kernel, planned at its first call, which compiles for minutes on a new machine. Raises ImportError
    there if it is not installed."""
    planned = []

    def plan() -> None:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        h, rows = q.shape[1], torch.arange(len(q) + 1, dtype=torch.int32, device="cuda")
        wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), backend="fa3")
        wrapper.plan(rows, rows * table.shape[1], table.flatten(), lengths, h, C, R, 64, False, SCALE, BF16, BF16)
        planned.append((wrapper, q[..., :C].contiguous(), q[..., C:].contiguous()))

    def run() -> Tensor:
        if not planned:
            plan()
        wrapper, q_c, q_r = planned[0]
        return wrapper.run(q_c, q_r, pages[..., :C], pages[..., C:])

    return run


def prefill_attention(limits: Limits) -> Builders:
    """Causal attention of 128 heads, keys of 192 and values of 128 numbers; only pairs that count are counted."""

    def case(backward: bool) -> Case:
        h, t = PREFILL
        q, k, v = (normal(1, h, t, width).requires_grad_(backward) for width in (192, 192, 128))
        dy = normal(1, h, t, 128)

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                padded = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 64)), is_causal=True, scale=SCALE)
            return padded[..., :128]

        def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q @ k.mT * SCALE).masked_fill(torch.ones(t, t, device="cuda").triu(1).bool(), -torch.inf)
            return scores.softmax(-1) @ v

        def step(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
            out = function(*inputs)
            return torch.autograd.grad(out, inputs, dy) if backward else (out,)

        def ours() -> tuple[Tensor, ...]:
            return step(lambda *x: attend(*x, None, SCALE), (q, k, v), dy)

        few = slice(0, 4)  # heads that are compared with FP32
        wide = tuple(x.detach()[:, few].float().requires_grad_(backward) for x in (q, k, v))
        expected = step(exact, wide, dy[:, few].float())
        found = max(error(a[:, few], b) for a, b in zip(ours(), expected, strict=True))
        work = (3.5 if backward else 1.0) * h * t * t * (192 + 128)  # backward: five products for forward's two
        candidates = {"minids": ours, "flash, v padded": lambda: step(flash, (q, k, v), dy)}
        name = f"prefill attention, forward{' + backward' if backward else ''}"
        return Case(name, f"{h} heads, {t} causal", "TFLOP/s", work, work / limits["bf16"], candidates, found)

    return [lambda: case(False), lambda: case(True)]
