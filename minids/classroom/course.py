"""``python -m minids classroom``: writes an nbgrader course, one assignment a notebook.

    OUT/nbgrader_config.py                     the few settings in which our course differs from nbgrader's defaults
    OUT/source/03_router/03_router.ipynb       a lesson with graded exercises (see `assignment.py`)
    OUT/source/03_router/figures/...           copies of what its cells read

Then, in OUT, with nbgrader, which requirements.txt installs:

    nbgrader generate_assignment 03_router     the students' version, in release/; hand it out from there,
    nbgrader release_assignment 03_router      or through nbgrader's exchange
    nbgrader autograde 03_router               runs submitted/STUDENT/03_router/03_router.ipynb
    nbgrader generate_feedback 03_router       a page a student, in feedback/
    nbgrader export                            all points as a table

Students need minids as well; for `nbgrader validate` on their side, whose limit is 30 s a cell, they set
``c.Execute.timeout`` as the course does. Grading runs the whole lesson, 10 to 110 s on one core, and with it whatever a
student wrote, with the rights of who grades: do it in a container or an account that holds nothing else.

Simplifications: an existing assignment is replaced as a folder, not merged with what a teacher changed in it. And checks
show what they compare with, as in the notebooks: these are assignments to learn from, no examination.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from minids.classroom.assignment import Assignment, convert, files_below, worth
from minids.folder import replace_folder

LESSONS = Path(__file__).parents[2] / "notebooks"
SECONDS = 90  # what a cell of our notebooks may take
CONFIG = f'''"""nbgrader's settings for this course. It is yours: it is written once and never again."""

import os
import secrets

os.environ["CI"] = "1"  # no progress bars on the pages of feedback
c = get_config()  # noqa: F821  nbgrader gives it

c.CourseDirectory.course_id = "minids"
c.CourseDirectory.root = os.path.dirname(os.path.abspath(__file__))
c.ClearSolutions.code_stub = {{"python": ""}}  # stubs are in the cells already
c.ClearSolutions.text_stub = "*Your answer to the questions, in words.*"
c.LockCells.lock_readonly_cells = False  # students may try things in the lesson; grading puts its cells back
c.Execute.timeout = {SECONDS}  # seconds a cell; nbgrader's 30 are too few
c.Execute.skip_cells_with_tag = secrets.token_hex()  # or a tag would make nbgrader skip a test and give its points
'''


@dataclass
class ClassroomConfig:
    """What to hand out, and for how many points."""

    out: Path = Path("course")
    """The course's folder, in which nbgrader is run; minids/classroom/course.py lists its commands."""
    notebooks: tuple[str, ...] = ()
    """Numbers or names, such as 03 06_kernels; all that have exercises if none is given."""
    points: int = 10
    """Points of an easy exercise; medium ones have twice as many, hard ones three and research ones four times."""
    written: int = 0
    """Points for an answer in words to a research exercise's questions, which a teacher grades; 0 leaves it out."""
    solutions: Path | None = None
    """A folder of the same notebooks with exercises solved in place: the answers go where students do not see them."""
    overwrite: bool = False
    """Replace assignments in an existing course; its settings, gradebook and submissions stay."""
    lessons: Path = LESSONS
    """The folder of the notebooks; files that they read are looked for beside it."""


def choose(asked: tuple[str, ...], lessons: Path) -> list[Path]:
    """The notebooks asked for, in the course's order. Raises FileNotFoundError or ValueError, naming what there is."""
    known = sorted(lessons.glob("[0-9][0-9]_*.ipynb"))
    if not known:
        raise FileNotFoundError(f"lessons: no notebooks in {lessons}; give the folder of a clone of the repository")
    names = {alias: path for path in known for alias in (path.stem, path.stem[:2], path.name)}
    if unknown := [name for name in asked if name not in names]:
        raise ValueError(f"notebooks: there is no {', '.join(unknown)}; there are {', '.join(p.stem for p in known)}")
    return sorted({names[name] for name in asked}) if asked else known


def read(path: Path) -> dict:
    """A notebook as a dict. Raises ValueError where it is none of format 4.5, whose cells have ids."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        version = notebook["nbformat"], notebook["nbformat_minor"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no notebook: {error!r}") from error
    if version < (4, 5):
        raise ValueError(f"{path} has nbformat {version[0]}.{version[1]}, cells have ids from 4.5 on")
    return notebook


def check_config(config: ClassroomConfig) -> None:
    """Everything about numbers and folders that can be refused before a notebook is read."""
    if config.points < 1:
        raise ValueError(f"points must be a whole number of at least 1, got {config.points}")
    if config.written < 0:
        raise ValueError(f"written must be a number of points, or 0 for no such cells, got {config.written}")
    if config.solutions is not None and not config.solutions.is_dir():
        raise FileNotFoundError(f"solutions must be a folder of notebooks, got {str(config.solutions)!r}")
    out = config.out
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out must be a folder, {str(out)!r} is a file")
    if out.exists() and any(out.iterdir()):
        if not config.overwrite:
            raise FileExistsError(f"out: {str(out)!r} is not empty; give another folder, or --overwrite for a course")
        if not (out / "nbgrader_config.py").is_file():
            raise FileExistsError(f"out: {str(out)!r} holds no nbgrader_config.py, so it is no course to be overwritten")


def assignments(config: ClassroomConfig) -> list[Assignment]:
    """All that is asked for, converted. Raises ValueError for a notebook asked for that has no exercises."""
    made = []
    for path in choose(config.notebooks, config.lessons):
        solved = config.solutions and config.solutions / path.name
        answers = read(solved) if solved and solved.is_file() else None
        assignment = convert(path.stem, read(path), config.points, SECONDS, config.written, answers)
        if assignment.exercises:
            made.append(assignment)
        elif config.notebooks:
            raise ValueError(f"notebooks: {path.stem} has no exercises")
    if config.solutions is not None and not any((config.solutions / f"{a.name}.ipynb").is_file() for a in made):
        raise FileNotFoundError(f"solutions: {config.solutions} holds none of {', '.join(a.name for a in made)}")
    return made


def write(assignment: Assignment, folder: Path, root: Path, overwrite: bool) -> None:
    """One assignment's folder, whole or not at all; ``root`` is where its data are copied from."""
    with replace_folder(folder, lambda _: overwrite, "assignment that may be replaced") as partial:
        for file in files_below(root, assignment.data):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, partial / file)
        page = json.dumps(assignment.notebook, indent=1, ensure_ascii=False)
        (partial / f"{assignment.name}.ipynb").write_text(page + "\n", encoding="utf-8")


def run_classroom(config: ClassroomConfig) -> None:
    """Converts everything first, then writes; prints what each assignment is worth."""
    check_config(config)
    made, root = assignments(config), config.lessons.resolve().parent
    for assignment in made:
        files_below(root, assignment.data)  # what is missing is found before anything is written
    for assignment in made:
        write(assignment, config.out / "source" / assignment.name, root, config.overwrite)
        print(f"{assignment.name:<24}{worth(assignment.exercises, config.points, config.written)}")
    settings = config.out / "nbgrader_config.py"
    if not settings.exists():
        temporary = settings.with_name(f".{settings.name}.partial")
        temporary.write_text(CONFIG, encoding="utf-8")
        os.replace(temporary, settings)
    print(f"the course is in {config.out}; there, with nbgrader 0.9.6: nbgrader generate_assignment {made[0].name}")
