"""The grouped products' Gluon kernel on the CPU (see `gluon_threads`): its tiles, its barriers; and errors do show."""

import sys
from pathlib import Path
from unittest.mock import patch

import gluon_threads
import pytest
import torch
from numbers_ import error, tame

import minids.kernels
from minids.kernels import grouped
from minids.kernels.activation import reference as swiglu_reference

BF16 = torch.bfloat16
SOURCE = Path(minids.kernels.__file__).parent
EARLY = "changed before|is not there|arrival too many"
FILES = ("grouped_gluon_tiles", "grouped_gluon")
# Where the experts' rows end, N and K: empty experts, single rows, tiles that end in their first or second half.
CASES = [
    ([0, 70, 70, 200], 136, 72), ([1, 2, 3, 133], 264, 64), ([64, 128, 200, 200], 8, 8), ([129, 130, 300], 512, 320),
]  # fmt: skip


def load(folder):
    tiles = gluon_threads.load(folder / f"{FILES[0]}.py")
    with patch.dict(sys.modules, {f"minids.kernels.{FILES[0]}": tiles}):
        return gluon_threads.load(folder / f"{FILES[1]}.py")


def tiles_of(ends):
    """What `grouped.find_tiles` makes on a device."""
    ends = ends.tolist()
    tiles = [(e, row, end) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
             for row in range(start, end, 128)]  # fmt: skip
    most = -(-ends[-1] // 128) + len(ends)
    beyond = [(len(ends), 0, 0)] * (most - len(tiles) - 1)
    return torch.tensor([*tiles, *beyond, (len(ends) + len(tiles), 0, 0)], dtype=torch.int32)


def check_forward(kernels, ends, n, k, n_major=False):
    k = -(-k // 64) * 64 if n_major else k
    x, w = tame(ends[-1], k, "cpu", dtype=BF16), tame(len(ends) * n, k, "cpu", 1, BF16).view(-1, n, k)
    ends = torch.tensor(ends, dtype=torch.int32)
    expected = grouped.reference(x, w, ends)
    w = w.transpose(1, 2).contiguous().transpose(1, 2) if n_major else w
    assert error(kernels.gemm(x, w, ends, tiles_of(ends)), expected) < 3e-3


def check_wgrad(kernels, ends, n, k, out_dtype=BF16):
    """Also with infinities in the last expert's first row, which no other expert may notice."""
    dy, x = tame(ends[-1], n, "cpu", dtype=BF16), tame(ends[-1], k, "cpu", 1, BF16)
    ends = torch.tensor(ends, dtype=torch.int32)
    expected = grouped.wgrad_reference(dy, x, ends, out_dtype)
    assert error(kernels.wgrad(dy, x, ends, out_dtype), expected) < 3e-3
    dy[ends[-2]:, 0] = x[ends[-2]:, 0] = torch.inf
    assert error(kernels.wgrad(dy, x, ends, out_dtype)[:-1], expected[:-1]) < 3e-3


@pytest.fixture(scope="module")
def kernels():
    return load(SOURCE)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("n_major", [False, True], ids=["k_major", "n_major"])
def test_forward(kernels, case, n_major):
    check_forward(kernels, *case, n_major)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
def test_weight_gradient(kernels, case, out_dtype):
    check_wgrad(kernels, *case, out_dtype)


@pytest.mark.parametrize("keep", [False, True])
def test_swiglu(kernels, keep):
    x, w = tame(200, 136, "cpu", dtype=BF16), tame(3 * 256, 136, "cpu", 1, BF16).view(3, 256, 136) / 16
    gates, ends = tame(1, 200, "cpu", 2)[0], torch.tensor([70, 70, 200], dtype=torch.int32)
    h, z = kernels.swiglu_up(x, w, ends, tiles_of(ends), gates, keep)
    expected = grouped.reference(x, w, ends)
    assert error(h, swiglu_reference(expected, gates)) < 5e-3
    assert z.shape == (200 if keep else 0, 256) and (not keep or error(z, expected) < 3e-3)


@pytest.mark.parametrize(
    ("file", "right", "wrong", "run", "message"),
    [
        (1, "mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)", "pass", check_forward, EARLY),
        (1, "count=1, pred=k > 0)", "count=1, pred=k > 1)", check_forward, "deadlock"),
        (1, "mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)",
         "mbarrier.arrive(empty.index(step % STAGES), count=1)", check_forward, EARLY),
        (1, "    clear(b_buffers.index(stage).slice(PART * 128, 128, dim=1), rest)\n", "", check_wgrad, "assert"),
        (1, "    mbarrier.wait(cleared, clearings & 1)\n", "", check_wgrad, "changed before|assert"),
        (0, "elif row + 64 <= end:", "elif row <= end:", check_forward, "assert"),
        (1, "mbarrier.wait(given.index(turn % 2), turn // 2 & 1)", "pass", check_forward, "assert|deadlock|too many"),
        (1, "mbarrier.arrive(taken.index(turn % 2), count=1)", "pass", check_forward, "deadlock"),
    ],
    ids=["race", "deadlock", "passed on too early", "next expert's rows", "not cleared yet", "rows overwritten",
         "number not there yet", "place never free"],
)  # fmt: skip
def test_errors_show(tmp_path, monkeypatch, file, right, wrong, run, message):
    monkeypatch.setattr(gluon_threads, "LIMIT", 2.0)
    for i, name in enumerate(FILES):
        source = (SOURCE / f"{name}.py").read_text()
        assert i != file or source.count(right) == 1
        (tmp_path / f"{name}.py").write_text(source.replace(right, wrong) if i == file else source)
    with pytest.raises(AssertionError, match=message):
        for _ in range(5):  # a race is not lost every time
            run(load(tmp_path), [70, 300], 264, 456)
