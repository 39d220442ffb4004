"""The course in a classroom: every exercise of the notebooks as an assignment that nbgrader hands out, collects and grades.

nbgrader does that work; what is here is the way from our notebooks to its course folder. `assignment.py` turns a lesson
into an assignment, `course.py` writes the folder (``python -m minids classroom``), and `verdict.py` is what the graded
cells call. nbgrader itself is needed to run a course, not to write one: ``pip install nbgrader==0.9.6``.
"""

from minids.classroom.verdict import listen, settle

__all__ = ["listen", "settle"]
