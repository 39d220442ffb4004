"""What the tests of all notebooks' exercises share.

An exercise is a stub that returns None and, below it, a cell that checks it: silent on the stub, content with any right
answer, and able to name the usual mistakes. ``Lesson`` runs a notebook's cells in one namespace, without those tagged
'slow', which no other cell needs, and then runs a check again with an answer in place of its stub.
"""

import json
import linecache
import os
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CHECK = re.compile(r'"exercise (\d)')  # a check prints its exercise's number


class Lesson:
    """A notebook's names and the checks of its exercises.

    notebook: file name without .ipynb. stubs: {"1": "my_router", ...}, the name that each exercise asks for. needed: run
    only cells with one of these words in their source or id, beside stubs and checks; default all that are not slow.
    missing: names of slow cells that quick ones may lack. given: names known before the first cell.
    """

    def __init__(self, notebook, stubs, needed=None, missing=(), given=None):
        self.stubs, self.needed, self.missing = stubs, needed, set(missing)
        self.space, self.checks = {"display": lambda figure: None, **(given or {})}, {}
        here = os.getcwd()
        os.chdir(NOTEBOOKS)  # cells read ../figures
        try:
            for cell in json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]:
                if cell["cell_type"] == "code" and "slow" not in cell["metadata"].get("tags", []):
                    self._run(cell["id"], "".join(cell["source"]))
        finally:
            os.chdir(here)
        assert sorted(self.checks) == sorted(stubs), f"{notebook}: checks of {sorted(self.checks)}, not {sorted(stubs)}"
        for number, name in stubs.items():
            assert name in self.space and name in self.checks[number], f"exercise {number} does not ask for {name}"

    def _run(self, name, source):
        numbers = set(CHECK.findall(source))
        words = (*(f"def {stub}(" for stub in self.stubs.values()), "def grade(", *(self.needed or ()))
        if self.needed is not None and not numbers and not any(word in name + source for word in words):
            return
        linecache.cache[name] = len(source), None, source.splitlines(True), name  # for those who read a function's text
        try:
            exec(compile(source, name, "exec"), self.space)
        except NameError as error:
            assert error.name in self.missing, f"{name}: {error}"
        for number in numbers & set(self.stubs):
            self.checks[number] = source

    def attempt(self, number, answer):
        """The check of an exercise, with ``answer`` in place of its stub."""
        exec(compile(self.checks[number], f"exercise {number}", "exec"), {**self.space, self.stubs[number]: answer})

    def silent(self, number, capsys):
        """The notebook's own stub is no failure, and no success either."""
        capsys.readouterr()
        self.attempt(number, self.space[self.stubs[number]])
        assert_lines(capsys, number, "not attempted yet")

    def accepts(self, number, answer, capsys):
        """A right answer passes."""
        capsys.readouterr()
        self.attempt(number, answer)
        assert_lines(capsys, number, "correct")

    def refuses(self, number, answer, hint):
        """A wrong answer fails, and its mistake is named: ``hint`` is a regular expression."""
        with pytest.raises(AssertionError, match=hint):
            self.attempt(number, answer)


def assert_lines(capsys, number, verdict):
    """All that was printed are lines "exercise 2...: verdict..."; there is at least one."""
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(re.match(rf"exercise {number}[^:]*: {verdict}", line) for line in lines), lines
