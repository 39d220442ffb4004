"""Grouped matrix product in BF16: the rows of each expert times that expert's matrix (V3 sections 2.1.2 and 3.2).

The problem: after dispatch, expert e has the rows starts[e] to ends[e] of X, as many as the router sent it, perhaps none.
One product an expert would leave the device idle between small kernels, and wait for the counts on the host.

    Y[rows of e] = X[rows of e] W[e]^T          dW[e] = dY[rows of e]^T X[rows of e]

Floors: 2 M N K operations; X, Y and the matrices of the experts that have rows, once each.

The kernel: every expert's rows are cut into tiles of their own. Nobody knows on the host how many there are, so the grid
is the most there can be, and a first small kernel lists the tiles: cumulate the experts' tile counts; tile i's expert is
the number of sums at or below i. Programs beyond the last tile end at once. Rows of a tile
beyond its expert's end belong to the next one: they are computed and not stored.

On Hopper `grouped_gluon` computes the same, faster: there the roles within one program overlap.

Layout: X (M, K) row-major; W (E, N, K) with unit stride along K, or along N (W.transpose(1, 2) of a stored (E, K, N)): so
the input gradient dX = dY W is the same call with w.transpose(1, 2). Row strides are multiples of 16 bytes.
Shapes: M rows (token slots), E experts, N output channels, K input channels.
"""

import torch
from torch import Tensor

from minids.kernels.backend import (
    OUT_DTYPES,
    TensorDescriptor,
    asked,
    capability,
    cdiv,
    check,
    check_ends,
    check_rows,
    choose,
    jit,
    registered,
    tl,
)  # fmt: skip
from minids.kernels.gemm_fp8 import store_tile, tile_of

BF16 = torch.bfloat16


def grouped_gemm(
    x: Tensor, w: Tensor, ends: Tensor, *, tiles: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Rows ends[e - 1] to ends[e] of x times w[e] transposed. Differentiable in x and w.

    Args:
        x: (M, K) bfloat16. w: (E, N, K) bfloat16, either of its last two strides 1.
        ends: (E,) int32, non-decreasing, the last one M. Not checked on the device.
        tiles: `find_tiles(ends, M, TILE)`, for callers with several products over the same rows.
        backend: see `minids.kernels.backend`.

    Returns:
        (M, N) bfloat16. Rows at and beyond ends[-1], if any, are not defined.

    Raises:
        TypeError, ValueError: with the value received, before anything is launched.
    """
    check("x", x, ndim=2, dtype=BF16)
    check("w", w, ndim=3, dtype=BF16)
    check_ends(ends, len(w))
    if x.shape[1] != w.shape[2] or 0 in w.shape:
        raise ValueError(f"x, w: got shapes {tuple(x.shape)} and {tuple(w.shape)}, expected (M, K) and (E, N, K), K > 0")
    if choose(backend, x, w, ends) == "torch":
        return reference(x, w, ends)
    return _grouped_gemm(x, w, ends, tiles)


def grouped_wgrad(
    dy: Tensor, x: Tensor, ends: Tensor, *, out_dtype: torch.dtype = BF16, backend: str | None = None
) -> Tensor:
    """dW[e] = dy[rows of e]^T x[rows of e].

    Args:
        dy: (M, N) bfloat16. x: (M, K) bfloat16. ends: (E,) int32 as in `grouped_gemm`.
        out_dtype: torch.bfloat16 or torch.float32.

    Returns:
        (E, N, K); zeros for an expert without rows.
    """
    check("dy", dy, ndim=2, dtype=BF16)
    check("x", x, ndim=2, dtype=BF16)
    check_ends(ends, len(ends))
    if len(dy) != len(x):
        raise ValueError(f"dy, x: got {len(dy)} and {len(x)} rows, expected as many of one as of the other")
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, expected {' or '.join(map(str, OUT_DTYPES))}")
    if choose(backend, dy, x, ends) == "torch":
        return wgrad_reference(dy, x, ends, out_dtype)
    return _grouped_wgrad(dy, x, ends, out_dtype)


# ---- reference ----


def blocks_of(x: Tensor, ends: Tensor) -> list[Tensor]:
    """The rows of each expert. Waits for the device."""
    stops = ends.tolist()
    return [x[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]


def reference(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """The specification: a loop over experts, FP32 products, rounded once."""
    rows = [(block.float() @ matrix.float().t()).to(x.dtype) for block, matrix in zip(blocks_of(x, ends), w, strict=True)]
    out = torch.cat(rows)
    return torch.cat([out, out.new_zeros(len(x) - len(out), out.shape[1])])


def wgrad_reference(dy: Tensor, x: Tensor, ends: Tensor, out_dtype: torch.dtype = BF16) -> Tensor:
    """The specification of `grouped_wgrad`."""
    pairs = zip(blocks_of(dy, ends), blocks_of(x, ends), strict=True)
    return torch.stack([a.float().t() @ b.float() for a, b in pairs]).to(out_dtype)


# ---- Triton ----


@jit(varying=("E",))
def _find_tiles(ends_ptr, tiles_ptr, E, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Writes for tile number program_id of all experts' row tiles: its expert, its first row, and the row after its
    expert's last. Beyond the last tile the expert is E and both rows are 0; the last program adds the number of tiles to
    E. EXPERTS is E rounded up to a power of two."""
    index = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + e, mask=e < E, other=0)
    starts = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (ends - starts + BM - 1) // BM, 0)
    before = tl.cumsum(tiles, 0)  # up to and with expert e
    expert = tl.sum(((before <= index) & (e < E)).to(tl.int32), 0)
    mine = e == expert
    start = tl.sum(tl.where(mine, starts, 0), 0)
    row = start + (index - tl.sum(tl.where(mine, before - tiles, 0), 0)) * BM
    last = index == tl.num_programs(0) - 1
    tl.store(tiles_ptr + index * 3, tl.where(last, expert + tl.sum(tiles, 0), expert))
    tl.store(tiles_ptr + index * 3 + 1, tl.where(expert < E, row, 0))
    tl.store(tiles_ptr + index * 3 + 2, tl.sum(tl.where(mine, ends, 0), 0))


@jit(varying=("E", "m_tiles"))
def _grouped(x_desc, w_desc, out_ptr, tiles_ptr, N, K, E, m_tiles,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
             K_MAJOR: tl.constexpr, CLEAR: tl.constexpr):
    n_tiles = tl.cdiv(N, BN)
    m_tile, n_tile = tile_of(tl.program_id(0), m_tiles, n_tiles, GROUP)
    expert = tl.load(tiles_ptr + m_tile * 3)
    row = tl.load(tiles_ptr + m_tile * 3 + 1)
    end = tl.load(tiles_ptr + m_tile * 3 + 2)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, tl.where(expert < E, K, 0), BK):
        x = x_desc.load([row, k])
        if K_MAJOR:
            w = w_desc.load([expert * N + n_tile * BN, k]).T  # rows beyond N: the next expert's, not stored
        else:
            w = w_desc.load([expert * K + k, n_tile * BN])
            if CLEAR:  # rows beyond K are the next expert's, and zeros beyond x's columns times infinity are NaN
                w = tl.where((k + tl.arange(0, BK) < K)[:, None], w.to(tl.float32), 0.0).to(tl.bfloat16)
        total = tl.dot(x, w, total)
    store_tile(out_ptr, total, row, n_tile * BN, end, N, BM, BN)


@jit(varying=("E",))
def _wgrad(dy_desc, x_desc, out_ptr, ends_ptr, N, K, E,
           BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr):
    n_tiles, k_tiles = tl.cdiv(N, BN), tl.cdiv(K, BK)
    expert = tl.program_id(0) // (n_tiles * k_tiles)
    n_tile, k_tile = tile_of(tl.program_id(0) % (n_tiles * k_tiles), n_tiles, k_tiles, GROUP)
    end = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    full = start + (end - start) // ROWS * ROWS
    total = tl.zeros((BN, BK), dtype=tl.float32)
    for row in range(start, full, ROWS):
        dy = dy_desc.load([row, n_tile * BN])
        x = x_desc.load([row, k_tile * BK])
        total = tl.dot(dy.T, x, total)
    if full < end:  # rows beyond the end are the next expert's: zero in both factors, since 0 * infinity is NaN
        mine = (full + tl.arange(0, ROWS) < end)[:, None]
        dy = tl.where(mine, dy_desc.load([full, n_tile * BN]).to(tl.float32), 0.0).to(tl.bfloat16)
        x = tl.where(mine, x_desc.load([full, k_tile * BK]).to(tl.float32), 0.0).to(tl.bfloat16)
        total = tl.dot(dy.T, x, total)
    store_tile(out_ptr + expert.to(tl.int64) * N * K, total, n_tile * BN, k_tile * BK, N, K, BN, BK)


def find_tiles(ends: Tensor, rows: int, bm: int) -> Tensor:
    """(tiles, 3) int32: expert, first row and end of every row tile of `bm` rows, as many as there can be at most, since
    each expert may add one that is not full. Entries beyond the last tile are E, 0 and 0; the very last, never a tile,
    says how many there are: E plus their number, 0 and 0."""
    e = len(ends)
    tiles = ends.new_empty((cdiv(rows, bm) + e, 3))
    _find_tiles[(len(tiles),)](ends, tiles, e, bm, 1 << max(e - 1, 0).bit_length(), num_warps=1)
    return tiles


# From a sweep on an H200: the forward's W with unit stride along K, along N (the input gradient's), the weight gradient.
TILE = 128  # rows of both
FORWARD = {"BM": TILE, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
DGRAD = {"BM": TILE, "BN": 256, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
WGRAD = {"BN": 128, "BK": 256, "ROWS": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4}


def launch(x: Tensor, w: Tensor, ends: Tensor, config: dict[str, int], tiles: Tensor | None = None) -> Tensor:
    """The forward kernel with a given cut, and its row tiles if they are known."""
    (m, k), (e, n, _), c = x.shape, w.shape, config
    out = x.new_empty((m, n))
    if m == 0:
        return out
    k_major = w.stride(2) == 1
    stored = (w if k_major else w.transpose(1, 2)).flatten(0, 1)  # a view: experts one below the other
    box = [c["BN"], c["BK"]] if k_major else [c["BK"], c["BN"]]
    tiles = find_tiles(ends, m, c["BM"]) if tiles is None else tiles
    _grouped[(len(tiles) * cdiv(n, c["BN"]),)](
        TensorDescriptor.from_tensor(x, [c["BM"], c["BK"]]), TensorDescriptor.from_tensor(stored, box), out, tiles, n, k, e,
        len(tiles), K_MAJOR=k_major, CLEAR=not k_major and k % c["BK"] > 0, **c,
    )  # fmt: skip
    return out


def launch_wgrad(dy: Tensor, x: Tensor, ends: Tensor, out_dtype: torch.dtype, config: dict[str, int]) -> Tensor:
    """The weight gradient's kernel with a given cut."""
    n, k, e, c = dy.shape[1], x.shape[1], len(ends), config
    out = x.new_empty((e, n, k), dtype=out_dtype)
    if len(x) == 0:
        return out.zero_()
    _wgrad[(e * cdiv(n, c["BN"]) * cdiv(k, c["BK"]),)](
        TensorDescriptor.from_tensor(dy, [c["ROWS"], c["BN"]]), TensorDescriptor.from_tensor(x, [c["ROWS"], c["BK"]]),
        out, ends, n, k, e, **c,
    )  # fmt: skip
    return out


def prefers_gluon(columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `grouped_gluon` runs: on Hopper, if the rows of the result are whole 16 bytes."""
    return columns * dtype.itemsize % 16 == 0 and capability(device)[0] == 9


@registered("grouped_gemm")
def _grouped_gemm(x: Tensor, w: Tensor, ends: Tensor, tiles: Tensor | None = None) -> Tensor:
    check_rows("x", x)
    stored = w if w.stride(2) == 1 else w.transpose(1, 2)
    check_rows("w", stored)
    if stored.stride(0) != stored.shape[1] * stored.stride(1):
        raise ValueError(f"w: got strides {w.stride()} for shape {tuple(w.shape)}, expected experts one behind the other")
    (_, n, k), k_major = w.shape, w.stride(2) == 1
    # Not where N-major blocks of W reach beyond K: they hold the next expert's rows, which `launch` clears.
    if len(x) and prefers_gluon(n, x.dtype, x.device) and (k_major or k % 64 == 0):
        from minids.kernels import grouped_gluon  # needs Triton, which is optional

        return grouped_gluon.gemm(x, w, ends, find_tiles(ends, len(x), TILE) if tiles is None else tiles)
    return launch(x, w, ends, FORWARD if k_major else DGRAD, tiles)


@registered("grouped_wgrad")
def _grouped_wgrad(dy: Tensor, x: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    check_rows("dy", dy)
    check_rows("x", x)
    if len(x) and prefers_gluon(x.shape[1], out_dtype, x.device):
        from minids.kernels import grouped_gluon

        return grouped_gluon.wgrad(dy, x, ends, out_dtype)
    return launch_wgrad(dy, x, ends, out_dtype, WGRAD)


@_grouped_gemm.register_fake
def _(x, w, ends, tiles=None):
    return x.new_empty((x.shape[0], w.shape[1]))


@_grouped_wgrad.register_fake
def _(dy, x, ends, out_dtype):
    return x.new_empty((ends.shape[0], dy.shape[1], x.shape[1]), dtype=out_dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor):
    x, w, ends, tiles = ctx.saved_tensors
    dy = dy.contiguous()
    wants_x, wants_w = asked(ctx, 2)
    dx = _grouped_gemm(dy, w.transpose(1, 2), ends, tiles) if wants_x else None
    dw = _grouped_wgrad(dy, x, ends, w.dtype) if wants_w else None
    return dx, dw, None, None


_grouped_gemm.register_autograd(_backward, setup_context=_save)
