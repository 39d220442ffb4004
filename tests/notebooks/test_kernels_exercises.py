"""The checks of notebook 06's exercises. Its kernels need Triton's interpreter, so they run in a process of their own."""

import os
import re
import subprocess
import sys

import pytest
from exercises import NOTEBOOKS, Lesson

from minids.kernels import backend
from minids.kernels.backend import jit, tl

INTERPRETED = backend.INTERPRETED
inside = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1; the first test runs it")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_exercises_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-q", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 30, run.stdout[-500:]


@pytest.fixture(scope="module")
def lesson():
    return Lesson("06_kernels", {"1": "my_repair", "2": "my_tails", "3": "my_transposed", "4": "my_order"})


class With:
    """A kernel with some of its constants chosen."""

    def __init__(self, kernel, **chosen):
        self.kernel, self.chosen = kernel, chosen

    def __getitem__(self, grid):
        return lambda *args, **cut: self.kernel[grid](*args, **cut, **self.chosen)


# ---- 1 and 2, the product --------------------------------------------------------------------------------------------


@jit
def scaled(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr,
           A: tl.constexpr = "each", B: tl.constexpr = "each", WHERE: tl.constexpr = "part", LAST: tl.constexpr = True,
           MASK_LOAD: tl.constexpr = True, MASK_STORE: tl.constexpr = True, STRIDE_DOWN: tl.constexpr = False,
           FIRST_ROWS: tl.constexpr = False):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    blocks = (K + 127) // 128
    used = blocks if LAST else K // 128
    stride = K // 128 if STRIDE_DOWN else blocks
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(used):
        c = k * 128 + tl.arange(0, 128)
        if MASK_LOAD:
            a = tl.load(a_ptr + m[:, None] * K + c[None, :], mask=(m[:, None] < M) & (c[None, :] < K), other=0.0)
            b = tl.load(b_ptr + n[None, :] * K + c[:, None], mask=(n[None, :] < N) & (c[:, None] < K), other=0.0)
        else:
            a = tl.load(a_ptr + m[:, None] * K + c[None, :])
            b = tl.load(b_ptr + n[None, :] * K + c[:, None])
        rows = n * 0 if FIRST_ROWS else n // 128
        a_scale = tl.load(a_scale_ptr + m * blocks + (0 if A == "first" else k), mask=m < M, other=0.0)
        b_scale = tl.load(b_scale_ptr + rows * stride + (0 if B == "first" else k), mask=n < N, other=0.0)
        if A == "none":
            a_scale = a_scale * 0 + 1
        if B == "none":
            b_scale = b_scale * 0 + 1
        if WHERE == "part":
            total += tl.dot(a, b) * (a_scale[:, None] * b_scale[None, :])
        else:
            total = tl.dot(a, b, total) * a_scale[:, None] * b_scale[None, :]
    at = c_ptr + m[:, None] * N + n[None, :]
    if MASK_STORE:
        tl.store(at, total, mask=(m[:, None] < M) & (n[None, :] < N))
    else:
        tl.store(at, total, mask=n[None, :] < N)


# ---- 3, the transposed pass ------------------------------------------------------------------------------------------


@jit
def transposed(x_ptr, qs_ptr, M, K, BLOCK: tl.constexpr, WRONG: tl.constexpr = ""):
    m = tl.program_id(0) * 128 + tl.arange(0, 128)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = x_ptr + m[:, None] * K + k[None, :]
    x = tl.load(at)
    if WRONG == "twice":
        x = (x + tl.load(at)) / 2
    amax = tl.max(tl.abs(x), axis=0)
    if WRONG == "block":
        amax = amax * 0 + tl.max(amax, axis=0)
    s = amax / 448 if WRONG == "zero" else tl.where(amax == 0, 1.0, amax / 448)
    wide = tl.broadcast_to(s[None, :], x.shape)
    if WRONG == "rows":  # one scale a token, of all its channels
        every = tl.load(x_ptr + m[:, None] * K + tl.arange(0, 2 * BLOCK)[None, :])
        wide = tl.broadcast_to((tl.max(tl.abs(every), axis=1) / 448)[:, None], x.shape)
    q = x * wide if WRONG == "times" else x / wide
    row = qs_ptr + k * (M + M // 128)
    tl.store(row[None, :] + m[:, None], q)
    if WRONG != "no scales":
        tl.store(row + M + tl.program_id(0), s * 1.06 if WRONG == "scales" else s)


# ---- 4, an order -----------------------------------------------------------------------------------------------------


def groups(m_tiles, n_tiles, rows=32, snake=False):
    """Columns of `rows` tiles, one group below the other; turning round at the end if asked."""
    tiles = []
    for number, first in enumerate(range(0, m_tiles, rows)):
        columns = range(n_tiles)[:: -1 if snake and number % 2 else 1]
        tiles += [(m, n) for n in columns for m in range(first, min(first + rows, m_tiles))]
    return tiles


RIGHT = [
    ("1", scaled), ("2", scaled), ("3", transposed), ("4", groups), ("4", lambda m, n: groups(m, n, 24, True)),
]  # fmt: skip


@inside
@pytest.mark.parametrize("number", "1234")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@inside
@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@inside
@pytest.mark.parametrize("wrong, hint", [
    (dict(WHERE="total"), "the total is scaled again each time"), (dict(B="none"), "the scale of B is missing"),
    (dict(A="none"), "the scale of A is missing"), (dict(B="first"), "B's scale changes along K"),
    (dict(A="first"), "A's scale changes along K"), (dict(FIRST_ROWS=True), "rows of b from 128 on"),
])  # fmt: skip
def test_wrong_repairs_are_named(lesson, wrong, hint):
    lesson.refuses("1", With(scaled, **wrong), hint)


@inside
@pytest.mark.parametrize("wrong, hint", [
    (dict(LAST=False), "the last, short stretch is missing"), (dict(STRIDE_DOWN=True), r"cdiv\(K, 128\) numbers"),
    (dict(FIRST_ROWS=True), "rows of b from 128 on"), (dict(B="none"), "the scale of B is missing"),
    (dict(A="none"), "the scale of A is missing"), (dict(MASK_STORE=False), "writes outside its result: mask the store"),
    (dict(MASK_LOAD=False), "something outside was read"),
])  # fmt: skip
def test_wrong_tails_are_named(lesson, wrong, hint):
    lesson.refuses("2", With(scaled, **wrong), hint)


@inside
@pytest.mark.parametrize("wrong, hint", [
    ("block", "one scale for a block"), ("rows", "one scale a token"), ("times", "divide by the scale"),
    ("zero", "0 / 0"), ("twice", "read each number once"), ("no scales", "parts were not written"),
    ("scales", "not equal"),
])  # fmt: skip
def test_wrong_transposed_passes_are_named(lesson, wrong, hint):
    lesson.refuses("3", With(transposed, WRONG=wrong), hint)


@inside
@pytest.mark.parametrize("wrong, hint", [
    (lambda m, n: groups(m, n, 1), "MB; what runs together should be"),
    (lambda m, n: groups(m, n)[1:], "tiles are missing"), (lambda m, n: groups(m, n) + [(0, 0)], "tiles come twice"),
    (lambda m, n: groups(m + 1, n), r"\(row, column\), from 0"),
])  # fmt: skip
def test_wrong_orders_are_named(lesson, wrong, hint):
    lesson.refuses("4", wrong, hint)


@inside
def test_a_changed_kernel_is_noticed(lesson):
    """What the notebook shows is what was measured: `as_measured` reads both texts."""
    def one_tile(x_ptr, q_ptr, s_ptr, tiles):
        return None

    with pytest.raises(AssertionError, match="one_tile was changed"):
        lesson.space["as_measured"](one_tile)


def test_the_notebook_asks_for_the_interpreter_before_triton_is_imported():
    import json

    cells = json.loads((NOTEBOOKS / "06_kernels.ipynb").read_text(encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert first.startswith('import os\n\nos.environ["TRITON_INTERPRET"] = "1"')
