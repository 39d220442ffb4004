"""What a graded cell calls, so that a check of our notebooks gives points only for a right answer.

The problem: a check prints "exercise 2: not attempted yet" for a stub and ends without an error, since the notebooks
run as they are. nbgrader gives all points to a cell that ends without an error, and none to one that writes to stderr,
a mere warning included. So a graded cell reads

    listen(2)      from here on, what is printed is heard, and stderr goes where stdout goes
    ...            the notebook's check: it raises an AssertionError for a wrong answer
    settle(2)      raises one, too, unless "exercise 2: correct" was heard, and never "not attempted yet"

Simplifications: what a program writes past Python, to the file of stderr itself, is not heard. And this is no defence
against students who replace these functions; nbgrader runs their code in the same process.
"""

import re
import sys

VERDICT = r"exercise {}\b[^:\n]*: (correct|not attempted yet)"


class Heard:
    """A stream that passes on what is written and keeps it. Anything else is the stream's own."""

    def __init__(self, stream, kept: list[str]):
        self.stream, self.kept = stream, kept

    def write(self, text: str) -> int:
        self.kept.append(text)
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


_before: list = []  # stdout and stderr as they were; a check that fails leaves them to the next call


def listen(number: int) -> None:
    """Hears what is printed from now on. A check that failed in between is forgotten."""
    _restore()
    _before[:] = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = Heard(sys.stdout, [])


def settle(number: int) -> None:
    """Ends ``listen``. Raises AssertionError unless the check called exercise ``number`` correct, and nothing else."""
    heard = sys.stdout
    _restore()
    if not isinstance(heard, Heard):
        raise AssertionError(f"exercise {number}: run the whole cell, it begins with listen({number})")
    said = re.findall(VERDICT.format(number), "".join(heard.kept))
    assert "not attempted yet" not in said, f"exercise {number}: not attempted yet"
    assert said, f"exercise {number}: its check came to no verdict"


def _restore() -> None:
    if _before:
        sys.stdout, sys.stderr = _before
        _before.clear()
