"""The bubbles in closed form, and the conditions under which they are what a clock shows.

F, B, W: time of a stage's forward, full backward, and the weight part of it; I = B - W; F&B: an overlapped pair. All
stages take the same time, hand-overs take none, n micro-batches on PP ranks. Bubble of a rank = makespan - its computing.

    schedule           the papers' formula               holds exactly when
    gpipe, 1f1b        (PP-1)(F + B)                     always
    interleaved        (PP-1)(F + B) of a thin stage     always
    zb1p               (PP-1)(F + B - 2W)                n >= PP, W <= F, W <= I
    zbv                (PP-1) F of a thin stage          F = I = W (ours: the skew of the starts, nobody waits inside)
    dualpipe           (PP/2-1)(F&B + B - 3W)            F = I >= W; at the ends a little less if F&B < F + B
    dualpipe_v         the same with PP/2 ranks          the same

Why DualPipe's formula asks for F = I: what comes out of the clock is, for F >= I,

    (PP/2-1)(F&B + F - W - min(I, W)) - d (F + B - F&B)        d = ranks between this one and the nearest with most pairs

and with W <= I this is (PP/2-1)(F&B + F - 2W). The table has I = B - W in the place of F. With B = 2F = 2W, which is
what the paper assumes and draws, they are one. The last term: ranks at the ends have fewer overlapped pairs, so more of
their work is done one after the other; they compute longer and wait less. The makespan is the same for all.
"""

from collections.abc import Sequence
from fractions import Fraction
from numbers import Real

from minids.pipeline.action import Schedule

Time = Real


def paper_bubble(name: str, ranks: int, f: Time, b: Time, w: Time, fb: Time | None = None) -> Time:
    """The formula of the table above, with the times of one stage. DualPipeV: `ranks` are its own, PP/2 of the paper's."""
    fb = f + b if fb is None else fb
    if name in ("gpipe", "1f1b", "interleaved_1f1b"):
        return (ranks - 1) * (f + b)
    if name == "zb1p":
        return (ranks - 1) * (f + b - 2 * w)
    if name == "zbv":
        return (ranks - 1) * f
    half = Fraction(ranks, 2) if name == "dualpipe" else ranks
    return (half - 1) * (fb + b - 3 * w)


def unmet(schedule: Schedule, f, b, w, fb=None, comm: Time = 0, slowdown: Sequence[Time] | None = None) -> list[str]:
    """The assumptions of the papers' formula that these times break, in words; empty: the formula is exact, on the ranks
    with most pairs. Arguments as in `simulate`."""
    broken = []
    if any(isinstance(time, Sequence) and len(set(time)) > 1 for time in (f, b, w, slowdown)):
        broken.append("stages and ranks must take equal times")
    if comm:
        broken.append(f"hand-overs must be free, they take {comm}")
    if broken:
        return broken
    f, b, w = (time[0] if isinstance(time, Sequence) else time for time in (f, b, w))
    i, n, ranks = b - w, schedule.micro_batches, schedule.ranks
    if schedule.name == "zb1p":
        if n < ranks:
            broken.append(f"micro-batches must be at least {ranks}, they are {n}")
        if w > min(f, i):
            broken.append(f"W must not exceed F and B - W: W = {w}, F = {f}, B - W = {i}")
    if schedule.name == "zbv" and not f == i == w:
        broken.append(f"F, B - W and W must be equal: {f}, {i}, {w}")
    if schedule.name.startswith("dualpipe"):
        if f != i or w > i:
            broken.append(f"F must equal B - W, and W must not exceed it: F = {f}, B - W = {i}, W = {w}")
        if callable(fb) or (fb is not None and not max(f, b) <= fb <= f + b):
            broken.append(f"F&B must be one time from max(F, B) to F + B = {f + b}")
    return broken


def holds(schedule: Schedule, f, b, w, fb=None, **options) -> bool:
    """Whether the papers' formula is exact: see `unmet`."""
    return not unmet(schedule, f, b, w, fb, **options)


def clock_bubble(name: str, ranks: int, rank: int, f: Time, b: Time, w: Time, fb: Time | None = None) -> Time:
    """What the simulator gives on one rank, exactly: zb1p for n >= PP, the DualPipes for F >= I."""
    i, fb = b - w, f + b if fb is None else fb
    if name == "zb1p":
        return (ranks - 1) * (f + i - min(f, i, w))
    if name not in ("dualpipe", "dualpipe_v"):
        raise ValueError(f"name must be zb1p, dualpipe or dualpipe_v, got {name!r}: paper_bubble is exact for the others")
    half = ranks // 2 if name == "dualpipe" else ranks
    inward = min(rank, ranks - 1 - rank) if name == "dualpipe" else rank
    behind = max(half - 2 - inward, 0)  # the two innermost ranks have equally many pairs, those before one fewer each
    return (half - 1) * (fb + f - w - min(i, w)) - behind * (f + b - fb)
