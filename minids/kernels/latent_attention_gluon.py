"""`mla_decode` a second time, in Gluon, for the published sizes (C 512, R 64): three roles share one multiprocessor.

Plain Triton runs one page after the other: copy, scores, softmax, values; the tensor core waits in between. Here the
64 x 512 sum of a block of heads is divided between two warp groups, and the scores of a page are made while the values of
the page before are added:

    producer     one warp: copies pages to two buffers, each in three parts with barriers of their own
    scorer       S_j = Q K_j^T, the softmax, the left half of the sum;  P_j and the factor for older sums go to the adder
    adder        the right half of the sum

    scorer       S_1 | L += P_0 V_0 | S_2 | L += P_1 V_1 | S_3 ...      the softmax of S_j runs beside L += P_(j-1) V_(j-1)
    adder        R += P_0 V_0 |     R += P_1 V_1 |        ...           beside the next scores

64 heads x 576 queries stay in shared memory (72 KB), two pages (144 KB) and P (8 KB): all there is. A third page does not
fit, so a buffer is filled again in parts, as its parts fall free: the rope after S_j, the right half after the adder, the
left half after the scorer; and the next scores begin with what arrives first. The left half is the last to arrive and to
fall free, so the scorer waits for its values in the middle of the softmax: between the maximum and the exponentials.

The problem, the equation and the floors are those of `latent_attention`, whose reference is the specification. Hopper only
(capability 9.x), not in Triton's CPU interpreter.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minids.kernels.backend import cdiv

HEADS, PAGE, HALF, ROPE = 64, 64, 256, 64
EARLY = gl.constexpr(True)  # False: a page's left half falls free only after the softmax, 4 to 7 % slower


@gluon.jit
def _share(lengths_ptr, SPLITS):
    """This program's row, its tokens, and its first page and number of pages: at least one, which may count nothing."""
    row, split = gl.program_id(1), gl.program_id(2)
    length = gl.load(lengths_ptr + row)
    n_pages = (length + 63) // 64
    share = (n_pages + SPLITS - 1) // SPLITS
    first = split * share
    return row, length, first, gl.maximum(gl.minimum(share, n_pages - first), 1)


@gluon.jit
def _fill(desc, buffers, full, empty, stage, phase, slot, COLUMN: gl.constexpr):
    """Copies a part of a page, from `COLUMN` on, once its buffer is empty."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [slot, COLUMN], full.index(stage), buffers.index(stage))


@gluon.jit
def _produce(q_desc, qr_desc, c_desc, r_desc, queries, pages, full, empty, table_ptr, lengths_ptr, H, table_stride,
             SPLITS):
    row, _, first, count = _share(lengths_ptr, SPLITS)
    q_left, q_right, q_rope, q_full = queries
    left, right, rope = pages
    left_full, right_full, rope_full, _ = full
    left_empty, right_empty, rope_empty, _ = empty
    head = row * H + gl.program_id(0) * 64
    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes + qr_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [head, 256], q_full, q_right)
    tma.async_copy_global_to_shared(qr_desc, [head, 512], q_full, q_rope)
    tma.async_copy_global_to_shared(q_desc, [head, 0], q_full, q_left)
    entries = table_ptr + row.to(gl.int64) * table_stride
    last = gl.minimum(first + count, table_stride) - 1
    page = gl.load(entries + gl.minimum(first, last))
    for step in range(count):
        following = gl.load(entries + gl.minimum(first + step + 1, last))  # asked for a turn before it is needed
        stage, phase = step % 2, step // 2 & 1
        _fill(r_desc, rope, rope_full, rope_empty, stage, phase, page * 64, 512)
        _fill(c_desc, right, right_full, right_empty, stage, phase, page * 64, 256)
        _fill(c_desc, left, left_full, left_empty, stage, phase, page * 64, 0)
        page = following


@gluon.jit
def _start_scores(queries, pages, full, step, zero):
    """Starts S = Q K^T with the parts that arrive first, the rope and the right half; returns it unfinished."""
    _, q_right, q_rope, _ = queries
    _, right, rope = pages
    _, right_full, rope_full, _ = full
    stage, phase = step % 2, step // 2 & 1
    mbarrier.wait(rope_full.index(stage), phase)
    s = warpgroup_mma(q_rope, rope.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(right_full.index(stage), phase)
    return warpgroup_mma(q_right, right.index(stage).permute((1, 0)), s, is_async=True)


@gluon.jit
def _add_left_scores(s, queries, pages, full, step):
    q_left, _, _, _ = queries
    left, _, _ = pages
    left_full, _, _, _ = full
    mbarrier.wait(left_full.index(step % 2), step // 2 & 1)
    return warpgroup_mma(q_left, left.index(step % 2).permute((1, 0)), s, is_async=True)


@gluon.jit
def _highest(s, largest, counted, scale, MASKED: gl.constexpr):
    """The scores, masked where no token counts; the new maximum, in powers of 2; what to subtract. Only a row's last page
    may be full in part."""
    if MASKED:
        column = gl.arange(0, 64, gl.SliceLayout(0, s.type.layout))
        s = gl.where((column < counted)[None, :], s, float("-inf"))
    higher = gl.maximum(largest, gl.max(s, 1) * scale)
    return s, higher, gl.where(higher == float("-inf"), 0.0, higher)  # no token has counted yet


@gluon.jit
def _weigh(s, largest, base, total, scale, P_LAYOUT: gl.constexpr):
    """The page's weights in BF16, the factor for what was summed before, the new sum."""
    weights = gl.exp2(s * scale - base[:, None])
    shrink = gl.exp2(largest - base)
    total = total * shrink + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(gl.bfloat16), P_LAYOUT), shrink, total


@gluon.jit
def _publish(p, shrink, p_buffer, shrink_buffer, p_full):
    """P and the factor for the adder."""
    p_buffer.store(p)
    shrink_buffer.store(shrink)
    fence_async_shared()
    mbarrier.arrive(p_full, count=1)


@gluon.jit
def _write(o, inverse, out_ptr, part, H, COLUMN: gl.constexpr):
    """Half the columns of this program's heads; `part`: the row of out where head 0 lies. Zeros where no token counts,
    whatever the page holds that was read."""
    o = gl.where(inverse[:, None] > 0, o * inverse[:, None], 0.0)
    layout: gl.constexpr = o.type.layout
    column = COLUMN + gl.arange(0, 256, gl.SliceLayout(0, layout))
    head = gl.program_id(0) * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    at = out_ptr + (part + head)[:, None] * 512 + column[None, :]
    gl.store(at, o.to(out_ptr.dtype.element_ty), mask=(head < H)[:, None])


@gluon.jit
def _turn(places, zero, o, p, shrink, largest, total, step, counted, scale, MASKED: gl.constexpr):
    """The scorer's work on one page, and on the values of the page before."""
    queries, pages, full, empty, p_buffer, shrink_buffer = places
    o_layout: gl.constexpr = o.type.layout
    left, _, _ = pages
    left_full, _, _, p_full = full
    left_empty, _, rope_empty, p_empty = empty
    before = (step - 1) % 2
    s = _start_scores(queries, pages, full, step, zero)
    s = _add_left_scores(s, queries, pages, full, step)
    if EARLY:
        mbarrier.wait(left_full.index(step % 2), step // 2 & 1)  # has passed: keeps factors from between products
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    o = warpgroup_mma(p, left.index(before), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(rope_empty.index(step % 2), count=1)
    s, higher, base = _highest(s, largest, counted - step * 64, scale, MASKED)
    if EARLY:  # the copy of page j + 1 waits for this place
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        mbarrier.arrive(left_empty.index(before), count=1)
    p_next, shrink, total = _weigh(s, largest, base, total, scale, gl.DotOperandLayout(0, o_layout, 2))
    mbarrier.wait(p_empty, (step - 1) & 1)  # the adder has used P_(j-1)
    _publish(p_next, shrink, p_buffer, shrink_buffer, p_full)
    if not EARLY:
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        mbarrier.arrive(left_empty.index(before), count=1)
    return o, p_next, shrink, higher, total


@gluon.jit
def _scorer(queries, pages, full, empty, p_buffer, shrink_buffer, out_ptr, sums_ptr, lengths_ptr, H, scale,
            SPLITS):
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    row, length, first, count = _share(lengths_ptr, SPLITS)
    left, _, _ = pages
    left_full, _, _, p_full = full
    left_empty, _, rope_empty, p_empty = empty
    _, _, _, q_full = queries
    scale = scale * 1.4426950408889634
    counted = length - first * 64
    zero = gl.zeros([64, 64], gl.float32, s_layout)
    largest = gl.full([64], float("-inf"), gl.float32, row_layout)
    total = gl.zeros([64], gl.float32, row_layout)
    o = gl.zeros([64, 256], gl.float32, o_layout)

    mbarrier.wait(q_full, 0)
    s = _start_scores(queries, pages, full, 0, zero)
    s = warpgroup_mma_wait(0, deps=[_add_left_scores(s, queries, pages, full, 0)])
    mbarrier.arrive(rope_empty.index(0), count=1)
    s, higher, base = _highest(s, largest, counted, scale, True)
    p, shrink, total = _weigh(s, largest, base, total, scale, gl.DotOperandLayout(0, o_layout, 2))
    largest = higher
    _publish(p, shrink, p_buffer, shrink_buffer, p_full)
    places = (queries, pages, full, empty, p_buffer, shrink_buffer)
    for step in range(1, count - 1):
        o, p, shrink, largest, total = _turn(places, zero, o, p, shrink, largest, total, step, counted, scale, False)
    if count > 1:
        o, p, shrink, largest, total = _turn(places, zero, o, p, shrink, largest, total, count - 1, counted, scale, True)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    o = warpgroup_mma(p, left.index((count - 1) % 2), o, is_async=True)
    inverse = gl.where(total > 0, 1 / total, 0.0)
    mbarrier.wait(p_empty, (count - 1) & 1)
    shrink_buffer.store(inverse)
    mbarrier.arrive(p_full, count=1)
    o, p = warpgroup_mma_wait(0, deps=[o, p])
    part = (row.to(gl.int64) * SPLITS + gl.program_id(2)) * H
    _write(o, gl.convert_layout(inverse, gl.SliceLayout(1, o_layout)), out_ptr, part, H, 0)
    head = gl.program_id(0) * 64 + gl.arange(0, 64, row_layout)
    gl.store(sums_ptr + part + head, gl.where(total > 0, largest + gl.log2(total), float("-inf")), mask=head < H)


@gluon.jit
def _adder(queries, pages, full, empty, p_buffer, shrink_buffer, out_ptr, sums_ptr, lengths_ptr, H, scale,
           SPLITS):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    row, _, _, count = _share(lengths_ptr, SPLITS)
    _, right, _ = pages
    _, right_full, _, p_full = full
    _, right_empty, _, p_empty = empty
    o = gl.zeros([64, 256], gl.float32, layout)
    for step in range(count):
        stage = step % 2
        mbarrier.wait(p_full, step & 1)
        o = o * shrink_buffer.load(gl.SliceLayout(1, layout))[:, None]
        mbarrier.wait(right_full.index(stage), step // 2 & 1)
        o = warpgroup_mma(p_buffer, right.index(stage), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(p_empty, count=1)
        mbarrier.arrive(right_empty.index(stage), count=1)
    mbarrier.wait(p_full, count & 1)
    part = (row.to(gl.int64) * SPLITS + gl.program_id(2)) * H
    _write(o, shrink_buffer.load(gl.SliceLayout(1, layout)), out_ptr, part, H, 256)


@gluon.jit(do_not_specialize=["H", "table_stride", "SPLITS"])
def _attend(q_desc, qr_desc, c_desc, r_desc, table_ptr, lengths_ptr, out_ptr, sums_ptr, H, table_stride, scale, SPLITS):
    q_left = gl.allocate_shared_memory(gl.bfloat16, [64, 256], q_desc.layout)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [64, 256], q_desc.layout)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], qr_desc.layout)
    left = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], c_desc.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], c_desc.layout)
    rope = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], r_desc.layout)
    p_buffer = gl.allocate_shared_memory(gl.bfloat16, [64, 64], r_desc.layout)
    shrink_buffer = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    left_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    right_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    rope_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    left_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    right_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    rope_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=1)
    for stage in gl.static_range(2):
        mbarrier.init(left_full.index(stage), count=1)
        mbarrier.init(right_full.index(stage), count=1)
        mbarrier.init(rope_full.index(stage), count=1)
        mbarrier.init(left_empty.index(stage), count=1)
        mbarrier.init(right_empty.index(stage), count=1)
        mbarrier.init(rope_empty.index(stage), count=1)
    fence_async_shared()
    queries, pages = (q_left, q_right, q_rope, q_full), (left, right, rope)
    full, empty = (left_full, right_full, rope_full, p_full), (left_empty, right_empty, rope_empty, p_empty)
    shared = (queries, pages, full, empty, p_buffer, shrink_buffer, out_ptr, sums_ptr, lengths_ptr, H, scale, SPLITS)
    gl.warp_specialize([
        (_scorer, shared),
        (_adder, shared),
        (_produce, (q_desc, qr_desc, c_desc, r_desc, queries, pages, full, empty, table_ptr, lengths_ptr, H, table_stride,
                    SPLITS)),
    ], [4, 1], [232, 24])  # fmt: skip


def attend(
    q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, out: Tensor, sums: Tensor, scale: float, splits: int
) -> None:
    """Fills out (B, SPLITS, H, C), each part divided by its sum of exponentials, and sums (B, SPLITS, H), their log2."""
    b, h, d = q.shape
    half = gl.NVMMASharedLayout.get_default_for([HEADS, HALF], gl.bfloat16)
    rope = gl.NVMMASharedLayout.get_default_for([HEADS, ROPE], gl.bfloat16)
    q, pages = q.flatten(0, 1), pages.flatten(0, 1)
    _attend[(cdiv(h, HEADS), b, splits)](
        TensorDescriptor.from_tensor(q, [HEADS, HALF], half), TensorDescriptor.from_tensor(q, [HEADS, ROPE], rope),
        TensorDescriptor.from_tensor(pages, [PAGE, HALF], half), TensorDescriptor.from_tensor(pages, [PAGE, ROPE], rope),
        table, lengths, out, sums, h, table.stride(0), scale, splits, num_warps=4,
    )  # fmt: skip
