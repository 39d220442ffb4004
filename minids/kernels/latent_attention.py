"""MLA decoding over the paged latent cache: absorbed, split along the sequence, rows of any length (V3 section 2.1.1).

    score[h, j] = scale (q_c[h] . c[j] + q_r[h] . k_r[j])        out[h] = sum_j softmax_j(score[h]) c[j]

With W_UK multiplied into the query and W_UV left for afterwards, all heads share one key and value, the latent [c ; k_r],
and the value is the key's first C numbers. So a page is read once for a block of heads and used twice: 128 heads do
2 (C + R) + 2 C operations a head with each number of it, which makes decoding bound by arithmetic instead of memory.

The problem: few rows and long texts leave most multiprocessors idle. So each row's pages are divided among SPLITS programs;
each keeps the running maximum m and sum l of its exponentials and a sum of values scaled to that maximum, and a second
kernel joins the parts: out = sum_s w_s part_s, w_s proportional to exp(logsumexp_s).

Floors: 2 H (2 C + R) operations a cached token; 2 (C + R) bytes of the cache a token, from memory once (programs for
other heads of the row find them in the L2 cache).

The published sizes, C 512 and R 64, have a second kernel on Hopper, `latent_attention_gluon`; this one takes any.

Layout: pages (P, S, C + R) contiguous; token j of row b is place j % S of page table[b, j // S].
Shapes: B rows, H heads, C latent, R rope, P pages, S slots a page.
"""

from functools import cache

import torch
from torch import Tensor

from minids.kernels.backend import (
    TensorDescriptor,
    capability,
    cdiv,
    check,
    check_rows,
    check_shape,
    choose,
    jit,
    multiprocessors,
    registered,
    tl,
)  # fmt: skip

BF16 = torch.bfloat16
HEADS = 64  # heads of a program: what one tensor core instruction multiplies
START = 3  # pages: see splits_for
MOST_SPLITS = 256


def mla_decode(
    q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, *, rank: int, scale: float, backend: str | None = None
) -> Tensor:
    """One new token's attention for every row.

    Args:
        q: (B, H, C + R) bfloat16: query times W_UK, then its rotated part. Contiguous.
        pages: (P, S, C + R) bfloat16, contiguous; for the kernel S is 64, C and R are powers of two from 16 on, and
            slots of a row's pages that do not count hold finite numbers (their weight is 0).
        table: (B, pages a row) int32: the row's pages in order. lengths: (B,) int32: tokens that count, the new one
            included. Not checked on the device.
        rank: C. scale: of the scores, positive.
        backend: see `minids.kernels.backend`.

    Returns:
        (B, H, C) bfloat16, before W_UV. A row of length 0 gives zeros.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    _check(q, pages, table, lengths, rank)
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, expected a positive number")
    if choose(backend, q, pages, table, lengths) == "torch":
        return reference(q, pages, table, lengths, rank, scale)
    rope = q.shape[-1] - rank
    if pages.shape[1] != 64 or min(rank, rope) < 16 or rank & (rank - 1) or rope & (rope - 1):
        raise ValueError(
            f"pages: got {pages.shape[1]} slots a page, C = {rank}, R = {rope}; expected 64 and powers of two from 16 on"
        )
    return _mla_decode(q, pages, table, lengths, rank, scale)


def reference(q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, rank: int, scale: float) -> Tensor:
    """The specification, in FP32."""
    latent = pages[table.long()].flatten(1, 2).float()  # (B, tokens, C + R)
    scores = scale * torch.einsum("bhc,bjc->bhj", q.float(), latent)
    seen = torch.arange(latent.shape[1], device=q.device) < lengths[:, None]
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    latent = latent.masked_fill(~seen[..., None], 0.0)  # what lies in slots that do not count may be anything
    return torch.einsum("bhj,bjc->bhc", weights, latent[..., :rank]).to(q.dtype)


# ---- Triton ----


@jit(varying=("H", "table_stride", "SPLITS"))
def _attend(q_ptr, c_desc, r_desc, table_ptr, lengths_ptr, out_ptr, sums_ptr, H, table_stride, scale, SPLITS,
            C: tl.constexpr, R: tl.constexpr, BH: tl.constexpr):
    """One program: BH heads of one row over its share of the pages. Scores are kept in powers of 2."""
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    mask = head[:, None] < H
    at = q_ptr + (row * H + head[:, None]) * (C + R)
    q_c = tl.load(at + tl.arange(0, C)[None, :], mask=mask, other=0.0)
    q_r = tl.load(at + C + tl.arange(0, R)[None, :], mask=mask, other=0.0)
    length = tl.load(lengths_ptr + row)
    n_pages = tl.cdiv(length, 64)
    share = tl.cdiv(n_pages, SPLITS)
    largest = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    out = tl.zeros((BH, C), tl.float32)
    for index in range(split * share, tl.minimum((split + 1) * share, n_pages)):
        first = tl.load(table_ptr + row * table_stride + index) * 64
        c = c_desc.load([first, 0])
        r = r_desc.load([first, C])
        scores = tl.dot(q_r, r.T, tl.dot(q_c, c.T)) * (scale * 1.4426950408889634)
        scores = tl.where((index * 64 + tl.arange(0, 64) < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))  # a page of the loop has at least one token that counts
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(tl.bfloat16), c, out * shrink[:, None])
        largest = higher
    out = tl.where(total[:, None] > 0, out / total[:, None], 0.0)
    part = (row * SPLITS + split) * H + head
    tl.store(out_ptr + part[:, None] * C + tl.arange(0, C)[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + part, tl.where(total > 0, largest + tl.log2(total), float("-inf")), mask=head < H)


@jit(varying=("H", "SPLITS"))
def _join(parts_ptr, sums_ptr, out_ptr, H, SPLITS,
          C: tl.constexpr, POWER: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """One program: BC columns of the parts of one head of one row, BS parts at a time. POWER: a power of two, at least
    SPLITS."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    every, column = tl.arange(0, POWER), tl.program_id(0) * BC + tl.arange(0, BC)
    first = row * SPLITS * H + head
    sums = tl.load(sums_ptr + first + every * H, mask=every < SPLITS, other=float("-inf"))
    top = tl.maximum(tl.max(sums, 0), -1e30)  # finite where no token counts
    whole = tl.maximum(tl.sum(tl.exp2(sums - top), 0), 1e-30)
    out = tl.zeros((BC,), tl.float32)
    for begin in range(0, POWER, BS):
        split = begin + tl.arange(0, BS)
        mine = split < SPLITS
        weights = tl.exp2(tl.load(sums_ptr + first + split * H, mask=mine, other=float("-inf")) - top) / whole
        at = parts_ptr + (first + split * H)[:, None] * C + column[None, :]
        out += tl.sum(tl.load(at, mask=mine[:, None], other=0.0) * weights[:, None], 0)
    tl.store(out_ptr + (row * H + head) * C + column, out.to(tl.bfloat16))


def join(parts: Tensor, sums: Tensor, out: Tensor) -> None:
    """Few parts: a program joins whole rows. Many: it takes fewer columns, and all their parts at once."""
    b, splits, h, c = parts.shape
    power = 1 << (splits - 1).bit_length()
    at_once = min(power, 64)
    columns = min(c, max(64, 2048 // at_once))
    warps = 4 if columns > 64 else 2
    _join[(c // columns, h, b)](parts, sums, out, h, splits, c, power, at_once, columns, num_warps=warps)


@cache
def splits_for(rows: int, heads: int, pages: int, processors: int) -> int:
    """Programs that a row's pages are divided among: the number whose waves end first. A multiprocessor holds one program,
    and starting and ending one takes about as long as START pages."""
    units = rows * cdiv(heads, HEADS)

    def waves_end(splits: int) -> int:
        return cdiv(units * splits, processors) * (cdiv(pages, splits) + START) + (START if splits > 1 else 0)

    return min(range(1, max(1, min(pages, MOST_SPLITS)) + 1), key=waves_end)


@registered("mla_decode")
def _mla_decode(q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, rank: int, scale: float) -> Tensor:
    (b, h, _), out = q.shape, q.new_empty((*q.shape[:2], rank))
    if out.numel() == 0:
        return out
    check_rows("pages", pages)  # TMA reads them
    splits = splits_for(b, h, table.shape[1], multiprocessors(q.device))
    parts = out if splits == 1 else q.new_empty((b, splits, h, rank), dtype=torch.float32)
    sums = q.new_empty((b, splits, h), dtype=torch.float32)
    attend = _attend_gluon if gluon_applies(q, rank) else _attend_triton
    attend(q, pages, table, lengths, parts, sums, scale, splits)
    if splits > 1:
        join(parts, sums, out)
    return out


def gluon_applies(q: Tensor, rank: int) -> bool:
    """Whether the Gluon kernel takes these sizes on this device."""
    published = rank == 512 and q.shape[-1] == 576
    return published and capability(q.device)[0] == 9 and q.data_ptr() % 16 == 0


def _attend_gluon(*arguments) -> None:
    from minids.kernels.latent_attention_gluon import attend  # needs Triton, which is optional

    attend(*arguments)


def _attend_triton(
    q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, out: Tensor, sums: Tensor, scale: float, splits: int
) -> None:
    """Fills out (B, SPLITS, H, C), each part divided by its sum of exponentials, and sums (B, SPLITS, H), their log2."""
    (b, h, d), rank, latent = q.shape, out.shape[-1], pages.flatten(0, 1)
    _attend[(cdiv(h, HEADS), b, splits)](
        q, TensorDescriptor.from_tensor(latent, [64, rank]), TensorDescriptor.from_tensor(latent, [64, d - rank]), table,
        lengths, out, sums, h, table.stride(0), scale, splits, rank, d - rank, HEADS, num_warps=8, num_stages=2,
    )  # fmt: skip


@_mla_decode.register_fake
def _(q, pages, table, lengths, rank, scale):
    return q.new_empty((q.shape[0], q.shape[1], rank))


def _check(q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, rank: int) -> None:
    check("q", q, ndim=3, dtype=BF16)
    check("pages", pages, ndim=3, dtype=BF16)
    check("table", table, ndim=2, dtype=torch.int32)
    check("lengths", lengths, ndim=1, dtype=torch.int32)
    b, _, d = q.shape
    if not 0 < rank < d or pages.shape[-1] != d:
        raise ValueError(
            f"rank, q, pages: got {rank}, {tuple(q.shape)}, {tuple(pages.shape)}, expected (B, H, C + R) and (P, S, C + R) "
            "with C = rank > 0 and R > 0"
        )
    check_shape("lengths", lengths, (b,))
    check_shape("table", table, (b, table.shape[1]))
    for name, t in (("q", q), ("pages", pages), ("table", table), ("lengths", lengths)):
        if not t.is_contiguous():
            raise ValueError(f"{name}: got strides {t.stride()} for shape {tuple(t.shape)}, expected a contiguous tensor")
