"""A pipeline schedule as data: for every rank, the list of actions that it runs in that order.

The picture, the simulation and the execution all read this one description. A model of S stages lies over PP ranks; a
micro-batch passes stage 0 (embedding) to S-1 (head) forward and back again. An action is one micro-batch in one stage:

    F    forward
    B    full backward: gradients of the input and of the weights
    I    gradient of the input alone, what the stage before waits for
    W    gradient of the weights alone, which nobody waits for: it can fill a gap. One I and one W make one B
    FB   a forward and a backward of two micro-batches run together, each in the shadow of the other's communication

Papers disagree about one letter. In the Zero Bubble paper [2401.10241] B is our I. In DeepSeek-V3's table B is the full
backward and W its weight part [V3 section 3.2.1, Table 2], and so it is here: the time of I is B - W.
"""

from dataclasses import dataclass, field

KINDS = ("F", "B", "I", "W", "FB")


@dataclass(frozen=True, slots=True)
class Action:
    """One cell of the picture. In an FB the fields are the forward's and `with_` is the backward, an Action of kind B.

    stage counts along the model, 0 = embedding. direction 0 enters the pipeline at rank 0, direction 1 at the last rank.
    micro_batch is unique over both directions.
    """

    kind: str
    stage: int
    micro_batch: int
    direction: int = 0
    with_: "Action | None" = None

    def parts(self) -> tuple["Action", ...]:
        """The actions of one micro-batch in it: the forward and the backward of an FB, else itself."""
        if self.kind != "FB":
            return (self,)
        return (Action("F", self.stage, self.micro_batch, self.direction), self.with_)

    def __str__(self) -> str:
        if self.kind == "FB":
            forward, backward = self.parts()
            return f"({forward} & {backward})"
        return f"{self.kind}{self.micro_batch}" + ("'" if self.direction else "") + f"@stage{self.stage}"


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order.

    actions[rank] is the rank's list. rank_of[(direction, stage)] says which rank runs a stage for micro-batches of that
    direction: DualPipe keeps every stage twice, all others once. micro_batches counts both directions together.
    """

    name: str
    ranks: int
    stages: int
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]
    rank_of: dict[tuple[int, int], int] = field(hash=False)

    @property
    def directions(self) -> int:
        """2 for DualPipe, whose micro-batches enter at both ends; else 1."""
        return 1 + max(direction for direction, _ in self.rank_of)

    @property
    def chunks(self) -> int:
        """Stages that one rank runs: the larger share of the model a rank keeps is chunks / stages."""
        return len(self.rank_of) // self.ranks

    def stages_of(self, rank: int) -> list[tuple[int, int]]:
        """The (direction, stage) pairs that a rank runs, in the order in which a micro-batch meets them."""
        return sorted(pair for pair, owner in self.rank_of.items() if owner == rank)

    def validate(self) -> "Schedule":
        """Raises ScheduleError, naming rank and action, unless the schedule is complete, in order and free of deadlock."""
        from minids.pipeline.validate import validate

        validate(self)
        return self

    def simulate(self, f=1, b=2, w=1, fb=None, **options):
        """Runs it against a clock: see minids.pipeline.simulate.simulate."""
        from minids.pipeline.simulate import simulate

        return simulate(self, f=f, b=b, w=w, fb=fb, **options)

    def draw(self, path, **options):
        """Writes the picture to an .svg, .png or .pdf file: see minids.pipeline.draw.draw."""
        from minids.pipeline.draw import draw

        return draw(self, path, **options)
