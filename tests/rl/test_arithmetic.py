"""The parser against Python's own arithmetic on expressions that are made here, and against nonsense."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids.rl.arithmetic import NotArithmetic, value

leaves = st.integers(0, 999).map(lambda n: (str(n), Fraction(n)))


def join(children):
    def build(operation, left, right):
        (a, x), (b, y) = left, right
        if operation == "/" and y == 0:
            operation = "+"
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[operation]
        return f"({a} {operation}{b})", result

    return st.builds(build, st.sampled_from("+-*/"), children, children)


@given(st.recursive(leaves, join, max_leaves=8))
def test_bracketed_expressions(made):
    text, wanted = made
    assert value(text) == wanted
    assert value(f"-{text}") == -wanted


@pytest.mark.parametrize(("text", "wanted"), [
    ("1+2*3", 7), ("8-3-2", 3), ("8/4/2", 1), ("2*-3", -6), ("--4", 4), ("0.5", Fraction(1, 2)),
    (" 1 / 3 ", Fraction(1, 3)), ("10.250", Fraction(41, 4)), ("007", 7), ("-(1+2)*3-4/2", -11),
])  # fmt: skip
def test_precedence_and_signs(text, wanted):
    assert value(text) == wanted


@pytest.mark.parametrize("text", [
    "", " ", "+", "1+", "*2", "+2", "(1", "1)", "()", "2 ** 3", "9**9**9", "9" * 31, "1" * 201, "-" * 100 + "1",
    "(" * 100 + "1", "1 0",
    "1/0", "1/(2-2)", "1e9", "0x10", "1_000", "1.", ".5", "1.2.3", "1,5", "٣", "３", "²", "½", "nan", "inf", "True", "x",
    "1=1",
    "__import__('os')", "1;2", "1\n+\n2", "lambda: 1", "\x00", "5//2", "7%3", "1<2",
])  # fmt: skip
def test_everything_else_is_refused_at_once(text):
    started = time.monotonic()
    with pytest.raises(NotArithmetic):
        value(text)
    assert time.monotonic() - started < 0.5


def test_products_stay_small():
    assert value("*".join(["9" * 20] * 9)) == int("9" * 20) ** 9
