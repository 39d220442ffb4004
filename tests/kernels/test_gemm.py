"""The FP8 products against their reference, and the reference against the plain product of dequantised matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_ import error, tame

from minids import fp8
from minids.kernels import fp8_gemm, gemm_fp8, quantize_block, quantize_tile
from minids.kernels.backend import multiprocessors

# Kernels multiply E4M3 exactly and sum in FP32; the tensor core keeps about 14 bits of a sum over 128.
TOLERANCE = {"cpu": 1e-6, "cuda": 1e-3}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 4e-3}


def factors(m, n, k, device, rows=False, column_major=True):
    a = quantize_tile(tame(m, k, device), column_major=column_major, backend="torch")
    w = tame(n, k, device, seed=1)
    b = quantize_tile(w, column_major=column_major, backend="torch") if rows else quantize_block(w, backend="torch")
    return (*a, *b)


@settings(max_examples=20)
@given(m=st.integers(1, 40), n=st.integers(1, 200), k=st.integers(1, 300), rows=st.booleans())
def test_reference_is_the_product_of_what_the_factors_stand_for(m, n, k, rows):
    a, a_scale, b, b_scale = factors(m, n, k, "cpu", rows)
    if len(b_scale) == n == 1:
        rows = True
    left = fp8.dequantize(a, a_scale, (1, 128), torch.float64)
    right = fp8.dequantize(b, b_scale, (1, 128) if rows else 128, torch.float64)
    assert error(fp8_gemm(a, a_scale, b, b_scale, out_dtype=torch.float32, backend="torch"), left @ right.t()) < 1e-6


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["block", "rows"])
@pytest.mark.parametrize("shape", [(5, 72, 304), (130, 8, 16), (64, 264, 256), (200, 136, 1040), (1, 1, 16)], ids=str)
def test_kernel_equals_reference(kernel, shape, rows, out_dtype):
    args = factors(*shape, kernel, rows)
    out = fp8_gemm(*args, out_dtype=out_dtype, backend="triton")
    assert out.dtype == out_dtype
    assert error(out, gemm_fp8.reference(*args, torch.float32)) < TOLERANCE[kernel] + ROUNDING[out_dtype]


@pytest.mark.parametrize("config", [(64, 64, 8, 3, 4, 3), (128, 64, 2, 1, 4, 3), (64, 128, 1, 2, 4, 2)], ids=str)
def test_every_cut_gives_the_same(kernel, config):
    args = factors(200, 200, 656, kernel, column_major=False)
    out = gemm_fp8.launch(*args, torch.float32, gemm_fp8.Config(*config))
    assert error(out, gemm_fp8.reference(*args)) < TOLERANCE[kernel]


def test_rows_may_be_padded(kernel):
    a, a_scale, b, b_scale = factors(40, 48, 100, kernel)
    a, b = (torch.nn.functional.pad(q.view(torch.uint8), (0, 28)).view(q.dtype)[:, :100] for q in (a, b))
    out = fp8_gemm(a, a_scale, b, b_scale, out_dtype=torch.float32, backend="triton")
    assert error(out, gemm_fp8.reference(a, a_scale, b, b_scale)) < TOLERANCE[kernel]


def test_no_rows(where):
    backend, device = where
    out = fp8_gemm(*factors(1, 48, 128, device, column_major=False), backend=backend)
    assert out.shape == (1, 48)
    a, a_scale, b, b_scale = factors(1, 48, 128, device, column_major=False)
    assert fp8_gemm(a[:0], a_scale[:0], b, b_scale, backend=backend).shape == (0, 48)


def test_bad_input():
    a, a_scale, b, b_scale = factors(4, 200, 256, "cpu")
    for args, exception, message in [
        ((a.float(), a_scale, b, b_scale), TypeError, "a: got dtype torch.float32, expected torch.float8_e4m3fn"),
        ((a, a_scale.double(), b, b_scale), TypeError, "a_scale: got dtype torch.float64"),
        ((a, a_scale, b[:, :128], b_scale), ValueError, r"a, b: got shapes \(4, 256\) and \(200, 128\)"),
        ((a, a_scale[:3], b, b_scale), ValueError, r"a_scale: got shape \(3, 2\), expected \(4, 2\)"),
        ((a, a_scale, b, b_scale[:1]), ValueError, r"b_scale: got shape \(1, 2\), expected \(2, 2\) or \(200, 2\)"),
    ]:
        with pytest.raises(exception, match=message):
            fp8_gemm(*args)
    with pytest.raises(TypeError, match="out_dtype: got torch.float16"):
        fp8_gemm(a, a_scale, b, b_scale, out_dtype=torch.float16)


def test_rows_that_the_copy_engine_cannot_read(kernel):
    with pytest.raises(ValueError, match=r"a: got strides \(100, 1\) .* expected contiguous rows .* multiples of 16"):
        fp8_gemm(*factors(4, 48, 100, kernel), backend="triton")


def test_registered(kernel):
    args = (*factors(20, 48, 128, kernel), torch.bfloat16)
    torch.library.opcheck(torch.ops.minids.fp8_gemm.default, args, test_utils="test_faketensor")


def test_compile_sees_one_operation(kernel):
    args = factors(20, 48, 128, kernel)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(lambda *t: fp8_gemm(*t, backend="triton") * 2, backend=backend, fullgraph=True)
    assert torch.equal(compiled(*args), fp8_gemm(*args, backend="triton") * 2)
    assert len(graphs) == 1 and sum("minids" in target for target in graphs[0]) == 1, graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", [(4096, 2112, 7168), (129, 4096, 512), (333, 656, 896), (4096, 576, 7168)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large(shape, out_dtype):
    """Poisoned outputs: every element is written; twice the same bits."""
    args = factors(*shape, "cuda")
    torch.empty(64 << 20, device="cuda").fill_(torch.nan)
    out = fp8_gemm(*args, out_dtype=out_dtype)
    assert error(out, gemm_fp8.reference(*args)) < 1e-3 + ROUNDING[out_dtype]
    assert torch.equal(out, fp8_gemm(*args, out_dtype=out_dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rows", [False, True], ids=["block", "rows"])
@pytest.mark.parametrize("column_major", [False, True], ids=["row-major", "column-major"])
@pytest.mark.parametrize("shape", [(4096, 2112, 384), (1000, 1032, 2960), (150, 128, 128), (3000, 1024, 1152)], ids=str)
def test_any_number_of_blocks(shape, column_major, rows):
    """1, 3, 9 and 24 blocks of K: whole turns of products and what is left; scales in both orders."""
    args = factors(*shape, "cuda", rows, column_major)
    torch.empty(64 << 20, device="cuda").fill_(torch.nan)
    out = fp8_gemm(*args, out_dtype=torch.float32)
    assert error(out, gemm_fp8.reference(*args)) < 1e-3
    assert torch.equal(out, fp8_gemm(*args, out_dtype=torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_scales_that_the_copy_engine_cannot_read():
    """A part of larger factors, whose scales start between two multiples of 16 bytes: they are copied first."""
    a, a_scale, b, b_scale = factors(340, 264, 640, "cuda", rows=True)
    args = (a[1:], a_scale[1:], b, b_scale)
    assert a_scale[1:].stride(0) == 1 and a_scale[1:].data_ptr() % 16
    assert error(fp8_gemm(*args, out_dtype=torch.float32), gemm_fp8.reference(*args)) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: reads and copies that run at the same time")
@pytest.mark.parametrize("rows", [False, True], ids=["block", "rows"])
@pytest.mark.parametrize("k", [384, 512, 1536])
def test_every_row_every_time(k, rows):
    """Short sums end often, and a buffer that is passed on too early shows in a few rows of some calls: far too little
    for the norm of the whole."""
    args = factors(16384, 4096, k, "cuda", rows)
    dtype = torch.float32 if rows else torch.bfloat16
    out = fp8_gemm(*args, out_dtype=dtype)
    assert all(torch.equal(fp8_gemm(*args, out_dtype=dtype), out) for _ in range(20))
    expected = gemm_fp8.reference(*args)
    assert ((out - expected).norm(dim=1) / expected.norm(dim=1)).max() < 5e-3


@pytest.mark.parametrize(
    ("shape", "chosen"),
    [((128, 4096, 7168), True), ((121, 7168, 2048), True), ((64, 7168, 16384), True), ((64, 24576, 1536), False),
     ((64, 4096, 7168), False), ((128, 4096, 1920), False), ((129, 4096, 7168), False)],
)  # fmt: skip
def test_choice_for_few_rows(monkeypatch, shape, chosen):
    """On 132 multiprocessors: one or two tiles of 64 x 64 for each, and a long K."""
    monkeypatch.setattr(gemm_fp8, "capability", lambda device: (9, 0))
    m, n, k = shape
    a, b = torch.empty(m, k, device="meta"), torch.empty(n, k, device="meta")
    a_scale, b_scale = (torch.empty(k // 128, rows, device="meta").t() for rows in (m, n // 128))
    assert gemm_fp8.prefers_few(a, a_scale, b, b_scale, torch.bfloat16, 132) == chosen
    assert not gemm_fp8.prefers_few(a, a_scale, b, b_scale, torch.float32, 132)
    assert not gemm_fp8.prefers_few(a, a_scale.contiguous(), b, b_scale, torch.bfloat16, 132)
    assert not gemm_fp8.prefers_few(a, a_scale, b, torch.empty(n, k // 128), torch.bfloat16, 132)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", [(128, 4096, 7168), (121, 7104, 2048), (64, 7168, 2192), (5, 8200, 16384)], ids=str)
def test_few_rows(shape):
    """Poisoned outputs: every element is written; every row is right; the same bits every time."""
    args = factors(*shape, "cuda")
    assert gemm_fp8.prefers_few(args[0], args[1], args[2], args[3], torch.bfloat16, multiprocessors(args[0].device))
    torch.empty(64 << 20, device="cuda").fill_(torch.nan)
    out = fp8_gemm(*args)
    assert all(torch.equal(fp8_gemm(*args), out) for _ in range(20))
    expected = gemm_fp8.reference(*args)
    assert ((out - expected).norm(dim=1) / expected.norm(dim=1)).max() < 5e-3
