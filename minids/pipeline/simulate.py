"""A schedule against a clock: when every action starts and ends, where ranks wait, what they hold.

Every rank runs its list in order. An action starts when the rank is free and what it needs has arrived: a forward needs
the stage before, a backward the stage behind, a weight gradient nothing. A hand-over to another rank takes `comm`; one
between two stages of the same rank is free. A link from one rank to another carries one hand-over at a time, in order, so
that a slow link limits the throughput and not only the delay. The times may be int, Fraction or float: with the first two
the bubbles of the papers come out exactly.

    bubble of a rank = makespan - time that it computes

The simplifications: hand-overs do not slow down computing, no jitter, no optimizer step, no data-parallel reduction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

from minids.pipeline.action import Action, Schedule

Time = Real
PairTime = Callable[[Time, Time], Time]
COMM = ("overlapped", "exposed")


@dataclass(frozen=True)
class Cell:
    """An action and when it ran."""

    action: Action
    start: Time
    end: Time


@dataclass(frozen=True)
class Timeline:
    """What the clock saw. Lists are indexed by rank; times are in the unit in which f, b, w were given."""

    schedule: Schedule
    cells: list[list[Cell]]
    makespan: Time
    busy: list[Time]  # computing
    exposed: list[Time]  # standing still for a hand-over of its own (comm_mode "exposed")
    peak_activations: list[int]  # stage inputs and what lies behind them, counted in (stage, micro-batch) pairs

    @property
    def bubble(self) -> list[Time]:
        """Time in which a rank does not compute, from the first start anywhere to the last end anywhere."""
        return [self.makespan - busy for busy in self.busy]

    @property
    def waits(self) -> list[Time]:
        """Time in which a rank does not compute between its own first start and its own last end."""
        return [row[-1].end - row[0].start - busy for row, busy in zip(self.cells, self.busy, strict=True)]

    @property
    def bubble_share(self) -> list[float]:
        return [float(bubble / self.makespan) if self.makespan else 0.0 for bubble in self.bubble]

    @property
    def peak_shares(self) -> list[Fraction]:
        """Peak activations in the unit of the papers' table: one micro-batch through 1/ranks of the model."""
        return [Fraction(peak * self.schedule.ranks, self.schedule.stages) for peak in self.peak_activations]

    @property
    def parameter_shares(self) -> list[Fraction]:
        """Parameters a rank holds, as a multiple of 1/ranks of the model: 2 for DualPipe, 1 for all others."""
        per_rank = [len(self.schedule.stages_of(rank)) for rank in range(self.schedule.ranks)]
        return [Fraction(stages * self.schedule.ranks, self.schedule.stages) for stages in per_rank]

    def table(self) -> str:
        """One line a rank: computing, waiting, memory."""
        lines = [f"{'rank':>4}  {'computes':>9}  {'bubble':>9}  {'share':>6}  {'peak activations':>16}  {'parameters':>10}"]
        rows = zip(self.busy, self.bubble, self.bubble_share, self.peak_shares, self.parameter_shares, strict=True)
        for rank, (busy, bubble, share, peak, parameters) in enumerate(rows):
            lines.append(f"{rank:>4}  {float(busy):>9.6g}  {float(bubble):>9.6g}  {share:>6.1%}  {float(peak):>16.4g}  "
                         f"{float(parameters):>9.3g}x")
        return "\n".join(lines)


class Durations:
    """How long each action takes. f, b, w, i: a number or one a stage; fb: None (F + B), a number or a function of both."""

    def __init__(self, schedule: Schedule, f, b, w, fb, i, slowdown):
        stages = schedule.stages
        self.f, self.b, self.w = (per_stage(name, value, stages) for name, value in (("f", f), ("b", b), ("w", w)))
        for stage, (whole, part) in enumerate(zip(self.b, self.w, strict=True)):
            if part > whole:
                raise ValueError(f"w must not exceed b, W is a part of the full backward B: got w={part} and b={whole} "
                                 f"at stage {stage}")
        parts = tuple(whole - part for whole, part in zip(self.b, self.w, strict=True))
        self.i = parts if i is None else per_stage("i", i, stages)
        if fb is not None and not callable(fb):
            check_time("fb", fb)
        self.fb = fb
        self.slowdown = (1,) * schedule.ranks if slowdown is None else tuple(slowdown)
        if len(self.slowdown) != schedule.ranks or any(factor <= 0 for factor in self.slowdown):
            raise ValueError(f"slowdown must be {schedule.ranks} positive factors, one a rank, got {slowdown!r}")

    def of(self, action: Action, rank: int) -> Time:
        stage, kind = action.stage, action.kind
        if kind == "F":
            time = self.f[stage]
        elif kind == "B":
            time = self.b[stage]
        elif kind == "I":
            time = self.i[stage]
        elif kind == "W":
            time = self.w[stage]
        else:
            forward, backward = self.f[stage], self.b[action.with_.stage]
            time = forward + backward if self.fb is None else self.fb(forward, backward) if callable(self.fb) else self.fb
        return time * self.slowdown[rank]


def check_time(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a time of at least 0, got {value!r}")


def per_stage(name: str, value, stages: int) -> tuple:
    """One time a stage from a number or a sequence of them."""
    times = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    if len(times) != stages:
        raise ValueError(f"{name} must be one time or one for each of the {stages} stages, got {len(times)} of them")
    for time in times:
        check_time(name, time)
    return times


def needs(part: Action, stages: int) -> tuple | None:
    """The output of another action that this one waits for, as (is it a gradient, direction, stage, micro-batch)."""
    if part.kind == "F":
        return (False, part.direction, part.stage - 1, part.micro_batch) if part.stage else None
    if part.kind == "W" or part.stage == stages - 1:
        return None
    return (True, part.direction, part.stage + 1, part.micro_batch)


def gives(part: Action, stages: int) -> tuple[tuple, int] | None:
    """The output that another action waits for, and the stage that waits: (key as in `needs`, stage)."""
    key = (part.kind != "F", part.direction, part.stage, part.micro_batch)
    if part.kind == "F":
        return (key, part.stage + 1) if part.stage < stages - 1 else None
    return (key, part.stage - 1) if part.kind != "W" and part.stage else None


class Clock:
    """The state of all ranks; `run` lets each go on until it waits, and wakes it when what it waits for has been sent."""

    def __init__(self, schedule: Schedule, durations: Durations, comm: Time, exposed: bool):
        self.schedule, self.durations, self.comm = schedule, durations, comm
        self.exposed_mode = exposed
        self.cells: list[list[Cell]] = [[] for _ in range(schedule.ranks)]
        self.free: list[Time] = [0] * schedule.ranks  # when the rank can start something new
        self.exposed: list[Time] = [0] * schedule.ranks
        self.arrived: dict[tuple, Time] = {}
        self.waiting: dict[tuple, int] = {}
        self.link_free: dict[tuple[int, int], Time] = {}

    def run(self) -> None:
        ready = list(range(self.schedule.ranks))
        while ready:
            self.advance(ready.pop(), ready)
        stuck = [rank for rank, row in enumerate(self.cells) if len(row) < len(self.schedule.actions[rank])]
        if stuck:
            rank = stuck[0]
            raise ValueError(f"{self.schedule.name} stands still: rank {rank} waits for ever before "
                             f"{self.schedule.actions[rank][len(self.cells[rank])]}; schedule.validate() says why")

    def advance(self, rank: int, ready: list[int]) -> None:
        """Runs the rank's actions until one waits for something that was not sent yet."""
        row, stages = self.cells[rank], self.schedule.stages
        actions = self.schedule.actions[rank]
        while len(row) < len(actions):
            action = actions[len(row)]
            parts, start = action.parts(), self.free[rank]
            for part in parts:
                key = needs(part, stages)
                if key is None:
                    continue
                if key not in self.arrived:
                    self.waiting[key] = rank
                    return
                start = max(start, self.arrived[key])
            end = start + self.durations.of(action, rank)
            row.append(Cell(action, start, end))
            self.free[rank] = end
            for part in parts:
                self.send(part, rank, end, ready)

    def send(self, part: Action, rank: int, end: Time, ready: list[int]) -> None:
        """Hands the part's output to the rank that waits for it."""
        given = gives(part, self.schedule.stages)
        if given is None:
            return
        key, stage = given
        to = self.schedule.rank_of[part.direction, stage]
        arrival = end
        if to != rank and self.comm:
            leaves = max(self.free[rank] if self.exposed_mode else end, self.link_free.get((rank, to), 0))
            arrival = leaves + self.comm
            self.link_free[rank, to] = arrival
            if self.exposed_mode:
                self.exposed[rank] += self.comm
                self.free[rank] = arrival
        self.arrived[key] = arrival
        if key in self.waiting:
            ready.append(self.waiting.pop(key))


def peak_activations(actions: Sequence[Action]) -> int:
    """(stage, micro-batch) pairs that are remembered at once: from the forward until the backward, if split until its W."""
    live = peak = 0
    for action in actions:
        live += action.kind in ("F", "FB")
        peak = max(peak, live)
        live -= action.kind in ("B", "W", "FB")
    return peak


def simulate(schedule: Schedule, *, f=1, b=2, w=1, fb=None, i=None, comm: Time = 0, comm_mode: str = "overlapped",
             slowdown: Sequence[Time] | None = None) -> Timeline:
    """Runs a schedule against a clock.

    Args:
        f, b, w: time of one stage's forward, full backward, and weight part of it: a number, or one a stage.
        fb: time of an overlapped pair: None for F + B, a number, or a function (forward's time, backward's) -> time.
        i: time of an input gradient alone: None for B - W, a number, or one a stage.
        comm: time of one hand-over between two ranks.
        comm_mode: "overlapped": the sender goes on meanwhile; "exposed": the sender stands still for it.
        slowdown: a factor on all times of each rank, for unequal hardware.

    Raises ValueError for impossible times, and for a schedule that deadlocks.
    """
    check_time("comm", comm)
    if comm_mode not in COMM:
        raise ValueError(f"comm_mode must be one of {', '.join(COMM)}, got {comm_mode!r}")
    clock = Clock(schedule, Durations(schedule, f, b, w, fb, i, slowdown), comm, comm_mode == "exposed")
    clock.run()
    busy = [sum(cell.end - cell.start for cell in row) for row in clock.cells]
    makespan = max((row[-1].end for row in clock.cells if row), default=0)
    peaks = [peak_activations(actions) for actions in schedule.actions]
    return Timeline(schedule, clock.cells, makespan, busy, clock.exposed, peaks)
