"""Where the tiles of `grouped_gluon` lie: their numbers, the copies of their factors, the stores of their results.

A tile is 128 rows and 256 columns of the result; a block of its factors is 64 long in the index that is summed. ``tile``,
for all functions here: the expert; the tile's first row, in the list of slots or, of a weight gradient, in the expert's
matrix; its column of tiles; the row where the expert's end; the first row and the number of whole blocks to sum over; and
how many rows the last block has beyond those (the last three matter for a weight gradient).

``lists``: of tiles (`grouped.find_tiles`) and of the experts' ends. ``sizes``: numbers of tiles and of their columns, N, K
and E.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

B_BYTES = gl.constexpr(256 * 64 * 2)
GROUP = gl.constexpr(16)  # row tiles that are walked column by column, if an expert has more


@gluon.jit
def tile_of(index, lists, sizes, KIND: gl.constexpr):
    """Tile number `index`."""
    tiles_ptr, ends_ptr = lists
    _, n_tiles, N, K, E = sizes
    if KIND == "wgrad":
        m_tiles = gl.cdiv(N, 128)
        expert = index // (m_tiles * n_tiles)
        within = index % (m_tiles * n_tiles)
        begin = gl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        rows = gl.load(ends_ptr + expert) - begin
        start, end, height, blocks, rest = 0, N, m_tiles, rows // 64, rows % 64
    else:
        listed = index // n_tiles  # a row tile of the expert, since each has as many tiles
        expert = gl.load(tiles_ptr + listed * 3)
        row = gl.load(tiles_ptr + listed * 3 + 1)
        end = gl.load(tiles_ptr + listed * 3 + 2)
        start = gl.load(ends_ptr + expert - 1, mask=(expert > 0) & (expert < E), other=0)
        within = index - (listed - (row - start) // 128) * n_tiles
        height = gl.maximum(gl.cdiv(end - start, 128), 1)
        begin, blocks, rest = 0, gl.where(expert < E, gl.cdiv(K, 64), 0), 0  # beyond the last tile: nothing to sum
    first = within // (GROUP * n_tiles) * GROUP
    within = within % (GROUP * n_tiles)
    height = gl.minimum(height - first, GROUP)
    return expert, start + (first + within % height) * 128, within // height, end, begin, blocks, rest


@gluon.jit
def copy(a_desc, b_desc, a, b, ready, tile, k, sizes, KIND: gl.constexpr, SWIGLU: gl.constexpr):
    """Starts the copies of block k of both factors."""
    expert, row, n_tile, _, begin, _, _ = tile
    _, _, N, K, _ = sizes
    column = n_tile * 256
    mbarrier.expect(ready, a_desc.block_type.nbytes + B_BYTES)
    if KIND == "wgrad":
        tma.async_copy_global_to_shared(a_desc, [begin + k * 64, row], ready, a)
        tma.async_copy_global_to_shared(b_desc, [begin + k * 64, column], ready, b)
    else:
        tma.async_copy_global_to_shared(a_desc, [row, k * 64], ready, a)
        if KIND == "n_major":
            tma.async_copy_global_to_shared(b_desc, [expert * K + k * 64, column], ready, b)
        elif SWIGLU:  # N is 2 F: gate rows and up rows of W
            gate = expert * N + n_tile * 128
            tma.async_copy_global_to_shared(b_desc, [gate, k * 64], ready, b.slice(0, 128))
            tma.async_copy_global_to_shared(b_desc, [gate + N // 2, k * 64], ready, b.slice(128, 128))
        else:
            tma.async_copy_global_to_shared(b_desc, [expert * N + column, k * 64], ready, b)


@gluon.jit
def clear(buffer, rest):
    """Zeros in the rows of a block from `rest` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for part in gl.static_range(4):
        rows = buffer.slice(part * 16, 16)
        row = part * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
        value = rows.load(layout)
        rows.store(gl.where((row < rest)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def halves(tile):
    """Left and right half of a tile's columns."""
    left, right = tile.reshape([64, 2, tile.shape[1] // 2]).permute((0, 2, 1)).split()
    return left, right


@gluon.jit
def store(tile, buffer, desc, out_ptr, stride, first, row, column, end, columns):
    """Writes 64 rows of a tile, `row` of them on, to row `first` + `row` of the result; nothing at or beyond row `end`. In
    parts that fit the buffer."""
    if tile.shape[1] > buffer.shape[1]:
        left, right = halves(tile)
        store(left, buffer, desc, out_ptr, stride, first, row, column, end, columns)
        store(right, buffer, desc, out_ptr, stride, first, row, column + tile.shape[1] // 2, end, columns)
    elif row + 64 <= end:
        tma.store_wait(0)  # of what this consumer stored before
        buffer.store(tile.to(desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [first + row, column], buffer)
    else:
        m = row + gl.arange(0, 64, gl.SliceLayout(1, tile.type.layout))
        n = column + gl.arange(0, tile.shape[1], gl.SliceLayout(0, tile.type.layout))
        at = out_ptr + (first + m).to(gl.int64)[:, None] * stride + n[None, :]
        gl.store(at, tile.to(desc.dtype), mask=(m < end)[:, None] & (n < columns)[None, :])
