"""MLA decoding over pages against attention written out in FP64, row by row."""

import pytest
import torch
from numbers_ import error, tame

from minids.kernels import latent_attention, mla_decode

BF16 = torch.bfloat16


def inputs(lengths, heads, rank, rope, device, slots=64):
    """Rows of these lengths on shuffled pages. The page of nobody, 0, which unused entries of the table name, holds NaN."""
    per_row = [-(-n // slots) for n in lengths]
    order = 1 + torch.randperm(sum(per_row), generator=torch.Generator().manual_seed(0)).int()
    table = torch.zeros(len(lengths), max(per_row) + 1, dtype=torch.int32)
    latent = [tame(n, rank + rope, "cpu", seed, BF16) / 4 for seed, n in enumerate(lengths)]
    pages = torch.full((1 + sum(per_row), slots, rank + rope), torch.nan, dtype=BF16)
    for row, (n, mine) in enumerate(zip(lengths, order.split(per_row), strict=True)):
        table[row, : len(mine)] = mine
        for j in range(n):
            pages[mine[j // slots], j % slots] = latent[row][j]
    pages[1:] = pages[1:].nan_to_num(1e4)  # slots that do not count: finite, as a cache is, but far from anything
    q = tame(len(lengths) * heads, rank + rope, "cpu", 7, BF16).view(len(lengths), heads, -1) / 4
    return [t.to(device) for t in (q, pages, table, torch.tensor(lengths, dtype=torch.int32))], latent


@pytest.mark.parametrize(
    ("lengths", "heads"), [([1], 16), ([64, 65, 1, 300], 4), ([130, 0, 63], 70), ([700], 128)], ids=str
)
def test_values(where, lengths, heads):
    backend, device = where
    (q, pages, table, counts), latent = inputs(lengths, heads, 32, 16, device)
    out = mla_decode(q, pages, table, counts, rank=32, scale=0.3, backend=backend)
    for row, keys in enumerate(latent):
        if not len(keys):
            assert not out[row].any()
            continue
        weights = (0.3 * q[row].cpu().double() @ keys.double().t()).softmax(-1)
        assert error(out[row].cpu(), weights @ keys.double()[:, :32]) < 6e-3


def test_published_sizes(kernel):
    (q, pages, table, counts), latent = inputs([130], 16, 512, 64, kernel)
    out = mla_decode(q, pages, table, counts, rank=512, scale=0.07, backend="triton")
    weights = (0.07 * q[0].cpu().double() @ latent[0].double().t()).softmax(-1)
    assert error(out[0].cpu(), weights @ latent[0].double()[:, :512]) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [([64], 128), ([640, 63, 65, 1], 128), ([300, 0, 1000], 16), ([4099], 16), ([130, 2000], 70)], ids=str,
)
def test_gluon(lengths, heads):
    """The kernel of the published sizes, which Triton's interpreter cannot run: whole rows, and rows in 1 to 65 parts."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    (q, pages, table, counts), latent = inputs(lengths, heads, 512, 64, "cuda")
    assert latent_attention.gluon_applies(q, 512)
    out = mla_decode(q, pages, table, counts, rank=512, scale=0.07)
    for row, keys in enumerate(latent):
        if not len(keys):
            assert not out[row].any()
            continue
        weights = (0.07 * q[row].cpu().double() @ keys.double().t()).softmax(-1)
        assert error(out[row].cpu(), weights @ keys.double()[:, :512]) < 6e-3


@pytest.mark.parametrize(("splits", "rank"), [(2, 512), (5, 32), (33, 16), (64, 512), (100, 128)])
def test_join(kernel, splits, rank):
    """Parts of rows against their mean in FP64; a part in which no token counts, and a row of such parts."""
    parts, sums = tame(2 * splits * 3, rank, kernel, 0).view(2, splits, 3, rank), tame(2 * splits, 3, kernel, 1) * 4
    sums = sums.view(2, splits, 3)
    sums[0, 1], sums[1, :, 2] = -torch.inf, -torch.inf
    parts[sums == -torch.inf] = 0.0  # as the kernels leave them
    out = torch.full((2, 3, rank), torch.nan, dtype=BF16, device=kernel)
    latent_attention.join(parts, sums, out)
    weights = (sums.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))).softmax(1).nan_to_num(0.0)
    assert error(out, (weights[..., None] * parts.double()).sum(1)) < 3e-3
    assert not out[1, 2].any()


@pytest.mark.parametrize(
    ("rows", "heads", "pages", "splits"),
    [(128, 128, 64, 1), (16, 128, 128, 4), (1, 128, 2048, 64), (128, 16, 64, 1), (1, 16, 1, 1), (1, 16, 3, 1)],
)
def test_splits(rows, heads, pages, splits):
    """The published cases on 132 multiprocessors: one wave that is nearly full, and no parts where rows fill the device."""
    assert latent_attention.splits_for(rows, heads, pages, 132) == splits


def test_bad_input():
    (q, pages, table, counts), _ = inputs([70, 3], 4, 32, 16, "cpu")
    for args, rank, exception, message in [
        ((q.float(), pages, table, counts), 32, TypeError, "q: got dtype torch.float32, expected torch.bfloat16"),
        ((q, pages, table.long(), counts), 32, TypeError, "table: got dtype torch.int64, expected torch.int32"),
        ((q, pages, table, counts[:1]), 32, ValueError, r"lengths: got shape \(1,\), expected \(2,\)"),
        ((q, pages, table, counts), 48, ValueError, "rank, q, pages: got 48"),
        ((q, pages.transpose(0, 1), table, counts), 32, ValueError, "pages: got strides"),
    ]:
        with pytest.raises(exception, match=message):
            mla_decode(*args, rank=rank, scale=1.0)
    with pytest.raises(ValueError, match="scale: got 0.0, expected a positive number"):
        mla_decode(q, pages, table, counts, rank=32, scale=0.0)


def test_sizes_that_the_kernel_cannot_take(kernel):
    (q, pages, table, counts), _ = inputs([70], 4, 32, 16, kernel, slots=32)
    with pytest.raises(ValueError, match="pages: got 32 slots a page, C = 32, R = 16; expected 64"):
        mla_decode(q, pages, table, counts, rank=32, scale=1.0, backend="triton")


def test_registered(kernel):
    (q, pages, table, counts), _ = inputs([70], 4, 32, 16, kernel)
    args = (q, pages, table, counts, 32, 1.0)
    torch.library.opcheck(torch.ops.minids.mla_decode.default, args, test_utils=("test_schema", "test_faketensor"))
