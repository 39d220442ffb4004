"""DualPipe: micro-batches enter at both ends, and a forward of one direction runs together with a backward of the other.

The bubble of 1F1B is the way of the first micro-batch through all ranks. If half of the micro-batches enter at the last
rank, both ways are half as long, and every rank soon holds a forward and a backward that do not depend on each other. Run
as a pair (FB) they hide each other's all-to-all communication: that is the purpose; the shorter bubble is a gift.
Rank r keeps stage r for direction 0 and stage PP-1-r for direction 1: the parameters are there twice.

    bubble (PP/2 - 1)(F&B + B - 3W)        activations PP + 1        parameters 2x        [V3 section 3.2.1, Table 2]

A rank runs eight steps. h = PP/2; i = its distance from the nearer end; n = micro-batches of one direction; 0 is the
direction that entered at the rank's own end of the pipeline, 1 the other.

DualPipeV is one half of it. Ranks r and PP-1-r do the same things with directions exchanged; keep rank r alone, and what
its mirror image did to direction 1 becomes the way back up of the same micro-batches. One copy of the parameters, h ranks,
2h stages in a V, and the eight steps word for word.
"""

from collections.abc import Iterator

from minids.pipeline.action import Action

# A cell without its micro-batch: (kind, way), or ("FB", way of the forward); the backward of an FB goes the other way.
Cell = tuple[str, int]
STEPS = ("F0", "F0 F1", "I1 W1 F1", "F0&B1 F1&B0", "B1 F1&B0", "B1 B0", "W I0", "W")


def step_1_forwards(h: int, i: int, n: int) -> Iterator[Cell]:
    """Fill the pipeline from the rank's own end, until the other direction's first micro-batch arrives."""
    for _ in range(2 * (h - i - 1)):
        yield "F", 0


def step_2_forwards_of_both(h: int, i: int, n: int) -> Iterator[Cell]:
    """Forwards of the two directions in turn."""
    for _ in range(i + 1):
        yield "F", 0
        yield "F", 1


def step_3_first_backwards(h: int, i: int, n: int) -> Iterator[Cell]:
    """The other direction's gradients come back. Input gradient first: a rank further on waits for it."""
    for _ in range(h - i - 1):
        yield "I", 1
        yield "W", 1
        yield "F", 1


def step_4_overlapped_pairs(h: int, i: int, n: int) -> Iterator[Cell]:
    """The main part: every forward in one pair with a backward of the other direction.

    The two middle ranks begin with a pair that is not overlapped: their neighbours wait for its forward, which would be
    ready only at the end of the pair.
    """
    for k in range(n - 2 * h + i + 1):
        if k == 0 and i == h - 1:
            yield "F", 0
            yield "B", 1
        else:
            yield "FB", 0
        yield "FB", 1


def step_5_last_forwards(h: int, i: int, n: int) -> Iterator[Cell]:
    """Own forwards are used up; the other direction's still come."""
    for _ in range(h - i - 1):
        yield "B", 1
        yield "FB", 1


def step_6_backwards_of_both(h: int, i: int, n: int) -> Iterator[Cell]:
    """Backwards in turn. From the half on, weight gradients are put off: the gaps of the next step will hold them."""
    for k in range(2 * (i + 1)):
        yield "B" if k < i + 1 else "I", 1 - k % 2


def step_7_fill_with_weights(h: int, i: int, n: int) -> Iterator[Cell]:
    """While the last gradients of the own direction come in, a weight gradient before each."""
    for _ in range(h - i - 1):
        yield "W", -1
        yield "I", 0


def step_8_weights_left(h: int, i: int, n: int) -> Iterator[Cell]:
    """What is still owed."""
    for _ in range(i + 1):
        yield "W", -1


EIGHT_STEPS = (
    step_1_forwards, step_2_forwards_of_both, step_3_first_backwards, step_4_overlapped_pairs,
    step_5_last_forwards, step_6_backwards_of_both, step_7_fill_with_weights, step_8_weights_left,
)  # fmt: skip


def eight_steps(h: int, i: int, n: int, place: dict[int, tuple[int, int, int]]) -> list[list[Action]]:
    """The eight lists of actions of one rank.

    place[way] = (direction, stage, first micro-batch). Each kind takes the micro-batches of a way in order; a weight
    gradient of way -1 is the oldest that is owed, whichever way it belongs to.
    """
    count = {(kind, way): 0 for kind in "FB" for way in (0, 1)}
    owed: list[Action] = []

    def take(kind: str, way: int) -> Action:
        direction, stage, first = place[way]
        counter = ("F" if kind == "F" else "B"), way
        count[counter] += 1
        return Action(kind, stage, first + count[counter] - 1, direction)

    def action(kind: str, way: int) -> Action:
        if kind == "W":
            late = owed.pop(0)
            return Action("W", late.stage, late.micro_batch, late.direction)
        if kind == "FB":
            forward = take("F", way)
            return Action("FB", forward.stage, forward.micro_batch, forward.direction, take("B", 1 - way))
        made = take(kind, way)
        if kind == "I":
            owed.append(made)
        return made

    return [[action(*cell) for cell in step(h, i, n)] for step in EIGHT_STEPS]


def dualpipe_steps(rank: int, ranks: int, n: int) -> list[list[Action]]:
    """The eight steps of one rank; n micro-batches in all, 0 to n/2 - 1 enter at rank 0, the others at the last rank."""
    near = 0 if rank < ranks // 2 else 1  # the direction that entered at this rank's end
    place = {}
    for way, direction in ((0, near), (1, 1 - near)):
        place[way] = (direction, rank if direction == 0 else ranks - 1 - rank, direction * (n // 2))
    return eight_steps(ranks // 2, min(rank, ranks - 1 - rank), n // 2, place)


def dualpipe_v_steps(rank: int, ranks: int, n: int) -> list[list[Action]]:
    """The eight steps of one rank: way 0 is down the V (stage rank), way 1 up again (stage 2 ranks - 1 - rank)."""
    return eight_steps(ranks, rank, n, {0: (0, rank, 0), 1: (0, 2 * ranks - 1 - rank, 0)})


def dualpipe(rank: int, ranks: int, n: int) -> list[Action]:
    return sum(dualpipe_steps(rank, ranks, n), [])


def dualpipe_v(rank: int, ranks: int, n: int) -> list[Action]:
    return sum(dualpipe_v_steps(rank, ranks, n), [])
