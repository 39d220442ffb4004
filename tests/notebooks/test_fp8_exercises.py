"""The checks of notebook 05's exercises: silent on stubs, right answers pass, the usual mistakes are named."""

import math

import numpy as np
import pytest
import torch
from exercises import Lesson


@pytest.fixture(scope="module")
def lesson():
    return Lesson("05_fp8", {"1": "my_e5m2", "2": "my_wgrad_scales", "3": "my_dgrad", "4": "my_error"})


# ---- 1, E5M2 ---------------------------------------------------------------------------------------------------------


def e5m2(x, nearest=round, sign=True, subnormal=True, saturate=True, bias=15, mantissa=2):
    """By searching: the numbers in order of their codes, and the nearest one."""
    size = min(abs(x), 57344.0) if saturate else abs(x)
    if size > 57344:
        code = 0x7C
    elif not subnormal and size < 2.0**-14:
        code = 0
    else:
        grid = [m / 4 * 2.0**-14 for m in range(4)]
        grid += [(1 + m / 4) * 2.0 ** (e - 15) for e in range(1, 31) for m in range(4)]
        low = max(i for i, value in enumerate(grid) if value <= size)
        part = (size - grid[low]) / (grid[low + 1] - grid[low]) if low + 1 < len(grid) else 0
        code = low + (nearest(low + part) - low)
    if bias != 15 and size > 0:
        code -= (15 - bias) * 4
    return code + (128 if sign and math.copysign(1, x) < 0 else 0)


# ---- 2, scales for the weight gradient -------------------------------------------------------------------------------


def wgrad_scales(dy, turn=np.ceil, zero=1.0):
    found = np.full((-(-len(dy) // 128), dy.shape[1]), zero, np.float32)
    for i, j in np.ndindex(*found.shape):
        peak = float(dy[128 * i : 128 * (i + 1), j].abs().max())
        if peak:
            found[i, j] = 2.0 ** turn(math.log2(peak / 448))
    return torch.tensor(found)


def along_rows(dy):
    return wgrad_scales(dy.T).T


# ---- 3, the input gradient -------------------------------------------------------------------------------------------


def dgrad(qd, sd, qw, sw, gradient=True, weight=True, twice=False, transposed=False, invert=False):
    """Block by block."""
    out = torch.zeros(len(qd), qw.shape[1])
    for i in range(sw.shape[0]):
        for j in range(sw.shape[1]):
            rows, columns = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            part = qd[:, rows] @ qw[rows, columns]
            s = sw[j, i] if transposed else sw[i, j]
            s = (1 / s if invert else s) ** (2 if twice else 1)
            d = 1 / sd[:, i] if invert else sd[:, i]
            out[:, columns] += part * (d[:, None] if gradient else 1) * (s if weight else 1)
    return out


def one_scale(qd, sd, qw, sw):
    return dgrad(qd, sd[:, :1].expand_as(sd), qw, sw[:1].expand_as(sw))


# ---- 4, the error of a long sum --------------------------------------------------------------------------------------


def mean_loss() -> float:
    """Half a last digit over a number from 1 to 2, in units of 2^-(bits - 1), numbers log-uniform."""
    x = np.exp2((np.arange(10_000) + 0.5) / 10_000)
    return float((0.5 / x).mean())


def predicted(k, bits, every):
    steps = (every or k) / 32
    lost = sum(mean_loss() * step / steps for step in range(1, round(steps) + 1))
    return lost * 2.0 ** -(bits - 1)


RIGHT = [("1", e5m2), ("2", wgrad_scales), ("3", dgrad), ("4", predicted)]


@pytest.mark.parametrize("number", "1234")
def test_a_stub_is_not_a_failure(lesson, capsys, number):
    lesson.silent(number, capsys)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_right_answers_pass(lesson, capsys, number, answer):
    lesson.accepts(number, answer, capsys)


@pytest.mark.parametrize("slip, hint", [
    (dict(nearest=math.floor), "cut off: round to the nearest"),
    (dict(nearest=lambda v: math.floor(v + 0.5)), "halves go to the even code"),
    (dict(sign=False), "the sign is missing"),
    (dict(subnormal=False), "there are subnormal numbers"),
    (dict(saturate=False), "0x7C is infinity; saturate"),
    (dict(bias=7), "the bias is 15, not 7"),
])  # fmt: skip
def test_mistakes_in_rounding_are_named(lesson, slip, hint):
    lesson.refuses("1", lambda x: e5m2(x, **slip), hint)


def without_carry(x, kept):
    """The mantissa is rounded to eighths of its own binade and then cut to its two bits, or held at the largest."""
    size = min(abs(x), 57344.0)
    step = 2.0 ** (max(math.frexp(size)[1] - 1, -14) - 2) if size else 2.0**-16
    n, field = round(size / step), int(math.log2(step)) + 16
    full = 4 if size < 2.0**-14 else 8
    n = {"cut": n - 4, "held": n - 1}[kept] if n == full else n
    return 4 * field + n + (128 if math.copysign(1, x) < 0 else 0)


@pytest.mark.parametrize("wrong, hint", [
    (lambda x: without_carry(x, "cut"), "the carry goes to the exponent"),
    (lambda x: without_carry(x, "held"), "the next power's first"),
    (lambda x: e5m2(x) if x or math.copysign(1, x) > 0 else 0, "-0.0 has a sign too"),
    (lambda x: e5m2(x) + 1, "not equal"),
])  # fmt: skip
def test_carries_and_signs_of_zero_are_asked(lesson, wrong, hint):
    lesson.refuses("1", wrong, hint)


def test_e4m3_is_recognised(lesson):
    e4m3 = lesson.space["encode_draft"]
    lesson.refuses("1", e4m3, "that is E4M3")


@pytest.mark.parametrize("wrong, hint", [
    (lambda dy: wgrad_scales(dy, np.floor), "rounded down: the largest overflows"),
    (lambda dy: wgrad_scales(dy, np.round), "rounded to nearest: half of them overflow"),
    (lambda dy: wgrad_scales(dy, zero=0.0), "a scale of 0"),
    (lambda dy: wgrad_scales(dy, zero=math.nan), "a scale of NaN where all is zero"),
    (lambda dy: wgrad_scales(dy, lambda e: math.floor(e) + 1), "448 s exactly fits"),
    (lambda dy: wgrad_scales(dy.clamp(min=0)), "whatever its sign"),
    (lambda dy: wgrad_scales(448 * dy), "448 is what must not be exceeded"),
    (lambda dy: wgrad_scales(dy, lambda e: e), "no powers of two"),
    (lambda dy: wgrad_scales(dy).T, "transposed"),
    (lambda dy: 1 / wgrad_scales(dy), "what to multiply with when quantising"),
    (lambda dy: wgrad_scales(dy)[[0, 0]], "the second stretch has its own scales"),
    (along_rows, "Wgrad sums over tokens"),
    (lambda dy: wgrad_scales(dy)[:1], r"not equal; \(1, 256\) is what came, \(2, 256\) what should"),
])  # fmt: skip
def test_mistakes_in_scales_are_named(lesson, wrong, hint):
    lesson.refuses("2", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda *a: dgrad(*a, twice=True), "the weight's scale twice"),
    (lambda qd, sd, qw, sw: dgrad(qd, sd * sd, qw, sw), "the gradient's scale twice"),
    (lambda *a: dgrad(*a, weight=False), "the weight's scale is missing"),
    (lambda *a: dgrad(*a, gradient=False), "the gradient's scale is missing"),
    (lambda *a: dgrad(*a, transposed=True), r"sw is \(n, k\)"),
    (one_scale, "one scale for the whole sum"),
    (lambda *a: dgrad(*a, invert=True), "scale_inv is multiplied"),
    (lambda qd, sd, qw, sw: qd @ qw, "not equal"),
])  # fmt: skip
def test_mistakes_in_the_product_are_named(lesson, wrong, hint):
    lesson.refuses("3", wrong, hint)


@pytest.mark.parametrize("wrong, hint", [
    (lambda k, bits, every: 2 * predicted(k, bits, every), "the sum grows from zero"),
    (lambda k, bits, every: (every or k) / 32 * 2.0 ** (1 - bits), "half a last digit in the mean"),
    (lambda k, bits, every: 0.36 * ((every or k) / 32) ** 0.5 * 2.0 ** (1 - bits), "no random walk"),
    (lambda k, bits, every: predicted(k, bits, None), "4096, 14, 128"),
    (lambda k, bits, every: predicted(k, 14, every), "2048, 12, None"),
    (lambda k, bits, every: 0.0, "4096, 14, None"),
    (lambda k, bits, every: -predicted(k, bits, every), "positive"),
    (lambda k, bits, every: 100 * predicted(k, bits, every), "a fraction, not percent"),
])  # fmt: skip
def test_mistakes_in_the_prediction_are_named(lesson, wrong, hint):
    lesson.refuses("4", wrong, hint)
