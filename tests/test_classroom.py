"""The exercises as an nbgrader course: what is converted, what a graded cell does, and the whole way through nbgrader."""

import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minids.classroom import listen, settle
from minids.classroom.assignment import convert, files_below, find_exercises
from minids.classroom.course import LESSONS, ClassroomConfig, run_classroom
from minids.cli import main

ASKED = {  # level and function of every exercise, read in the notebooks
    "00_map": "easy cache_bytes, medium decode_crossover, research successor",
    "01_mla": "easy my_scale, medium my_latents, hard my_merged, research my_compress",
    "02_rope_yarn": "easy turns_within, medium ntk_base, research my_frequencies",
    "03_router": "easy my_router, medium my_bias, research my_floor",
    "04_mtp": "easy my_labels, medium my_join, medium my_mtp_term, research my_tokens_a_pass",
    "05_fp8": "easy my_e5m2, medium my_wgrad_scales, medium my_dgrad, research my_error",
    "06_kernels": "easy my_repair, medium my_tails, medium my_transposed, research my_order",
    "07_pretraining": "easy bits_per_byte, medium bias_change, research runs_needed",
    "09_dualpipe": "easy my_pairs, medium my_zb_h2, research my_cut",
    "11_inference": "easy my_rule, medium my_mask, research my_two",
    "12_grpo": "easy my_leave_one_out, medium my_dapo, research my_kl",
    "13_r1_pipeline": "easy my_language, medium my_judge_loss, research my_yield",
    "14_distillation": "easy my_labels, medium my_steps, medium my_soft_loss, research my_shares",
}
ALL = sorted(path.stem for path in LESSONS.glob("[0-9][0-9]_*.ipynb"))
POINTS = {"easy": 10, "medium": 20, "hard": 30, "research": 40}


def lesson(name):
    return json.loads((LESSONS / f"{name}.ipynb").read_text(encoding="utf-8"))


def text(cell):
    return "".join(cell["source"])


def codes(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def graded(cell):
    return cell["metadata"].get("nbgrader", {})


# ---- the notebooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_exercise_is_found(name):
    found = find_exercises(lesson(name)["cells"], name)
    assert [e.number for e in found] == list(range(1, len(found) + 1)) and len(found) >= 3
    if name in ASKED:
        assert ", ".join(f"{e.level} {e.name}" for e in found) == ASKED[name]


def check_schema(cell):
    """nbgrader's metadata, schema 3, written down once more."""
    meta = graded(cell)
    keys = {"grade", "grade_id", "locked", "schema_version", "solution", "task", "cell_type"}
    assert set(meta) == keys | ({"points"} if meta["grade"] else set())
    assert cell["metadata"]["deletable"] is False
    assert meta["schema_version"] == 3 and meta["task"] is False and meta["cell_type"] == cell["cell_type"]
    assert re.fullmatch(r"[A-Za-z0-9_-]+", meta["grade_id"]) and cell["id"] == meta["grade_id"]
    if cell["cell_type"] == "code":  # read-only, answer or test
        assert (meta["grade"], meta["solution"], meta["locked"]) in {
            (False, False, True), (False, True, False), (True, False, True)}
    else:  # in words
        assert (meta["grade"], meta["solution"], meta["locked"]) == (True, True, False)


@pytest.mark.parametrize("name", ALL)
def test_metadata(name):
    made = convert(name, lesson(name), 10, 90, written=5)
    cells = made.notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        if cell["cell_type"] == "code" or cell["metadata"]:
            check_schema(cell)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    tests = [cell for cell in codes(made.notebook) if graded(cell)["grade"]]
    answers = [cell for cell in codes(made.notebook) if graded(cell)["solution"]]
    assert [graded(cell)["points"] for cell in tests] == [POINTS[e.level] for e in made.exercises]
    for cell, exercise in zip(answers, made.exercises, strict=True):
        assert text(cell).split("### BEGIN SOLUTION")[0].count(f"def {exercise.name}(") == 1
    in_words = [graded(cell)["points"] for cell in cells if cell["cell_type"] == "markdown" and cell["metadata"]]
    assert in_words == [5] * sum(e.level == "research" for e in made.exercises)


def statements(sources):
    return [ast.dump(node) for source in sources for node in ast.parse(source).body]


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_lost_and_nothing_else_is_changed(name):
    """All statements of the lesson, in order; but for where figures lie, and the one about neighbouring notebooks."""
    made = convert(name, lesson(name), 10, 90)
    before = [text(cell).replace('"../figures', '"figures') for cell in codes(lesson(name))]
    before = [node for node in statements(before) if "not here: " not in node]
    extra = statements(["from minids.classroom import listen, settle"])
    extra += statements(f"{call}({n})" for call in ("listen", "settle") for n in range(1, 9))
    after = [node for node in statements(text(cell) for cell in codes(made.notebook)) if node not in extra]
    assert after == before
    begun = [re.findall(r"^(?:listen|settle)\((\d)\)", text(cell), re.M) for cell in codes(made.notebook)
             if graded(cell)["grade"]]  # fmt: skip
    assert begun == [[str(e.number)] * 2 for e in made.exercises]


@pytest.mark.parametrize("name", ALL)
def test_an_answer_holds_nothing_that_grades(name):
    """A student's cell has the one function; graders that the lesson keeps in the same cell are read-only."""
    for cell in codes(convert(name, lesson(name), 10, 90).notebook):
        if graded(cell)["solution"]:
            assert [type(node) for node in ast.parse(text(cell)).body] == [ast.FunctionDef]


def test_paths_and_links():
    made = {name: convert(name, lesson(name), 10, 90) for name in ALL}
    for one in made.values():
        assert not any("../figures" in text(cell) or "NBVAL" in text(cell) for cell in codes(one.notebook))
    assert made["07_pretraining"].data == ["figures/pretraining/seeds.json", "figures/pretraining/small.json"]
    assert "figures/bench/gpu.json" in files_below(LESSONS.parent, made["06_kernels"].data)
    assert "figures/rl/base/config.json" in files_below(LESSONS.parent, made["12_grpo"].data)
    assert "](../01_mla/01_mla.ipynb)" in json.dumps(made["00_map"].notebook)


# ---- what a graded cell does -----------------------------------------------------------------------------------------


def attempt(name, answers, space):
    """Runs the last part of an assignment, from its first answer on; {number: None or the exception of its test}."""
    made = convert(name, lesson(name), 10, 90)
    first = next(i for i, cell in enumerate(codes(made.notebook)) if graded(cell)["solution"])
    seen = []
    for cell in codes(made.notebook)[first:]:
        try:
            exec(text(cell), space)
            fault = None
        except AssertionError as error:
            fault = str(error)
        if graded(cell)["grade"]:
            seen.append(fault)
        space |= {name: answer for name, answer in answers.items() if name in space}
    return {exercise.number: fault for exercise, fault in zip(made.exercises, seen, strict=True)}


def needed(effect, spread):
    return math.ceil(8 * (spread / effect) ** 2 - 1e-9)


def test_an_exercise_counts_only_if_it_is_right():
    space = {"math": math, "np": np}
    assert attempt("07_pretraining", {}, dict(space)) == {n: f"exercise {n}: not attempted yet" for n in (1, 2, 3)}
    found = attempt("07_pretraining", {"bits_per_byte": lambda nats, size: nats / size, "runs_needed": needed}, dict(space))
    assert found == {1: "a bit is ln 2 nats", 2: "exercise 2: not attempted yet", 3: None}
    assert sys.stdout is not None and type(sys.stdout).__name__ != "Heard"


def told(*lines):
    listen(1)
    for line in lines:
        print(line)
    settle(1)


def test_verdicts(capsys):
    told("exercise 1: correct")
    told("much else", "exercise 1, depth 2: correct", "exercise 1: correct, 3 of 4")
    for lines, fault in [
        (["exercise 1: not attempted yet"], "exercise 1: not attempted yet"),
        (["exercise 1, depth 2: correct", "exercise 1, depth 1: not attempted yet"], "not attempted yet"),
        (["exercise 1: correct", "exercise 1: not attempted yet"], "not attempted yet"),  # the first line was the student's
        ([], "no verdict"), (["exercise 12: correct"], "no verdict"), (["correct"], "no verdict"),
    ]:
        with pytest.raises(AssertionError, match=fault):
            told(*lines)
    assert capsys.readouterr().out.startswith("exercise 1: correct\nmuch else\n"), "what is heard is printed as well"


def test_warnings_do_not_go_to_stderr(capsys):
    """nbgrader gives no points to a test with a line on stderr."""
    listen(3)
    print("a warning", file=sys.stderr)
    print("exercise 3: correct", flush=True)
    settle(3)
    print("later", file=sys.stderr)
    seen = capsys.readouterr()
    assert seen.out == "a warning\nexercise 3: correct\n" and seen.err == "later\n"


def test_a_check_that_fails_does_not_speak_for_the_next(capsys):
    out, err = sys.stdout, sys.stderr
    listen(1)
    print("exercise 2: correct")  # and then exercise 1 fails
    with pytest.raises(AssertionError, match="exercise 2: its check came to no verdict"):
        told_nothing = listen(2)
        settle(2)
    assert (sys.stdout, sys.stderr, told_nothing) == (out, err, None)
    with pytest.raises(AssertionError, match="run the whole cell"):
        settle(2)


# ---- the command -----------------------------------------------------------------------------------------------------

GRADE = '''import json
from pathlib import Path

right = json.loads(Path("../figures/numbers.json").read_text())


def grade(name, answer, wanted):
    if answer is None:
        return print(f"{name}: not attempted yet")
    assert answer == wanted, f"{name}: {answer}, not {wanted}"
    print(f"{name}: correct")'''
FIRST = "def double(x):\n    return None"
SECOND = 'def helper(x):\n    return right["two"] * x\n\n\ndef half(x):\n    """Half of x."""\n    return None'


def small(**replaced):
    """A lesson with two exercises; one stub shares its cell with a helper."""
    sources = {
        "s-0": "# Numbers\n\nSee [routing](03_router.ipynb).", "s-1": GRADE,
        "s-2": "**Exercise 1 (easy).** Twice x.\n\n**Exercise 2 (research).** Half of x. Why?",
        "s-3": FIRST, "s-4": 'grade("exercise 1", double(3), right["six"])',
        "s-5": SECOND, "s-6": 'import warnings\n\nwarnings.warn("loud")\ngrade("exercise 2", half(helper(3)), 3)',
    } | replaced  # fmt: skip
    cells = [{"id": name, "metadata": {}, "source": source.splitlines(True)}
             | ({"cell_type": "markdown"} if name in ("s-0", "s-2") else
                {"cell_type": "code", "execution_count": 7, "outputs": [
                    {"output_type": "stream", "name": "stdout", "text": ["old\n"]}]})
             for name, source in sources.items()]  # fmt: skip
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}}


@pytest.fixture
def lessons(tmp_path):
    folder = tmp_path / "repository" / "notebooks"
    (folder.parent / "figures").mkdir(parents=True)
    (folder.parent / "figures/numbers.json").write_text('{"two": 2, "six": 6}')
    folder.mkdir()
    (folder / "20_numbers.ipynb").write_text(json.dumps(small()))
    (folder / "21_talk.ipynb").write_text(json.dumps({**small(), "cells": small()["cells"][:1]}))
    return folder


def made(folder, name="20_numbers"):
    return json.loads((folder / "source" / name / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_a_course_is_written(lessons, tmp_path, capsys, monkeypatch):
    out = tmp_path / "course"
    main(["classroom", "--out", str(out), "--lessons", str(lessons), "--points", "3"])
    assert "exercise 1: 3, exercise 2: 12 (15 in all)" in capsys.readouterr().out
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["nbgrader_config.py", "source/20_numbers/20_numbers.ipynb", "source/20_numbers/figures/numbers.json"]
    assert [cell["id"] for cell in made(out)["cells"]] == [
        "about-this-assignment", "s-0", "s-1", "s-2", "s-3", "s-4", "s-5-given", "s-5", "s-6"]
    assert "old" not in json.dumps(made(out)) and "15 in all" in text(made(out)["cells"][0])
    loader = pytest.importorskip("traitlets.config", reason="comes with jupyter").PyFileConfigLoader
    monkeypatch.setenv("CI", "")  # the settings set it
    settings = loader("nbgrader_config.py", path=str(out)).load_config()
    assert settings.CourseDirectory.root == str(out) and settings.Execute.timeout == 90
    assert settings.LockCells.lock_readonly_cells is False  # else students could not try anything


@pytest.mark.parametrize("args, told", [
    (["--notebooks", "20", "99", "router"], "there is no 99, router; there are 20_numbers, 21_talk"),
    (["--notebooks", "21"], "21_talk has no exercises"),
    (["--points", "0"], "points must be a whole number of at least 1, got 0"),
    (["--written", "-1"], "written must be a number of points"),
    (["--solutions", "nowhere"], "solutions must be a folder of notebooks, got 'nowhere'"),
    (["--solutions", "."], "holds none of 20_numbers"),
    (["--lessons", "nowhere"], "no notebooks in nowhere"),
])  # fmt: skip
def test_bad_requests_are_refused_before_anything_is_written(lessons, tmp_path, capsys, monkeypatch, args, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["classroom", "--out", "course", "--lessons", str(lessons), *args])
    assert stop.value.code == 2 and told in capsys.readouterr().err
    assert not Path("course").exists()


def test_missing_figures_are_found_before_anything_is_written(lessons, tmp_path):
    (lessons.parent / "figures/numbers.json").unlink()
    with pytest.raises(FileNotFoundError, match="numbers.json is read by a cell"):
        run_classroom(ClassroomConfig(out=tmp_path / "course", lessons=lessons))
    assert not (tmp_path / "course").exists()


def test_existing_folders(lessons, tmp_path):
    out = tmp_path / "course"
    config = ClassroomConfig(out=out, lessons=lessons)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        run_classroom(config)
    with pytest.raises(FileExistsError, match="no course to be overwritten"):
        run_classroom(ClassroomConfig(out=out, lessons=lessons, overwrite=True))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        run_classroom(ClassroomConfig(out=out / "thesis.txt", lessons=lessons))


def test_overwriting_keeps_what_is_the_teachers(lessons, tmp_path):
    out = tmp_path / "course"
    run_classroom(ClassroomConfig(out=out, lessons=lessons))
    mine = {"nbgrader_config.py": "c = 1", "gradebook.db": "grades", "submitted/ada/20_numbers/20_numbers.ipynb": "hers",
            "source/my_own/my_own.ipynb": "own"}  # fmt: skip
    for name, content in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    run_classroom(ClassroomConfig(out=out, lessons=lessons, overwrite=True, points=7))
    assert {name: (out / name).read_text() for name in mine} == mine
    assert [graded(cell)["points"] for cell in codes(made(out)) if graded(cell)["grade"]] == [7, 28]
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("replaced, fault", [
    ({"s-2": "**Exercise 1 (easy).**"}, r"cell s-6 checks exercises \[2\]"),
    ({"s-2": "**Exercise 1 (easy).** **Exercise 2 (tricky).**"}, "easy, medium, hard, research, got tricky"),
    ({"s-2": "**Exercise 1 (easy).** **Exercise 2 (easy).** **Exercise 3 (easy).**"}, r"headings of exercises \[1, 2, 3\]"),
    ({"s-3": "double = None"}, "exercise 1: one function to be written"),
    ({"s-5": SECOND.replace('right["two"] * x', "None")}, r"exercise 2: .* found \['helper', 'half'\]"),
    ({"s-6": 'grade("exercise 1", half(helper(3)), 3)\ngrade("exercise 2", 1, 1)'}, r"s-6 checks exercises \[1, 2\]"),
])  # fmt: skip
def test_lessons_that_do_not_fit_are_refused(replaced, fault):
    with pytest.raises(ValueError, match=f"20_numbers.*{fault}"):
        convert("20_numbers", small(**replaced), 10, 90)


def test_a_stub_between_other_definitions():
    """Decorators are the stub's; what is above and below it is the lesson's, and so is the answer to exercise 1."""
    between = '@staticmethod\ndef half(x):\n    return None\n\n\nlater = {"three": 3}'
    page = small(**{"s-5": "low = 1\n\n\n" + between, "s-6": 'grade("exercise 2", half(double(low)), later["three"])'})
    cells = convert("20_numbers", page, 10, 90).notebook["cells"]
    found = {cell["id"]: text(cell).split("\n###")[0] for cell in cells if cell["id"].startswith("s-5")}
    assert found == {"s-5-given": "low = 1", "s-5": between.split("\n\n\n")[0], "s-5-more": 'later = {"three": 3}'}


def test_only_notebooks_with_cell_ids(lessons, tmp_path):
    (lessons / "20_numbers.ipynb").write_text(json.dumps({**small(), "nbformat_minor": 4}))
    with pytest.raises(ValueError, match="nbformat 4.4"):
        run_classroom(ClassroomConfig(out=tmp_path / "course", lessons=lessons))
    (lessons / "20_numbers.ipynb").write_text("[]")
    with pytest.raises(ValueError, match="20_numbers.ipynb is no notebook"):
        run_classroom(ClassroomConfig(out=tmp_path / "course", lessons=lessons))


# ---- with nbgrader ---------------------------------------------------------------------------------------------------

RIGHT = {"s-3": 'def double(x):\n    print("exercise 1: wait")\n    return 2 * x', "s-5": "def half(x):\n    return x / 2"}
WRONG = {"s-3": 'def double(x):\n    print("exercise 1: correct")\n    return 3 * x',
         "s-5": 'def half(x):\n    print("exercise 2: correct")'}  # fmt: skip


def test_solutions_go_into_the_region(lessons, tmp_path):
    solved = tmp_path / "solved"
    solved.mkdir()
    (solved / "20_numbers.ipynb").write_text(json.dumps(small(**{"s-3": RIGHT["s-3"]})))
    run_classroom(ClassroomConfig(out=tmp_path / "course", lessons=lessons, solutions=solved))
    first, second = (text(cell) for cell in codes(made(tmp_path / "course")) if graded(cell)["solution"])
    assert first == f"{FIRST}\n### BEGIN SOLUTION\n{RIGHT['s-3']}\n### END SOLUTION"
    assert second.startswith("def half(x):") and second.count("def half(") == 1, "exercise 2 is not solved"
    cells = [cell for cell in small()["cells"] if cell["id"] != "s-5"]
    (solved / "20_numbers.ipynb").write_text(json.dumps({**small(), "cells": cells}))
    with pytest.raises(ValueError, match="20_numbers.ipynb must have one cell with the id s-5, it has 0"):
        run_classroom(ClassroomConfig(out=tmp_path / "other", lessons=lessons, solutions=solved))


def submit(course, student, answers, tamper=False):
    """A student's notebook: the released one with other answers, and perhaps with everything else spoiled."""
    page = json.loads((course / "release/20_numbers/20_numbers.ipynb").read_text())
    for cell in codes(page):
        cell["source"] = answers.get(cell["id"], cell["source"])
        if tamper and graded(cell)["locked"]:
            cell["source"], cell["metadata"]["tags"] = ["right = {}"], ["skip-execution"]
    if student == "dee":  # answers the research question in words, too
        page["cells"][-1]["source"] = "Because."
    folder = course / "submitted" / student / "20_numbers"
    folder.mkdir(parents=True)
    (folder / "20_numbers.ipynb").write_text(json.dumps(page))


def nbgrader(course, *args):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # it calls alembic
    run = subprocess.run([sys.executable, "-m", "nbgrader", *args], cwd=course, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nbgrader") is None, reason="needs nbgrader: pip install nbgrader==0.9.6")
def test_the_whole_way_through_nbgrader(lessons, tmp_path):
    from nbgrader.api import Gradebook

    course, solved = tmp_path / "course", tmp_path / "solved"
    solved.mkdir()
    (solved / "20_numbers.ipynb").write_text(json.dumps(small(**RIGHT)))
    run_classroom(ClassroomConfig(out=course, lessons=lessons, solutions=solved, written=5))
    assert "Success" in nbgrader(course, "validate", "source/20_numbers/20_numbers.ipynb")
    nbgrader(course, "generate_assignment", "20_numbers")
    released = json.loads((course / "release/20_numbers/20_numbers.ipynb").read_text())
    assert {cell["id"]: text(cell).strip() for cell in codes(released) if graded(cell)["solution"]} == {
        "s-3": FIRST, "s-5": SECOND.split("\n\n\n")[1]}
    frozen = {cell["id"] for cell in codes(released) if cell["metadata"].get("editable") is False}
    assert frozen == {"s-4", "s-6"}
    assert "failed" in nbgrader(course, "validate", "release/20_numbers/20_numbers.ipynb"), "a stub is not an answer"
    submit(course, "ada", RIGHT)
    submit(course, "ben", WRONG)
    submit(course, "cem", {})
    submit(course, "dee", RIGHT, tamper=True)
    submit(course, "eve", {**WRONG, "s-3": "def double(x):\n    while True:\n        pass"}, tamper=True)
    nbgrader(course, "autograde", "20_numbers", "--Execute.timeout=5")
    nbgrader(course, "generate_feedback", "20_numbers")
    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        scores = {s.student.id: {g.name: g.auto_score for n in s.notebooks for g in n.grades}
                  for s in book.assignment_submissions("20_numbers")}  # fmt: skip
    none = {"s-4": 0, "s-6": 0, "s-6-words": 0}
    assert scores == {"ada": {"s-4": 10, "s-6": 40, "s-6-words": 0}, "ben": none, "cem": none,
                      "dee": {"s-4": 10, "s-6": 40, "s-6-words": None}, "eve": none}  # None: a teacher reads it
    assert "exercise 2: not attempted yet" in (course / "feedback/cem/20_numbers/20_numbers.html").read_text()
