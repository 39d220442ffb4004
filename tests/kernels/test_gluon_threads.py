"""The Gluon kernel of MLA decoding on the CPU (see `gluon_threads`): its sums and its barriers; and errors do show."""

import math
from pathlib import Path

import gluon_threads
import pytest
import torch
from numbers_ import error
from test_mla_decode import inputs

import minids.kernels

SOURCE = Path(minids.kernels.__file__).parent / "latent_attention_gluon.py"
CASES = [([64], 16, 1), ([640, 63, 65, 1], 64, 1), ([300, 0, 1000], 16, 1), ([130, 700], 128, 2), ([1000], 70, 3)]


def check(path, lengths, heads, splits):
    """The kernel against FP64: its parts joined, and the logarithms of its sums."""
    (q, pages, table, counts), latent = inputs(lengths, heads, 512, 64, "cpu")
    pages[0] = 0.0  # an empty row reads it; here NaN is what a copy has not filled yet
    dtype = torch.bfloat16 if splits == 1 else torch.float32
    out = torch.full((len(lengths), splits, heads, 512), torch.nan, dtype=dtype)
    sums = torch.full((len(lengths), splits, heads), torch.nan)
    gluon_threads.load(path).attend(q, pages, table, counts, out, sums, 0.3, splits)
    sums = sums.double() * math.log(2)
    out = (out.double() * sums.softmax(1).nan_to_num(0.0)[..., None]).sum(1)
    for row, keys in enumerate(latent):
        scores = 0.3 * q[row].double() @ keys.double().t()
        if not len(keys):
            assert not out[row].any()
            continue
        assert error(out[row], scores.softmax(-1) @ keys.double()[:, :512]) < 4e-3
        assert (sums[row].logsumexp(0) - scores.logsumexp(-1)).abs().max() < 1e-3


@pytest.mark.parametrize(("lengths", "heads", "splits"), CASES, ids=str)
def test_values(lengths, heads, splits):
    check(SOURCE, lengths, heads, splits)


def test_other_order(tmp_path):
    """The left half freed after the softmax."""
    late = SOURCE.read_text().replace("EARLY = gl.constexpr(True)", "EARLY = gl.constexpr(False)")
    assert late != SOURCE.read_text()
    (tmp_path / "late.py").write_text(late)
    check(tmp_path / "late.py", [640, 63, 65, 1], 64, 1)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("mbarrier.wait(empty.index(stage), phase ^ 1)\n", "\n", "changed before|is not there|arrival too many"),
        ("mbarrier.arrive(rope_empty.index(step % 2), count=1)", "pass", "deadlock"),
        ("    mbarrier.wait(left_full.index(step % 2), step // 2 & 1)\n", "\n", "is not there"),
        ("o, p = warpgroup_mma_wait(0, deps=[o, p])\n        mbarrier.arrive(left_empty.index(before), count=1)",
         "mbarrier.arrive(left_empty.index(before), count=1)\n        o, p = warpgroup_mma_wait(0, deps=[o, p])",
         "changed before"),
        ("total = total * shrink + gl.sum(weights, 1)", "total = total + gl.sum(weights, 1)", "assert"),  # not rescaled
    ],
    ids=["copy too soon", "deadlock", "early read", "freed too soon", "wrong sum"],
)  # fmt: skip
def test_errors_show(tmp_path, monkeypatch, right, wrong, message):
    source = SOURCE.read_text()
    assert right in source
    monkeypatch.setattr(gluon_threads, "LIMIT", 2.0)
    (tmp_path / "broken.py").write_text(source.replace(right, wrong))
    with pytest.raises(AssertionError, match=message):
        check(tmp_path / "broken.py", [1300, 640], 16, 1)
