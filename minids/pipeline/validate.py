"""Is this schedule right? Five questions, each with its own function; `validate` asks them all.

    placement    every action stands on the rank that owns its stage for its direction
    once         every micro-batch passes every stage: one F, and one B or one I with one W
    order        on a rank: F before its B or I, I before its W
    deadlock     all ranks run in order, and a rank waits for what its action needs from another; does everything end?
    memory       peak of remembered activations on every rank against the schedule's formula

Deadlock is found by running: sends never block, receives do (point-to-point with buffers, as isend and irecv give it).
Whatever runs to its end in this way runs to its end with any times, since no order depends on a clock.
"""

from collections import Counter

from minids.pipeline.action import KINDS, Schedule
from minids.pipeline.simulate import gives, needs, peak_activations


class ScheduleError(ValueError):
    """A schedule that cannot be executed; the message names rank, place in the list and action."""


def where(schedule: Schedule, rank: int, position: int) -> str:
    return f"{schedule.name}: rank {rank}, action {position}, {schedule.actions[rank][position]}"


def check_placement(schedule: Schedule) -> None:
    """Known kinds, stages that exist, and each on its own rank; an FB holds a forward and a full backward."""
    if len(schedule.actions) != schedule.ranks:
        raise ScheduleError(f"{schedule.name}: {len(schedule.actions)} lists of actions for {schedule.ranks} ranks")
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            if action.kind not in KINDS or (action.kind == "FB") != (action.with_ is not None):
                raise ScheduleError(f"{where(schedule, rank, position)}: kind must be one of {KINDS}; "
                                    "with_ is for FB alone, which needs it")
            for part in action.parts():
                owner = schedule.rank_of.get((part.direction, part.stage))
                if owner != rank:
                    raise ScheduleError(f"{where(schedule, rank, position)}: stage {part.stage} of direction "
                                        f"{part.direction} belongs to rank {owner}, not to rank {rank}")
            if action.kind == "FB" and action.with_.kind != "B":
                raise ScheduleError(f"{where(schedule, rank, position)}: an FB must hold a B, got {action.with_.kind}")


def check_once(schedule: Schedule) -> None:
    """Nothing missing, nothing twice, and every micro-batch in one direction."""
    count = Counter()
    direction_of = {}
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            for part in action.parts():
                count[part.kind, part.stage, part.micro_batch] += 1
                if direction_of.setdefault(part.micro_batch, part.direction) != part.direction:
                    raise ScheduleError(f"{where(schedule, rank, position)}: micro-batch {part.micro_batch} "
                                        "runs in both directions")
    wrong = sorted(set(direction_of) ^ set(range(schedule.micro_batches)))
    if wrong:
        raise ScheduleError(f"{schedule.name}: micro-batches must be 0 to {schedule.micro_batches - 1}; "
                            f"missing or unknown: {wrong[:8]}")
    for m in range(schedule.micro_batches):
        for stage in range(schedule.stages):
            f, b, i, w = (count[kind, stage, m] for kind in "FBIW")
            if f != 1 or (b, i, w) not in ((1, 0, 0), (0, 1, 1)):
                raise ScheduleError(f"{schedule.name}: micro-batch {m} in stage {stage} has {f} F, {b} B, {i} I, {w} W; "
                                    "needed are one F, and one B or one I with one W")


def check_order(schedule: Schedule) -> None:
    """On every rank a forward before its backward, an input gradient before its weight gradient."""
    before = {"B": "F", "I": "F", "W": "I"}
    for rank, actions in enumerate(schedule.actions):
        seen = set()
        for position, action in enumerate(actions):
            for part in action.parts():
                first = before.get(part.kind)
                if first and (first, part.stage, part.micro_batch) not in seen:
                    raise ScheduleError(f"{where(schedule, rank, position)}: {part} comes before its {first}")
            seen.update((part.kind, part.stage, part.micro_batch) for part in action.parts())


def check_deadlock(schedule: Schedule) -> None:
    """Runs all ranks in order, without times; raises with what every stopped rank waits for."""
    done: set[tuple] = set()
    position = [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions):
                parts = actions[position[rank]].parts()
                if any(key is not None and key not in done for key in (needs(part, schedule.stages) for part in parts)):
                    break
                done.update(given[0] for part in parts if (given := gives(part, schedule.stages)))
                position[rank] += 1
                moved = True
    stuck = [rank for rank in range(schedule.ranks) if position[rank] < len(schedule.actions[rank])]
    if stuck:
        lines = (f"{where(schedule, rank, position[rank])} waits for {missing(schedule, rank, position[rank], done)}"
                 for rank in stuck)
        raise ScheduleError("deadlock:\n" + "\n".join(lines))


def missing(schedule: Schedule, rank: int, position: int, done: set[tuple]) -> str:
    """What a stopped action still needs, in words."""
    keys = (needs(part, schedule.stages) for part in schedule.actions[rank][position].parts())
    names = []
    for gradient, direction, stage, micro_batch in (key for key in keys if key is not None and key not in done):
        what = "gradient" if gradient else "output"
        sender = schedule.rank_of[direction, stage]
        names.append(f"the {what} of micro-batch {micro_batch} from stage {stage} on rank {sender}")
    return " and ".join(names)


def most_activations(schedule: Schedule, rank: int) -> int | None:
    """The formula: (stage, micro-batch) pairs that the rank remembers at its worst moment; None for an unknown name.

    gpipe keeps all n. 1f1b keeps one for each rank from here to the end. zb1p evens that out to PP. zbv and the DualPipes
    keep stages of half the size, twice as many; DualPipe's pair of a forward and a backward needs one more.
    """
    p, n = schedule.ranks, schedule.micro_batches
    if schedule.name == "interleaved_1f1b":
        v = schedule.chunks
        return min(n * v, 2 * (p - 1 - rank) + (v - 1) * p + 1)
    formulas = {
        "gpipe": n, "1f1b": min(n, p - rank), "zb1p": min(n, p), "zbv": min(2 * n, 2 * p),
        "dualpipe": p + 1, "dualpipe_v": 2 * p + 1,
    }  # fmt: skip
    return formulas.get(schedule.name)


def check_memory(schedule: Schedule) -> None:
    """Each rank's peak is the formula's figure: not more, and not less, which would mean that the formula is another's.
    A schedule of your own, under a name of its own, has no formula to be held to."""
    for rank, actions in enumerate(schedule.actions):
        peak, formula = peak_activations(actions), most_activations(schedule, rank)
        if formula is not None and peak != formula:
            raise ScheduleError(f"{schedule.name}: rank {rank} remembers {peak} activations at once, "
                                f"the formula says {formula}")


def validate(schedule: Schedule, memory: bool = True) -> None:
    """All checks; memory=False leaves out the last.

    Raises ScheduleError (a ValueError) at the first fault.
    """
    check_placement(schedule)
    check_once(schedule)
    check_order(schedule)
    check_deadlock(schedule)
    if memory:
        check_memory(schedule)
