"""Seven pipeline schedules by name, from the naive one to DualPipe, each built as data and each refusing what it cannot do.

    name               ranks      micro-batches n        stages       where a stage lives
    gpipe              >= 1       >= 1                   PP           rank = stage
    1f1b               >= 1       >= 1                   PP           rank = stage
    interleaved_1f1b   >= 1       multiple of PP         v PP         rank = stage mod PP
    zb1p               >= 1       >= 1                   PP           rank = stage
    zbv                >= 1       >= 2 PP - 1            2 PP         V: stage and 2 PP - 1 - stage
    dualpipe           even       even, >= 2 PP          PP, twice    rank = stage, and rank = PP - 1 - stage
    dualpipe_v         >= 1       >= 2 PP                2 PP         V: stage and 2 PP - 1 - stage

PP ranks, v chunks. The orders themselves are in one_way.py, zero_bubble.py and dualpipe.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minids.pipeline.action import Action, Schedule
from minids.pipeline.dualpipe import dualpipe, dualpipe_v
from minids.pipeline.one_way import gpipe, interleaved_1f1b, one_f_one_b
from minids.pipeline.zero_bubble import zb1p, zbv

__all__ = ["Action", "NAMES", "Schedule", "build_schedule", "check_request", "fewest_micro_batches"]


@dataclass(frozen=True)
class Family:
    """How one schedule is built and what it needs."""

    build: Callable[..., list[Action]]  # (rank, ranks, micro_batches[, chunks]) -> the rank's actions
    placement: str  # "line", "loop", "v" or "both ends"
    fewest: Callable[[int], int] = lambda ranks: 1  # micro-batches that it needs at least
    multiple: Callable[[int], int] = lambda ranks: 1  # what their number must divide by
    even_ranks: bool = False


FAMILIES = {
    "gpipe": Family(gpipe, "line"),
    "1f1b": Family(one_f_one_b, "line"),
    "interleaved_1f1b": Family(interleaved_1f1b, "loop", fewest=lambda p: p, multiple=lambda p: p),
    "zb1p": Family(zb1p, "line"),
    "zbv": Family(zbv, "v", fewest=lambda p: 2 * p - 1),
    "dualpipe": Family(dualpipe, "both ends", fewest=lambda p: 2 * p, multiple=lambda p: 2, even_ranks=True),
    "dualpipe_v": Family(dualpipe_v, "v", fewest=lambda p: 2 * p),
}
NAMES = tuple(FAMILIES)


def fewest_micro_batches(name: str, ranks: int) -> int:
    """The smallest number of micro-batches that the schedule accepts."""
    return FAMILIES[name].fewest(ranks)


def check_request(name: str, ranks: int, micro_batches: int, chunks: int | None) -> None:
    """Raises ValueError that says what was asked and what is allowed."""
    if name not in FAMILIES:
        raise ValueError(f"schedule: {name!r} is unknown; allowed: {', '.join(NAMES)}")
    family = FAMILIES[name]
    for field, value in (("ranks", ranks), ("micro_batches", micro_batches)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
    if family.even_ranks and ranks % 2:
        raise ValueError(f"ranks must be even for {name}, got {ranks}: each rank has a mirror image (2, 4, 6, ...)")
    multiple, fewest = family.multiple(ranks), family.fewest(ranks)
    if micro_batches < fewest or micro_batches % multiple:
        what = {1: "any number", 2: "an even number"}.get(multiple, f"a multiple of {multiple}")
        raise ValueError(f"micro_batches for {name} on {ranks} ranks must be {what} of at least {fewest}, "
                         f"got {micro_batches}")
    if family.placement == "loop":
        if isinstance(chunks, bool) or not isinstance(chunks, int | None) or (chunks is not None and chunks < 1):
            raise ValueError(f"chunks must be a whole number of at least 1, got {chunks!r}")
    elif chunks is not None:
        raise ValueError(f"chunks is for interleaved_1f1b alone, got {chunks} for {name}: leave it out")


def build_schedule(name: str, *, ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """A schedule by name.

    Args:
        name: one of NAMES.
        ranks: pipeline-parallel size PP.
        micro_batches: in all, over both directions.
        chunks: stages a rank, for interleaved_1f1b alone (default 2).

    Raises ValueError, naming what is allowed, for sizes that the schedule cannot have.
    """
    check_request(name, ranks, micro_batches, chunks)
    family = FAMILIES[name]
    last = ranks - 1
    if family.placement == "both ends":
        rank_of = {(0, s): s for s in range(ranks)} | {(1, s): last - s for s in range(ranks)}
    elif family.placement == "v":
        rank_of = {(0, s): s if s < ranks else 2 * ranks - 1 - s for s in range(2 * ranks)}
    elif family.placement == "loop":
        chunks = chunks or 2
        rank_of = {(0, s): s % ranks for s in range(chunks * ranks)}
    else:
        rank_of = {(0, s): s for s in range(ranks)}
    stages = 1 + max(stage for _, stage in rank_of)
    extra = (chunks,) if family.placement == "loop" else ()
    actions = tuple(tuple(family.build(rank, ranks, micro_batches, *extra)) for rank in range(ranks))
    return Schedule(name, ranks, stages, micro_batches, actions, rank_of)
