"""Reading numbers and arithmetic that a model wrote, with a parser of our own: never ``eval`` [R1 2.2, rule-based rewards].

The problem: an answer is right if it *means* the wanted number, "0.50" as well as "1/2". Python's ``eval`` would find that
out, and would also compute ``9**9**9`` or delete a folder. The grammar here knows four operations, a sign and brackets:

    sum = product (("+" | "-") product)*        product = factor (("*" | "/") factor)*
    factor = "-" factor | "(" sum ")" | digits ["." digits]

Values are exact fractions. Length, digits and depth are bounded before any arithmetic, so that no text takes long. Only the
ten ASCII digits count: Python's int() would also take those of thirty other scripts.
"""

import re
from fractions import Fraction

MAX_LENGTH = 200  # characters of an expression
MAX_DIGITS = 30  # of one number
MAX_DEPTH = 20  # brackets and signs within each other
TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|[-+*/()]")


class NotArithmetic(ValueError):
    """The text is no expression of this grammar, or a too large one."""


def value(text: str) -> Fraction:
    """What the expression is worth. Raises NotArithmetic, which says why; a division by zero counts among them."""
    reader = _Reader(_tokens(text))
    result = reader.sum(0)
    if reader.tokens:
        raise NotArithmetic(f"unexpected {reader.tokens[-1]!r}")
    return result


def _tokens(text: str) -> list[str]:
    """In reverse order, so that the next one is popped from the end."""
    if len(text) > MAX_LENGTH:
        raise NotArithmetic(f"{len(text)} characters, allowed are {MAX_LENGTH}")
    tokens, position = [], 0
    while position < len(text):
        if text[position] == " ":
            position += 1
            continue
        match = TOKEN.match(text, position)
        if match is None:
            raise NotArithmetic(f"unexpected {text[position]!r}")
        if len(match[0]) > MAX_DIGITS:
            raise NotArithmetic(f"a number of {len(match[0])} characters, allowed are {MAX_DIGITS}")
        tokens.append(match[0])
        position = match.end()
    return tokens[::-1]


class _Reader:
    """One method a rule of the grammar."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens

    def next_is(self, symbols: str) -> bool:
        return bool(self.tokens) and self.tokens[-1] in symbols

    def sum(self, depth: int) -> Fraction:
        result = self.product(depth)
        while self.next_is("+-"):
            sign = 1 if self.tokens.pop() == "+" else -1
            result += sign * self.product(depth)
        return result

    def product(self, depth: int) -> Fraction:
        result = self.factor(depth)
        while self.next_is("*/"):
            operation, right = self.tokens.pop(), self.factor(depth)
            if operation == "/" and right == 0:
                raise NotArithmetic("a division by zero")
            result = result * right if operation == "*" else result / right
        return result

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise NotArithmetic(f"more than {MAX_DEPTH} brackets and signs within each other")
        if not self.tokens:
            raise NotArithmetic("the expression ends too early")
        token = self.tokens.pop()
        if token == "-":
            return -self.factor(depth + 1)
        if token == "(":
            result = self.sum(depth + 1)
            if not self.next_is(")"):
                raise NotArithmetic("a bracket is never closed")
            self.tokens.pop()
            return result
        if token in "+*/)":
            raise NotArithmetic(f"unexpected {token!r}")
        return Fraction(token)
