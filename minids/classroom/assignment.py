"""From a lesson to an assignment: the same notebook, with nbgrader's metadata (schema 3) on its code cells.

    cell of the lesson     in the assignment                                    grade  solution  locked
    prose                  as it is, without metadata
    code                   read-only: restored when it is graded                  no      no      yes
    an exercise's stub     answer: the student's, with a region for the teacher's no      yes     no
    its check              test: points, between ``listen`` and ``settle``        yes     no      yes
    (if asked for)         an answer in words, after a research exercise        yes     yes     no

A stub is the function that the next check calls and that only returns None; where a broken one is to be repaired
(notebook 06), the last function before the check. What else stands in its cell goes into a read-only cell of its own, so
that no student can change a grader. Grade ids are the cells' ids. Outputs are left out. ``../figures`` becomes
``figures``: an assignment is a folder of its own, which gets copies of the files that its cells read.

Nothing of this touches the notebooks, and nothing of nbgrader is needed.
"""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

LEVELS = {"easy": 1, "medium": 2, "hard": 3, "research": 4}  # times the points of an easy exercise
HEADING = re.compile(r"\*\*Exercise (\d+) \((\w+)\)")
CHECK = re.compile(r'"exercise (\d+)')  # a check prints its exercise's number
FIGURES = re.compile(r'"\.\./(figures[^"]*)"')
NEIGHBOUR = re.compile(r"\]\((\d\d_\w+)\.ipynb\)")
HOME_ONLY = re.compile(r"^(# NBVAL_IGNORE_OUTPUT|assert not missing, .*)\n?", re.M)  # notebook 00 looks for its neighbours

ABOUT = """*This is an assignment. Points: {points}.*

*Replace what the exercises give you, keep the functions' names and arguments, and run the cell below each: it says what
is wrong. Everything else may be changed and added to while you try things. For grading, the lesson's own cells are put
back as they were and all cells run in order: an answer may use what the lesson defines, and a cell has {seconds} seconds.*
"""

REGION = """
### BEGIN SOLUTION
{}
### END SOLUTION"""
NO_SOLUTION = "# the teacher's answer: the function once more, complete; students do not get this region"


@dataclass(frozen=True)
class Exercise:
    """Where an exercise is: ``stub`` and ``check`` are indices of cells, ``name`` is the function asked for."""

    number: int
    level: str
    name: str
    stub: int
    check: int


@dataclass(frozen=True)
class Assignment:
    """name: the lesson's. notebook: nbformat 4.5 as a dict. data: files to copy, relative to the repository's root."""

    name: str
    notebook: dict
    exercises: list[Exercise]
    data: list[str] = field(default_factory=list)


def text(cell: dict) -> str:
    return "".join(cell["source"])


def find_exercises(cells: list[dict], lesson: str) -> list[Exercise]:
    """All exercises in order. Raises ValueError, with the lesson's name, where heading, stub and check do not fit."""
    prose = [(int(n), level, i) for i, cell in enumerate(cells) if cell["cell_type"] == "markdown"
             for n, level in HEADING.findall(text(cell))]  # fmt: skip
    levels = {n: level for n, level, _ in prose}
    if unknown := set(levels.values()) - set(LEVELS):
        raise ValueError(f"{lesson}: an exercise is one of {', '.join(LEVELS)}, got {', '.join(sorted(unknown))}")
    start, found = min((i for *_, i in prose), default=0), []
    for i, cell in enumerate(cells):
        numbers = {int(n) for n in CHECK.findall(text(cell))} if cell["cell_type"] == "code" else ()
        if not numbers:
            continue
        if len(numbers) > 1 or (number := min(numbers)) not in levels:
            raise ValueError(f"{lesson}: cell {cell['id']} checks exercises {sorted(numbers)}, allowed is one that has a"
                             f" heading: {sorted(levels)}")
        stub, name = find_stub(cells, start, i, f"{lesson}, exercise {number}")
        found.append(Exercise(number, levels[number], name, stub, i))
        start = i + 1
    if sorted(e.number for e in found) != sorted(levels):
        raise ValueError(f"{lesson}: headings of exercises {sorted(levels)}, checks of {[e.number for e in found]}")
    return found


def find_stub(cells: list[dict], start: int, check: int, where: str) -> tuple[int, str]:
    """The cell and the name of the function, defined in cells[start:check], that the check asks for."""
    used = {node.id for node in ast.walk(ast.parse(text(cells[check]))) if isinstance(node, ast.Name)}
    made = [(i, node) for i in range(start, check) if cells[i]["cell_type"] == "code"
            for node in ast.parse(text(cells[i])).body if isinstance(node, ast.FunctionDef)]
    made = [(i, node) for i, node in made if node.name in used]
    empty = [(i, node) for i, node in made if is_empty(node)]
    if not made or len(empty) > 1:
        names = [node.name for _, node in empty]
        raise ValueError(f"{where}: one function to be written is expected before its check, found {names}")
    i, node = (empty or made)[-1]
    return i, node.name


def is_empty(function: ast.FunctionDef) -> bool:
    """Whether a function does nothing but return None or NotImplemented; it may say what it is for."""
    body = function.body[ast.get_docstring(function) is not None :]
    return [ast.unparse(line) for line in body] in (["return None"], ["return NotImplemented"])


def split(source: str, name: str) -> tuple[str, str, str]:
    """What is before a function's definition (its decorators belong to it), the definition, and what is after it."""
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    lines = source.splitlines()
    return tuple("\n".join(part).strip("\n") for part in (
        lines[:first], lines[first : node.end_lineno], lines[node.end_lineno :]))


def code(cell_id: str, source: str, points: int | None = None, solution: bool = False, tags=()) -> dict:
    """A code cell with nbgrader's metadata: a test if it has points, an answer if it is a solution, else read-only."""
    graded = {"cell_type": "code", "grade": points is not None, "grade_id": cell_id, "locked": not solution,
              "schema_version": 3, "solution": solution, "task": False}  # fmt: skip
    if points is not None:
        graded["points"] = points
    metadata = {"deletable": False, "nbgrader": graded, **({"tags": list(tags)} if tags else {})}
    return {"cell_type": "code", "execution_count": None, "id": cell_id, "metadata": metadata, "outputs": [],
            "source": source.splitlines(True)}  # fmt: skip


def moved(source: str) -> str:
    """A lesson's code or prose as it must read in an assignment's own folder."""
    return NEIGHBOUR.sub(r"](../\1/\1.ipynb)", FIGURES.sub(r'"\1"', HOME_ONLY.sub("", source)))


def words(cell_id: str, number: int, points: int) -> dict:
    """A cell for an answer in words, which a teacher reads; nbgrader puts its own text there until a student writes."""
    graded = {"cell_type": "markdown", "grade": True, "grade_id": cell_id, "locked": False, "points": points,
              "schema_version": 3, "solution": True, "task": False}  # fmt: skip
    return {"cell_type": "markdown", "id": cell_id, "metadata": {"deletable": False, "nbgrader": graded},
            "source": [f"What you expect of an answer to the questions of exercise {number}."]}  # fmt: skip


def answer_cells(cell: dict, name: str, solution: str | None) -> list[dict]:
    """The student's cell, with read-only ones for what else is in the lesson's."""
    before, stub, after = split(text(cell), name)
    cells = [code(cell["id"], stub + REGION.format(solution or NO_SOLUTION), solution=True)]
    if before:
        cells.insert(0, code(f"{cell['id']}-given", moved(before)))
    return [*cells, code(f"{cell['id']}-more", moved(after))] if after else cells


def test_cell(cell: dict, number: int, points: int) -> dict:
    """A check that fails for an exercise that was not attempted."""
    return code(cell["id"], f"from minids.classroom import listen, settle\n\nlisten({number})\n\n{moved(text(cell))}\n\n"
                f"settle({number})  # fails unless the line above says: correct", points)  # fmt: skip


def convert(name: str, lesson: dict, points: int, seconds: int, written: int = 0, solved: dict | None = None) -> Assignment:
    """A lesson as an assignment.

    Args:
        name: of the lesson, for messages and for the assignment.
        lesson: the notebook, nbformat 4.5. It is not changed.
        points: of an easy exercise; others have ``LEVELS`` times as many.
        seconds: a cell's time limit, for the students to know.
        written: points for an answer in words to each research exercise's questions; 0 leaves it out.
        solved: the same notebook with some answers in place of stubs; they go where students do not see them.

    Raises:
        ValueError: heading, stub and check of an exercise do not fit, or ``solved`` lacks a cell.
    """
    cells = lesson["cells"]
    exercises = find_exercises(cells, name)
    stubs, checks = {e.stub: e for e in exercises}, {e.check: e for e in exercises}
    about = ABOUT.format(points=worth(exercises, points, written), seconds=seconds)
    out = [{"cell_type": "markdown", "id": "about-this-assignment", "metadata": {}, "source": about.splitlines(True)}]
    for i, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            out.append({**cell, "metadata": {}, "source": moved(text(cell)).splitlines(True)})
        elif i in stubs:
            out += answer_cells(cell, stubs[i].name, solution_of(solved, cell, name))
        elif i in checks:
            number, level = checks[i].number, checks[i].level
            out.append(test_cell(cell, number, points * LEVELS[level]))
            if written and level == "research":
                out.append(words(f"{cell['id']}-words", number, written))
        else:
            out.append(code(cell["id"], moved(text(cell)), tags=cell["metadata"].get("tags", ())))
    data = {path for cell in cells if cell["cell_type"] == "code" for path in FIGURES.findall(text(cell))}
    return Assignment(name, {**lesson, "cells": out}, exercises, sorted(data))


def worth(exercises: list[Exercise], points: int, written: int = 0) -> str:
    """All points in words: exercise 1: 10, exercise 2: 20 (70 in all)."""
    value = {f"exercise {e.number}": points * LEVELS[e.level] for e in exercises}
    if written:
        value |= {f"exercise {e.number} in words": written for e in exercises if e.level == "research"}
    return ", ".join(f"{name}: {p}" for name, p in value.items()) + f" ({sum(value.values())} in all)"


def solution_of(solved: dict | None, stub: dict, name: str) -> str | None:
    """A solved notebook's cell in place of this stub, or None where it is still the stub."""
    if solved is None:
        return None
    same = [text(cell) for cell in solved["cells"] if cell.get("id") == stub["id"]]
    if len(same) != 1:
        raise ValueError(f"solutions: {name}.ipynb must have one cell with the id {stub['id']}, it has {len(same)}")
    return None if same[0].strip() == text(stub).strip() else same[0].strip("\n")


def files_below(root: Path, data: list[str]) -> list[str]:
    """The files that ``data`` names, relative to ``root``; all files of a folder. Raises FileNotFoundError."""
    found = set()
    for path in data:
        if not (root / path).exists():
            raise FileNotFoundError(f"{root / path} is read by a cell and is not there")
        inside = (root / path).rglob("*") if (root / path).is_dir() else [root / path]
        found |= {file.relative_to(root).as_posix() for file in inside if file.is_file()}
    return sorted(found)
