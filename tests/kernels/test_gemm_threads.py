"""The FP8 products' Gluon kernel on the CPU (see `gluon_threads`): its sums and its barriers; and errors do show."""

import sys
from pathlib import Path
from unittest.mock import patch

import gluon_threads
import pytest
import torch
from numbers_ import error, tame

import minids.kernels
from minids.kernels import gemm_fp8, grouped_fp8, quantize_block, quantize_tile, quantize_tile_t

SOURCE = Path(minids.kernels.__file__).parent / "gemm_fp8_gluon.py"
FEW = SOURCE.with_name("gemm_fp8_few.py")
# Consumers, products a turn, buffers, rows of tiles in a group: each way through the kernel.
CUTS = [(2, 4, 5, 8), (2, 8, 4, 1), (2, 2, 3, 8), (3, 1, 4, 2)]
ENDS = [0, 256, 256, 1152, 1280]


def check_dense(kernels, cut, rows=False, shape=(333, 264, 1152)):
    m, n, k = shape
    a, w = quantize_tile(tame(m, k, "cpu")), tame(n, k, "cpu", 1)
    b = quantize_tile(w, column_major=True) if rows else quantize_block(w)
    out = kernels.gemm(*a, *b, torch.float32, kernels.Cut(*cut))
    assert error(out, gemm_fp8.reference(*a, *b)) < 1e-6


def check_wgrad(kernels, cut, n=192):
    dy, x = (quantize_tile_t(tame(ENDS[-1], width, "cpu", width), column_major=True) for width in (n, 136))
    ends = torch.tensor(ENDS, dtype=torch.int32)
    out = kernels.grouped_wgrad(*dy, *x, ends, kernels.Cut(*cut))
    assert error(out, grouped_fp8.wgrad_reference(*dy, *x, ends)) < 1e-6


def load_few(kernels, path):
    with patch.dict(sys.modules, {"minids.kernels.gemm_fp8_gluon": kernels}):
        return gluon_threads.load(path)


def check_few(few, shape):
    """Products are small: while the additions of one wait there are registers for five more. Still nothing may be lost."""
    m, n, k = shape
    a, b = quantize_tile(tame(m, k, "cpu"), column_major=True), quantize_block(tame(n, k, "cpu", 1))
    with patch.object(gluon_threads, "BESIDES", 5):
        assert error(few.gemm(*a, *b), gemm_fp8.reference(*a, *b)) < 2e-3  # half a place of BF16, in the mean


def broken(source: Path, folder: Path, right: str, wrong: str) -> Path:
    """A copy of a kernel's file with a line made wrong."""
    text = source.read_text()
    assert text.count(right) == 1
    path = folder / "broken.py"
    path.write_text(text.replace(right, wrong))
    return path


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN: what is not written shows."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, shape, dtype: torch.full(shape, torch.nan, dtype=dtype))


@pytest.fixture(scope="module")
def kernels():
    return gluon_threads.load(SOURCE)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["block", "rows"])
def test_dense(kernels, cut, rows):
    check_dense(kernels, cut, rows)


@pytest.mark.parametrize(
    ("shape", "consumers"),
    [((4096, 2112, 7168), 3), ((4096, 24576, 1536), 2), ((4096, 32768, 512), 3), ((4096, 7168, 16384), 2),
     ((4096, 4096, 7168), 2), ((4096, 7168, 2048), 2)],
)  # fmt: skip
def test_choice(kernels, shape, consumers):
    """The faster of both tiles, as measured, for the six prefill shapes of the benchmark on 132 multiprocessors."""
    assert kernels.cut_for(*shape, 132).consumers == consumers


def test_one_block_of_k(kernels):
    check_dense(kernels, CUTS[0], shape=(140, 136, 128))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_weight_gradient(kernels, cut):
    """An expert's last tile reaches beyond its 192 rows."""
    check_wgrad(kernels, cut)


def test_grouped(kernels):
    a = quantize_tile(tame(ENDS[-1], 384, "cpu"), column_major=True)
    b = quantize_block(tame(5 * 192, 384, "cpu", 1).view(5, 192, 384))
    tiles = [(e, row, end) for e, (start, end) in enumerate(zip([0, *ENDS[:-1]], ENDS, strict=True))
             for row in range(start, end, 128)]  # fmt: skip
    tiles = torch.tensor(tiles + [(5, 0, 0)] * 3, dtype=torch.int32)
    out = kernels.grouped(*a, *b, tiles, torch.float32)
    ends = torch.tensor(ENDS, dtype=torch.int32)
    assert error(out, grouped_fp8.reference(*a, *b, ends, torch.float32)) < 1e-6


@pytest.mark.parametrize(
    ("right", "wrong", "run", "cut", "message"),
    [
        ("mbarrier.wait(empty.index(stage), phase ^ 1)", "pass", check_dense, CUTS[0],
         "changed|is not there|too many|under way"),
        ("mbarrier.init(empty.index(stage), count=CONSUMERS)", "mbarrier.init(empty.index(stage), count=CONSUMERS + 1)",
         check_dense, CUTS[0], "deadlock"),
        ("mbarrier.init(empty.index(stage), count=CONSUMERS)", "mbarrier.init(empty.index(stage), count=1)", check_dense,
         CUTS[3], "changed|is not there|too many|under way"),
        ("mbarrier.wait(full.index(stage), step // STAGES & 1)", "pass", check_dense, CUTS[3], "is not there"),
        ("product = warpgroup_mma_wait(1, deps=[ahead])", "product = ahead", check_dense, CUTS[0], "Error"),
        ("b_scales + (i + 1) * b_stride_k", "b_scales + i * b_stride_k", check_dense, CUTS[0], "assert"),
        ("if KIND != \"wgrad\" or a_row + PART * 64 < M:", "if True:", check_wgrad, CUTS[0], "assert"),
        ("STAGES * phase", "0", check_dense, CUTS[3], "a read may be under way"),
    ],
    ids=["race", "deadlock", "passed on too early", "not there yet", "under way", "next block's scale",
         "next expert's rows", "reads under way"],
)  # fmt: skip
def test_errors_show(tmp_path, monkeypatch, right, wrong, run, cut, message):
    monkeypatch.setattr(gluon_threads, "LIMIT", 2.0)
    path = broken(SOURCE, tmp_path, right, wrong)
    with pytest.raises(AssertionError, match=message):
        for _ in range(8):  # a race need not show at once
            run(gluon_threads.load(path), cut)


# Tiles for a multiprocessor each (of 4 pretended ones), for two each, and more; whole turns of products, and 1 to 3 left.
@pytest.mark.parametrize("shape", [(128, 128, 2048), (121, 248, 1152), (64, 776, 1664), (1, 8, 896)], ids=str)
def test_few_rows(kernels, shape):
    check_few(load_few(kernels, FEW), shape)


@pytest.mark.parametrize(
    ("right", "wrong", "shape", "message"),
    [
        ("mbarrier.wait(empty.index(stage), phase ^ 1)", "pass", (64, 520, 1664),
         "changed|is not there|too many|under way"),
        ("scales = as_buffers.index(stage + STAGES * phase)", "scales = as_buffers.index(stage)", (64, 520, 1664),
         "a read may be under way"),
        ("mbarrier.wait(full.index(stage), step // STAGES & 1)", "pass", (128, 128, 2048), "is not there"),
        ("b_scales + (i + 1) * b_stride_k", "b_scales + i * b_stride_k", (128, 128, 2048), "assert"),
        ("b_row // 128 * b_stride_n", "b_row // 64 * b_stride_n", (64, 128, 512), "assert|index"),
        ("range(end % TURN)", "range(0)", (1, 8, 896), "assert"),
    ],
    ids=["race", "reads under way", "not there yet", "next block's scale", "another column's scale", "steps left out"],
)  # fmt: skip
def test_errors_show_for_few_rows(kernels, tmp_path, monkeypatch, right, wrong, shape, message):
    monkeypatch.setattr(gluon_threads, "LIMIT", 2.0)
    path = broken(FEW, tmp_path, right, wrong)
    with pytest.raises((AssertionError, IndexError), match=message):
        for _ in range(8):
            check_few(load_few(kernels, path), shape)
