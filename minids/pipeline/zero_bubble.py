"""Zero bubble: the gradient of the weights waits for nobody, so it goes where a gap is [2401.10241].

A full backward B is two products. The stage before waits for the input's gradient, I; the weights' gradient, W, is needed
only by the optimizer. 1F1B runs both where B stood. Here I runs at once and W later:

    zb1p (ZB-H1)     1F1B with W late by one micro-batch a rank: bubble (PP-1)(F+B-2W), activations PP on every rank
    zbv              two thin stages a rank, in a V: the last stage is on the rank of the first, so a micro-batch's first
                     gradient comes back to where it began. With F = I = W no rank waits between its first and its last
                     action; what is left is the skew of the ranks' starts, (PP-1) F of a thin stage

The activations of a micro-batch are kept until its W: that is what the delay costs, and why it stops at `rank`.
"""

from minids.pipeline.action import Action


def zb1p(rank: int, ranks: int, n: int) -> list[Action]:
    """1F1B's order of F and I. After each I a W, once more than `rank` of them are owed: the last rank owes most, because
    1F1B leaves it the most memory. A debt of PP-1-(ranks behind) makes the peak PP everywhere."""
    warm_up = min(n, ranks - 1 - rank)
    actions = [Action("F", rank, m) for m in range(warm_up)]
    done = 0  # weight gradients so far
    for m in range(n):
        if warm_up + m < n:
            actions.append(Action("F", rank, warm_up + m))
        actions.append(Action("I", rank, m))
        if m + 1 - done > rank:
            actions.append(Action("W", rank, done))
            done += 1
    return actions + [Action("W", rank, m) for m in range(done, n)]


def zbv(rank: int, ranks: int, n: int) -> list[Action]:
    """Rank r runs stage r on the way down (0) and stage 2 PP - 1 - r on the way up (1). Needs n >= 2 PP - 1."""
    stages = (rank, 2 * ranks - 1 - rank)
    count = {kind: [0, 0] for kind in "FIW"}
    actions: list[Action] = []

    def add(text: str) -> None:
        for kind, way in text.split():
            actions.append(Action(kind, stages[int(way)], count[kind][int(way)]))
            count[kind][int(way)] += 1

    behind = ranks - rank  # ranks from here to the bottom of the V, this one included
    for _ in range(2 * behind - 1):  # until the first micro-batch has gone down and come up again
        add("F0")
    for _ in range(rank):
        add("F1 F0")
    for _ in range(behind):  # the first gradients start at the top of the V, on rank 0
        add("F1 I1 W1")
    while count["F"][1] < n:
        if count["F"][0] < n:
            add("F0")
        add("I0 W0 F1 I1 W1")
    for _ in range(rank):  # no forward is left to fill a gap: weight gradients are kept back for it
        add("I0 I1")
    for _ in range(behind):
        add("I0 W0")
    for way in ("1", "0"):
        while count["W"][int(way)] < n:
            add("W" + way)
    return actions
