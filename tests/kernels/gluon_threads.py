"""Runs a Hopper kernel written in Gluon on the CPU, where neither a GPU nor Triton's interpreter can: for tests.

The kernel's source is executed as plain Python with the language's names replaced. What a GPU does at the same time happens
at the same time here too, so that what goes wrong there goes wrong here, or is noticed:

    partition        a thread, which now and then sleeps for a moment
    mbarrier         a phase, arrivals and bytes awaited; waiting too long is a deadlock, one arrival too many an error
    copy engine      a thread: copies arrive later and in any order; until then their destinations hold NaN; boxes begin at
                     multiples of 16 bytes of a row
    tensor core      a product takes its operands when it is started; when it is waited for they must be unchanged, and
                     nobody can calculate with a sum that was not waited for

    reads            what a thread reads by itself may arrive late: surely only before the next fence, or when two more
                     products have been started, which need the registers of what waited for it. Until a later arrival at
                     a barrier has told so, nothing may be copied there

Not checked: layouts, fences after writes, registers, programs of one launch that run at the same time (they run in turn).
Layouts of shared memory are those of the copy engine: a matrix wider than 128 bytes lies in boxes of 128 bytes.
"""

import importlib.util
import itertools
import math
import queue
import random
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch

LOCK = threading.Condition()
LIMIT, PAUSE = 20.0, 0.0004  # seconds: when a wait is a deadlock; the longest sleep
BESIDES = 2  # products that may be started while additions to the sum still wait for something that was read
HERE = threading.local()  # of a partition: the program it belongs to, products not waited for, reads under way
FAILED: list[str] = []
COPIES: queue.Queue = queue.Queue()
READS: list["Read"] = []  # of all partitions: reads of which no arrival has said that they are over


def load(path) -> ModuleType:
    """The kernel's module with Gluon's names replaced by this file's."""
    language = "triton.experimental.gluon"
    names = {
        "triton": ModuleType("triton"), "triton.experimental": ModuleType("triton.experimental"),
        language: SimpleNamespace(jit=jit, language=LANGUAGE), f"{language}.language": LANGUAGE,
        f"{language}.language.nvidia": ModuleType("nvidia"), f"{language}.language.nvidia.hopper": HOPPER,
        f"{language}.nvidia": ModuleType("nvidia"),
        f"{language}.nvidia.hopper": SimpleNamespace(TensorDescriptor=Descriptor),
    }  # fmt: skip
    import minids.kernels.backend  # noqa: F401  with the real Triton, if there is one

    spec = importlib.util.spec_from_file_location("on_threads", path)
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, names):
        spec.loader.exec_module(module)
    return module


# ---- a launch ----


class Kernel:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def launch(*args, num_warps, maxnreg=None):
            args = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
            FAILED.clear()
            engine = threading.Thread(target=copy_engine)
            engine.start()
            try:
                for program in itertools.product(*(range(n) for n in grid)):
                    enter(program, grid)
                    READS.clear()
                    self.function(*args)
            finally:
                COPIES.put(None)
                engine.join()
            assert not FAILED, FAILED[0]

        return launch


def jit(function=None, **_):
    return Kernel(function) if function else Kernel


def warp_specialize(partitions, warps, registers):
    assert len(warps) == len(registers) == len(partitions) - 1
    program, grid = HERE.program, HERE.grid

    def run(function, args):
        enter(program, grid)
        try:
            function(*args)
        except BaseException:
            FAILED.append(traceback.format_exc())
            with LOCK:
                LOCK.notify_all()

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not FAILED, FAILED[0]


def enter(program, grid):
    HERE.program, HERE.grid, HERE.products, HERE.reads = program, grid, [], []


def pause():
    time.sleep(random.random() * PAUSE)


# ---- tensors and memory ----


class Value(torch.Tensor):
    """A tensor whose `type.layout` may be asked for."""

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def split(self):
        return self.unbind(-1)


def value(x):
    return torch.as_tensor(x).as_subclass(Value)


def plain(x):
    return torch.as_tensor(x).as_subclass(torch.Tensor)


class Pointer:
    """data: the memory of a tensor from its first element on, whatever its strides."""

    def __init__(self, data, offset=0):
        behind = data.untyped_storage().nbytes() // data.element_size() - data.storage_offset()
        self.data, self.offset = data.as_strided((behind,), (1,)), plain(offset)
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset):
        return Pointer(self.data, self.offset + plain(offset))

    def __sub__(self, offset):
        return self + -offset


def load_global(pointer, mask=None, other=0):
    offset = pointer.offset if mask is None else torch.where(plain(mask), pointer.offset, 0)
    found = pointer.data[offset].clone()  # a single element would be a view
    return value(found if mask is None else torch.where(plain(mask), found, other))


def store_global(pointer, x, mask=None):
    mask = True if mask is None else mask
    offset, x, mask = torch.broadcast_tensors(pointer.offset, plain(x), plain(mask))
    pointer.data[offset[mask]] = x[mask].to(pointer.data.dtype)


@dataclass(eq=False)
class Read:
    """What a partition read: where, and how many products it has started since."""

    begin: int
    end: int
    products: int = 0


def atomic_add(pointer, x, sem):
    with LOCK:
        before = int(pointer.data[pointer.offset])
        pointer.data[pointer.offset] = before + x
    return before


class Shared:
    def __init__(self, flat, shape):
        self.flat, self.shape, self.dtype = flat, list(shape), flat.dtype

    def index(self, i):
        assert 0 <= int(i) < self.shape[0], f"place {int(i)} of {self.shape[0]}"
        return Shared(self.flat.view(self.shape[0], -1)[int(i)], self.shape[1:])

    def _reinterpret(self, dtype, shape, layout):
        return Shared(self.flat.view(dtype).view(shape).view(-1), shape)

    def slice(self, start, length, dim=0):
        """A part of a matrix."""
        here = self.shape[:dim] + [length] + self.shape[dim + 1:]
        return Part(self, (slice(None),) * dim + (slice(start, start + length),), here)

    def permute(self, order):
        assert order == (1, 0)
        return SimpleNamespace(read=lambda: self.read().t())

    def logical(self):
        """A view of the memory in which row and column are where they belong."""
        rows, box = self.shape[-2] if len(self.shape) > 1 else 1, 128 // self.flat.element_size()
        if len(self.shape) == 1 or self.shape[-1] <= box:
            return self.flat.view(self.shape)
        return self.flat.view(-1, rows, box).permute(1, 0, 2)

    def read(self):
        return self.logical().reshape(self.shape)

    def load(self, layout):
        begin, end = self.memory()
        HERE.reads.append(Read(begin, end))
        with LOCK:
            READS.append(HERE.reads[-1])
            return value(self.read().clone())

    def memory(self):
        """The addresses where it begins and ends."""
        return self.flat.data_ptr(), self.flat.data_ptr() + self.flat.nbytes

    def store(self, x):
        assert list(x.shape) == self.shape, f"{list(x.shape)} into {self.shape}"
        with LOCK:
            self.logical().copy_(plain(x).to(self.dtype).view(self.logical().shape))


class Part(Shared):
    """Some rows or columns of a matrix, in its memory."""

    def __init__(self, whole, inside, shape):
        self.whole, self.inside, self.shape, self.dtype = whole, inside, shape, whole.dtype

    def memory(self):
        return self.whole.memory()

    def read(self):
        return self.whole.read()[self.inside]

    def store(self, x):
        with LOCK:
            matrix = self.whole.read().clone()
            matrix[self.inside] = plain(x).to(self.dtype)
            self.whole.store(matrix)


def allocate_shared_memory(dtype, shape, layout):
    if dtype == torch.int64:
        return Barriers([Barrier() for _ in range(shape[0])])
    fresh = torch.nan if dtype.is_floating_point else -1
    return Shared(torch.full((torch.Size(shape).numel(),), fresh, dtype=dtype), shape)


# ---- barriers ----


class Barrier:
    count = None

    def init(self, count):
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def change(self, arrivals, n_bytes):
        with LOCK:
            self.missing -= arrivals
            self.bytes += n_bytes
            assert self.missing >= 0, "an arrival too many"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                LOCK.notify_all()


class Barriers:
    def __init__(self, barriers):
        self.barriers = barriers

    def index(self, i):
        return Barriers([self.barriers[int(i)]])

    def only(self):
        (barrier,) = self.barriers
        return barrier


def wait(barrier, phase):
    """Until the phase of this parity is over."""
    barrier, until = barrier.only(), time.monotonic() + LIMIT
    with LOCK:
        while barrier.phase % 2 == int(phase):
            assert not FAILED, "another partition failed"
            assert LOCK.wait(0.2) or time.monotonic() < until, "deadlock"
    pause()


def fence():
    for read in HERE.reads:
        read.products = BESIDES


def arrive(barrier, count=1, pred=True):
    pause()
    if pred:
        over = [read for read in HERE.reads if read.products >= BESIDES]
        HERE.reads = [read for read in HERE.reads if read.products < BESIDES]
        with LOCK:
            READS[:] = [read for read in READS if read not in over]
        barrier.only().change(count, 0)


# ---- copies ----


class Descriptor:
    def __init__(self, base, block, layout):
        self.base, self.block, self.layout, self.dtype = base, block, layout, base.dtype
        self.block_shape = block
        self.block_type = SimpleNamespace(nbytes=torch.Size(block).numel() * base.element_size())

    from_tensor = classmethod(lambda cls, base, block, layout: cls(base, block, layout))


def check_corner(descriptor, corner):
    """Elsewhere the device reports an illegal instruction."""
    at = int(corner[-1]) * descriptor.base.element_size()
    assert at % 16 == 0, f"a box begins at byte {at} of its rows, no multiple of 16"


def copy_in(descriptor, corner, barrier, target):
    check_corner(descriptor, corner)
    begin, end = target.memory()
    with LOCK:
        assert not any(read.begin < end and begin < read.end for read in READS), "a copy to where a read may be under way"
    target.store(torch.full(target.shape, torch.nan))
    COPIES.put((time.monotonic() + 5 * PAUSE * random.random(), descriptor, [int(x) for x in corner], barrier, target))


def copy_engine():
    """Delivers copies when their time has come, in any order, until None arrives."""
    under_way, ending = [], False
    while under_way or not ending:
        try:
            job = COPIES.get(timeout=PAUSE if under_way else None)
            ending = ending or job is None
            under_way += [job] if job else []
        except queue.Empty:
            pass
        for job in [job for job in under_way if job[0] <= time.monotonic()]:
            under_way.remove(job)
            try:
                deliver(*job[1:])
            except AssertionError:
                FAILED.append(traceback.format_exc())


def deliver(descriptor, corner, barrier, target):
    (row, column), (rows, columns) = corner, descriptor.block
    box = torch.zeros(rows, columns, dtype=descriptor.dtype)  # beyond the tensor's end: zeros
    found = descriptor.base[row : row + rows, column : column + columns]
    box[: found.shape[0], : found.shape[1]] = found
    target.store(box)
    barrier.only().change(0, -descriptor.block_type.nbytes)


def copy_out(descriptor, corner, source):
    check_corner(descriptor, corner)
    *which, row, column = (int(x) for x in corner)
    matrix = Shared(source.flat, source.shape[-2:]).read()
    inside = descriptor.base[(*which, slice(row, row + matrix.shape[0]), slice(column, column + matrix.shape[1]))]
    inside.copy_(matrix[: inside.shape[0], : inside.shape[1]])


# ---- products ----


class Unfinished:
    def __init__(self, total):
        self.total = total


def operand(x):
    with LOCK:
        found = plain(x) if isinstance(x, torch.Tensor) else x.read()
        return found.float() if found.itemsize == 1 else found.clone()  # torch cannot compare FP8


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    for read in HERE.reads:
        read.products += 1
    a_now, b_now = operand(a), operand(b)
    assert not a_now.isnan().any() and not b_now.isnan().any(), "an operand is not there yet, or no longer"
    before = acc.total if isinstance(acc, Unfinished) else plain(acc)
    out = Unfinished(a_now.float() @ b_now.float() + (before if use_acc else 0))
    HERE.products.append((out, (a, a_now), (b, b_now)))
    return out if is_async else warpgroup_mma_wait(0, [out])


def warpgroup_mma_wait(outstanding=0, deps=()):
    pause()
    while len(HERE.products) > outstanding:
        _, *operands = HERE.products.pop(0)
        assert all(torch.equal(operand(x), then) for x, then in operands), "an operand changed before its product was done"
    pending = [out for out, *_ in HERE.products]
    done = [isinstance(dep, Unfinished) and not any(dep is out for out in pending) for dep in deps]
    found = [value(dep.total) if ready else dep for dep, ready in zip(deps, done, strict=True)]  # else: still unfinished
    return found[0] if len(found) == 1 else tuple(found)


# ---- names ----


def either(function, scalar):
    def choose(a, b):
        whole = not any(isinstance(x, torch.Tensor) for x in (a, b))
        return scalar(a, b) if whole else value(function(torch.as_tensor(a), torch.as_tensor(b)))

    return choose


def anything(*_, **__):
    return None


def assembly(text, constraints, inputs, **_):
    """Products and sums that are written as assembly; the rest has no effect that could be checked."""
    *factors, summand = (plain(x) for x in inputs)
    return value(math.prod(factors) + summand) if "fma.rn.f32" in text else None


class Layout:
    def __init__(self, **_):
        pass

    get_default_for = anything


LANGUAGE = SimpleNamespace(
    constexpr=lambda x=None: x, static_range=range, bfloat16=torch.bfloat16, float32=torch.float32, int64=torch.int64,
    int32=torch.int32, program_id=lambda axis: value(HERE.program[axis]), load=load_global, store=store_global,
    arange=lambda start, end, layout: value(torch.arange(start, end)),
    zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, x, dtype, layout: value(torch.full(shape, x, dtype=dtype)),
    where=lambda c, a, b: value(torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b))),
    maximum=either(torch.maximum, max), minimum=either(torch.minimum, min), max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2, convert_layout=lambda x, layout: x,
    allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize, inline_asm_elementwise=assembly,
    NVMMADistributedLayout=anything, DotOperandLayout=anything, SliceLayout=anything, SwizzledSharedLayout=anything,
    cdiv=lambda a, b: -(-a // b), num_programs=lambda axis: HERE.grid[axis], zeros_like=torch.zeros_like, exp=torch.exp,
    thread_barrier=anything, atomic_add=atomic_add,
    BlockedLayout=anything, NVMMASharedLayout=Layout, float8e4nv=torch.float8_e4m3fn,
)  # fmt: skip
HOPPER = SimpleNamespace(
    fence_async_shared=fence, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
    mbarrier=SimpleNamespace(
        init=lambda barrier, count: barrier.only().init(count), wait=wait, arrive=arrive, MBarrierLayout=anything,
        expect=lambda barrier, n_bytes: barrier.only().change(1, n_bytes),
    ),
    tma=SimpleNamespace(async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=anything),
)  # fmt: skip
