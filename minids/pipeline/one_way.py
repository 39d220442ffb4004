"""The schedules before zero bubble: GPipe, 1F1B and interleaved 1F1B.

The first micro-batch needs (PP - 1) F to reach the last rank, and its gradient (PP - 1) B to come back. Rank 0 waits for
both. Order inside the batch cannot change that; it changes what must be remembered meanwhile:

    gpipe            all forwards, then all backwards          bubble (PP-1)(F+B)      activations n
    1f1b             a backward as soon as there is one        bubble (PP-1)(F+B)      activations PP
    interleaved      v thinner stages a rank: as many waits,   bubble (PP-1)(F+B)      activations PP + (PP-1)/v
                     each 1/v as long                          of a thin stage

n micro-batches, PP ranks, v stages a rank. Sources: GPipe [1811.06965], PipeDream-flush or 1F1B [2006.09503], interleaved
[2104.04473 section 2.2].
"""

from minids.pipeline.action import Action


def gpipe(rank: int, ranks: int, n: int) -> list[Action]:
    """Forwards in order, backwards in the same order: the last rank could begin with any, the first cannot."""
    return [Action("F", rank, m) for m in range(n)] + [Action("B", rank, m) for m in range(n)]


def one_f_one_b(rank: int, ranks: int, n: int) -> list[Action]:
    """Warm-up: one forward for every rank behind this one. Then forward and backward in turn. Then the backwards left."""
    warm_up = min(n, ranks - 1 - rank)
    actions = [Action("F", rank, m) for m in range(warm_up)]
    for m in range(n - warm_up):
        actions += [Action("F", rank, warm_up + m), Action("B", rank, m)]
    return actions + [Action("B", rank, m) for m in range(n - warm_up, n)]


def interleaved_1f1b(rank: int, ranks: int, n: int, chunks: int) -> list[Action]:
    """1F1B over `chunks` rounds of the ranks: PP micro-batches pass one round, then the same PP the next round.

    The warm-up is one forward for every thin stage that still lies before the first backward, twice the ranks behind
    this one because forwards and backwards of neighbours alternate.
    """
    total = n * chunks
    warm_up = min(total, 2 * (ranks - 1 - rank) + (chunks - 1) * ranks)

    def cell(kind: str, k: int) -> Action:
        group, inside = divmod(k, ranks * chunks)
        turn, lane = divmod(inside, ranks)
        chunk = turn if kind == "F" else chunks - 1 - turn
        return Action(kind, chunk * ranks + rank, group * ranks + lane)

    actions = [cell("F", k) for k in range(warm_up)]
    for k in range(total - warm_up):
        actions += [cell("F", warm_up + k), cell("B", k)]
    return actions + [cell("B", k) for k in range(total - warm_up, total)]
