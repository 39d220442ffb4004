"""Pipeline schedules: built as data, checked, timed, drawn and executed from one description [V3 section 3.2.1]."""

from minids.pipeline.action import Action, Schedule
from minids.pipeline.schedules import NAMES, build_schedule

__all__ = ["NAMES", "Action", "Schedule", "build_schedule"]
