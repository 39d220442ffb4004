"""The measurements of notebook 06: `python -m minids.bench kernel_ladder --json figures/bench/kernel_ladder.json`.

Six questions, one run on one GPU, so that the figures compare:

    ladder      what does each rung of `ladder_kernels` reach, beside the package's kernel, torch and the vendor's?
    limits      bytes a second from memory and from L2, operations a second of the tensor core
    waves       what do the last tiles cost? the FP8 product over M, where the number of tiles passes multiples of 132
    heads       when does MLA decoding turn from bound by memory to bound by arithmetic?
    zeros       how much faster is a product of zeros, on which no kernel should be timed?
    adding      how does the tensor core add? the error of long sums, promoted every 128 or not

Timed as in `minids.bench.gpu`: CUDA graphs, every candidate in every round in rotating order, medians. Inputs are random
numbers with outliers. Errors: quantisation, the share of results (FP8 numbers and scales) that are not the reference's;
products, ||C - exact|| / ||exact|| against FP32 from the same inputs.
"""

from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from minids import kernels
from minids.bench.common import Report
from minids.bench.gpu import measure, measure_limits, record, time_all
from minids.bench.gpu_cases import BF16, CHECKED, Case, Limits, block_scaled, error, normal
from minids.bench.ladder_kernels import PRODUCT, QUANTIZE, product, quantize, read_again
from minids.kernels import gemm_fp8, latent_attention
from minids.kernels.quantize import reference

TOKENS = (8192, 7168)  # quantised: M, K
SHAPES = [(4096, 7168, 2048), (4096, 7168, 16384)]  # products: M, N, K; the second is larger than L2
SLOW = {"one number a program"}  # measured on the first shape alone
HEADS = [8, 16, 32, 64, 128]
ROWS, CACHED = 128, 4096  # decoding: rows and tokens in the cache of each
WAVES = range(2, 29)  # row tiles of a product with 32 column tiles
SUMS = [512, 1024, 2048, 4096, 8192, 16384]


def run(rounds: int) -> Report:
    report = Report("Notebook 06: two ladders of kernels", ["ladder", "rung", "rate", "unit", "of floor", "error"], [])
    if not torch.cuda.is_available():
        report.notes.append("There is no CUDA device here: nothing was measured.")
        return report
    torch.manual_seed(0)
    limits = measure_limits(rounds) | {"l2": l2_rate(rounds)}
    ladders = [ladder(*quantize_case(limits), rounds)]
    for shape in SHAPES:
        ladders.append(ladder(*product_case(shape, limits), rounds))
        torch.cuda.empty_cache()
    report.rows = [row for entry in ladders for row in table_rows(entry)]
    report.data = {
        "limits": limits, "ladders": ladders, "waves": waves(rounds), "heads": heads(limits, rounds),
        "zeros": zeros(rounds), "adding": adding(), "triton": kernels.backend.triton.__version__,
        "multiprocessors": kernels.backend.multiprocessors(torch.device("cuda", 0)),
    }  # fmt: skip
    report.notes.append(f"limits: {', '.join(f'{name} {value:.4g}' for name, value in limits.items())}")
    for row in report.data["heads"]:
        rates = f"{row['bytes_rate']:.3g} TB/s, {row['rate']:.4g} TFLOP/s, plain kernel {row['plain_rate']:.4g} TFLOP/s"
        report.notes.append(f"MLA decoding, {row['heads']} heads: {rates}")
    report.notes.append(f"the same product, TFLOP/s: {report.data['zeros']}")
    for row in report.data["adding"]:
        report.notes.append(f"sums of {row['k']}: lost {row['lost']}")
    return report


def l2_rate(rounds: int) -> float:
    """Bytes a second that all multiprocessors read from L2: 16 MB, over and over."""
    programs, times, block = 132 * 8, 64, 4096
    x = torch.randn(1024 * block, device="cuda")
    out = torch.empty(programs * block, device="cuda")
    graph = record(lambda: read_again[(programs,)](x, out, 1024, times, block, num_warps=8))
    return programs * times * block * 4 / median(time_all({"l2": graph}, rounds)["l2"])


# ---- ladders ----

Errors = dict[str, Callable[[], float]]


def ladder(case: Case, errors: Errors, rounds: int) -> dict[str, Any]:
    """The figures of a case with the error of each candidate that has one. (The error of a rung is found first: a kernel
    that is wrong is not timed.)"""
    found = {}
    for name, call in errors.items():
        found[name] = call()
        if not found[name] < 0.1:
            raise ArithmeticError(f"{case.operation}, {name}: error {found[name]}, expected less than 0.1")
    row = measure(case, rounds)
    shares = {name: case.floor / seconds for name, seconds in row["seconds"].items()}
    return {key: row[key] for key in ("operation", "shape", "unit", "seconds", "rate", "refused")} | {
        "share_of_floor": shares, "error": found,
    }  # fmt: skip


def quantize_case(limits: Limits) -> tuple[Case, Errors]:
    x = normal(*TOKENS)
    expected = reference(x)
    n_bytes = x.numel() * (3 + 4 / 128)
    moved = torch.empty(int(n_bytes) // 4, device="cuda", dtype=BF16)  # a copy that moves as many bytes
    target = torch.empty_like(moved)
    compiled = torch.compile(reference)
    rungs = {rung.name: lambda rung=rung: quantize(rung, x) for rung in QUANTIZE}
    rungs |= {"minids": lambda: kernels.quantize_tile(x)}
    peers = {"torch": lambda: reference(x), "torch.compile": lambda: compiled(x), "copy": lambda: target.copy_(moved)}
    wrong = {name: lambda call=call: different(call(), expected) for name, call in rungs.items()}
    shape = " x ".join(map(str, TOKENS))
    return Case("quantise 1 x 128", shape, "TB/s", n_bytes, n_bytes / limits["copy"], rungs | peers, 0.0), wrong


def different(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The share of FP8 numbers and scales whose bits are not the expected ones."""
    views = torch.uint8, torch.int32
    pairs = [(f.view(v), e.view(v)) for f, e, v in zip(found, expected, views, strict=True)]
    return sum((f != e).sum().item() for f, e in pairs) / sum(e.numel() for _, e in pairs)


def product_case(shape: tuple[int, int, int], limits: Limits) -> tuple[Case, Errors]:
    m, n, k = shape
    x, w = normal(m, k), normal(n, k)
    factors = *kernels.quantize_tile(x, column_major=True), *kernels.quantize_block(w)
    exact = gemm_fp8.reference(factors[0][:CHECKED], factors[1][:CHECKED], *factors[2:])
    rungs = {
        rung.name: lambda rung=rung: product(rung, *factors)
        for rung in PRODUCT if shape == SHAPES[0] or rung.name not in SLOW
    }  # fmt: skip
    rungs |= {"minids": lambda: kernels.fp8_gemm(*factors)}
    peers = {"cuBLASLt": lambda: block_scaled(*factors, BF16, False), "cuBLAS, BF16": lambda: x @ w.t()}
    errors = {name: lambda call=call: error(call()[:CHECKED], exact) for name, call in rungs.items()}
    n_bytes = m * k * (1 + 4 / 128) + n * k + m * n * 2
    floor = max(n_bytes / limits["copy"], 2 * m * n * k / limits["fp8"])
    return Case("FP8 product", ", ".join(map(str, shape)), "TFLOP/s", 2.0 * m * n * k, floor, rungs | peers, 0.0), errors


def table_rows(entry: dict[str, Any]) -> list[list[Any]]:
    return [
        [f"{entry['operation']}, {entry['shape']}", name, entry["rate"][name], entry["unit"], entry["share_of_floor"][name],
         f"{entry['error'][name]:.1e}" if name in entry["error"] else "-"]
        for name in entry["rate"]
    ]  # fmt: skip


# ---- the other questions ----


def waves(rounds: int) -> list[dict[str, Any]]:
    """The rate of the FP8 product, 4096 outputs of 4096 inputs, for more and more rows."""
    w = kernels.quantize_block(normal(4096, 4096))
    found = []
    for tiles in WAVES:
        x = kernels.quantize_tile(normal(128 * tiles, 4096), column_major=True)
        calls = {"minids": lambda x=x: kernels.fp8_gemm(*x, *w), "cuBLASLt": lambda x=x: block_scaled(*x, *w, BF16, False)}
        times = time_all({name: record(call) for name, call in calls.items()}, min(rounds, 3))
        work = 2 * 128 * tiles * 4096**2
        found.append({"rows": 128 * tiles, "tiles": 32 * tiles} | {n: work / median(t) / 1e12 for n, t in times.items()})
    return found


def heads(limits: Limits, rounds: int) -> list[dict[str, Any]]:
    """MLA decoding with more and more heads on the same cache: the package's choice, and the plain Triton kernel."""
    slots, latent, rope = 64, 512, 64
    pages = normal(ROWS * CACHED // slots, slots, latent + rope)
    order = torch.randperm(len(pages), device="cuda").int().view(ROWS, -1)
    lengths = torch.full((ROWS,), CACHED, device="cuda", dtype=torch.int32)
    found = []
    for h in HEADS:
        q = normal(ROWS, h, latent + rope) / 8
        call = lambda q=q: kernels.mla_decode(q, pages, order, lengths, rank=latent, scale=192**-0.5)  # noqa: E731
        calls = {"minids": record(call)}
        with patch.object(latent_attention, "gluon_applies", lambda q, rank: False):
            calls["plain"] = record(call)
        times = time_all(calls, rounds)
        seconds, plain = median(times["minids"]), median(times["plain"])
        work, n_bytes = 2.0 * ROWS * CACHED * h * (2 * latent + rope), 2.0 * pages.numel()
        floor = max(n_bytes / limits["copy"], work / limits["bf16"])
        found.append({
            "heads": h, "rate": work / seconds / 1e12, "bytes_rate": n_bytes / seconds / 1e12,
            "intensity": work / n_bytes, "share_of_floor": floor / seconds, "plain_rate": work / plain / 1e12,
        })  # fmt: skip
    return found


def zeros(rounds: int) -> dict[str, float]:
    """The rate of one FP8 product of random numbers and of zeros."""
    m, n, k = SHAPES[1]
    w = kernels.quantize_block(normal(n, k))
    factors = {"random": (*kernels.quantize_tile(normal(m, k), column_major=True), *w)}
    factors["zeros"] = tuple(torch.zeros_like(t) for t in factors["random"])
    calls = {name: record(lambda f=f: kernels.fp8_gemm(*f)) for name, f in factors.items()}
    return {name: 2 * m * n * k / median(t) / 1e12 for name, t in time_all(calls, 3 * rounds).items()}


def adding() -> list[dict[str, Any]]:
    """The mean of (exact - sum) / exact over sums of K products of numbers from 0 to 1: within the tensor core ("fast"
    accumulation), with the vendor's promotion, and with ours. A way that torch refuses is left out."""
    one, fp32 = torch.ones((), device="cuda"), torch.float32
    found = []
    for k in SUMS:
        a, b = (torch.rand(256, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        ones_a = torch.ones(k // 128, 256, device="cuda").t()
        ones_b = torch.ones(2, k // 128, device="cuda")
        exact = a.double() @ b.double().t()
        ways = {
            "tensor core": lambda a=a, b=b: torch._scaled_mm(a, b.t(), one, one, out_dtype=fp32, use_fast_accum=True),
            "cuBLAS, promoted": lambda a=a, b=b: torch._scaled_mm(a, b.t(), one, one, out_dtype=fp32),
            "minids": lambda a=a, b=b, s=ones_a, t=ones_b: kernels.fp8_gemm(a, s, b, t, out_dtype=fp32),
        }
        lost = {}
        for name, call in ways.items():
            try:
                lost[name] = ((exact - call().double()) / exact).mean().item()
            except (RuntimeError, ValueError):
                continue
        found.append({"k": k, "lost": lost})
    return found
