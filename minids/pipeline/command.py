"""`python -m minids schedule NAME`: builds, checks, times and draws a schedule, and prints a table of its ranks."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from minids.pipeline.action import Schedule
from minids.pipeline.draw import check_path, headline, picture, save
from minids.pipeline.formulas import paper_bubble, unmet
from minids.pipeline.poster import compare, figures, poster_picture, share_times
from minids.pipeline.schedules import NAMES, build_schedule, check_request
from minids.pipeline.simulate import COMM, Timeline, simulate
from minids.pipeline.trace import write_trace


@dataclass
class ScheduleConfig:
    """What to draw. Times are those of 1/ranks of the model, in any unit."""

    name: str
    """gpipe, 1f1b, interleaved_1f1b, zb1p, zbv, dualpipe, dualpipe_v, or all: a poster of those that accept the sizes."""
    ranks: int = 8
    """Pipeline-parallel size."""
    micro_batches: int = 20
    """Micro-batches of one step, over both directions."""
    chunks: int | None = None
    """Stages a rank, for interleaved_1f1b alone (default 2)."""
    f: float = 1
    """Time of a forward."""
    b: float = 2
    """Time of a full backward."""
    w: float = 1
    """Time of its weight part."""
    fb: float | None = None
    """Time of an overlapped pair; F + B if it is not given."""
    comm: float = 0
    """Time of one hand-over between two ranks."""
    comm_mode: str = "overlapped"
    """overlapped: the sender goes on meanwhile; exposed: it stands still."""
    out: Path | None = None
    """The picture: .svg, .png or .pdf."""
    chrome_trace: Path | None = None
    """A trace that ui.perfetto.dev opens: .json."""


def whole(time: float | None):
    """Whole numbers as int, so that bubbles are exact."""
    return int(time) if time is not None and time == int(time) else time


def check_config(config: ScheduleConfig) -> None:
    """Everything that can be refused is refused before any work."""
    if config.name != "all":
        check_request(config.name, config.ranks, config.micro_batches, config.chunks)
    elif config.chunks is not None or config.chrome_trace is not None:
        raise ValueError("all draws a poster: chunks and chrome_trace are for one schedule")
    for field in ("f", "b", "w", "fb", "comm"):
        value = getattr(config, field)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{field} must be a time of at least 0, got {value}")
    if config.f + config.b == 0:
        raise ValueError("f and b must not both be 0")
    if config.w > config.b:
        raise ValueError(f"w must not exceed b, W is a part of the full backward B: got w={config.w} and b={config.b}")
    if config.comm_mode not in COMM:
        raise ValueError(f"comm_mode must be one of {', '.join(COMM)}, got {config.comm_mode!r}")
    if config.out is not None:
        check_path(config.out)
    trace = config.chrome_trace
    if trace is not None and (trace.suffix != ".json" or not trace.parent.is_dir()):
        raise ValueError(f"chrome_trace must be a .json file in a folder that exists, got {str(trace)!r}")


def run_schedule(config: ScheduleConfig) -> None:
    check_config(config)
    times = {field: whole(getattr(config, field)) for field in ("f", "b", "w", "fb")}
    comm = {"comm": whole(config.comm), "comm_mode": config.comm_mode}
    if config.name == "all":
        return run_poster(config, times, comm)
    schedule = build_schedule(config.name, ranks=config.ranks, micro_batches=config.micro_batches, chunks=config.chunks)
    schedule.validate()
    stage_times = share_times(schedule, **times)
    timeline = simulate(schedule, **stage_times, **comm)
    print(headline(timeline))
    print(timeline.table())
    print(formula_lines(schedule, stage_times, timeline, comm["comm"]))
    if config.out is not None:
        print(f"picture: {save(picture(timeline), config.out)}")
    if config.chrome_trace is not None:
        print(f"trace for ui.perfetto.dev: {write_trace(timeline, config.chrome_trace)}")


def formula_lines(schedule: Schedule, times: dict, timeline: Timeline, comm: float) -> str:
    """The papers' bubble beside the clock's, and which of its assumptions these times break."""
    formula, seen = paper_bubble(schedule.name, schedule.ranks, **times), max(timeline.bubble)
    lines = [f"bubble by the papers' formula {float(formula):g}, by the clock {float(seen):g}"]
    plain = {name: float(time) if isinstance(time, Fraction) else time for name, time in times.items()}
    return "\n".join(lines + [f"the formula assumes: {broken}" for broken in unmet(schedule, **plain, comm=comm)])


def run_poster(config: ScheduleConfig, times: dict, comm: dict) -> None:
    timelines = compare(config.ranks, config.micro_batches, **times, **comm)
    for name in NAMES:
        if name in timelines:
            print(f"{name:<17}{figures(timelines[name]).replace(chr(10), ', ')}")
        else:
            print(f"{name:<17}does not accept {config.ranks} ranks with {config.micro_batches} micro-batches")
    if config.out is not None:
        print(f"poster: {save(poster_picture(timelines), config.out, dpi=150)}")
