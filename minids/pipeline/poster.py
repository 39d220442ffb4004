"""All schedules on one sheet: the same model, ranks and micro-batches, one time axis, waits shaded and measured.

To compare them, times are those of 1/PP of the model. A schedule whose ranks run two stages of half the size (interleaved,
ZBV, DualPipeV) gets half of them for each.
"""

from fractions import Fraction
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minids.pipeline.action import Schedule
from minids.pipeline.draw import HATCH, INK, PALETTE, PAPER, RC, TITLES, WORDS, check_path, paint, save
from minids.pipeline.schedules import NAMES, build_schedule
from minids.pipeline.simulate import Timeline, simulate

WAITS = "#f2b8ae"


def share_times(schedule: Schedule, f, b, w, fb=None) -> dict:
    """Times of one stage from those of 1/ranks of the model; exact for whole numbers and fractions."""
    part = Fraction(schedule.ranks, schedule.stages)

    def scaled(time):
        return time * (part if not isinstance(time, float) else float(part))

    return {"f": scaled(f), "b": scaled(b), "w": scaled(w), "fb": None if fb is None else scaled(fb)}


def compare(ranks: int, micro_batches: int, *, f=1, b=2, w=1, fb=None, names: tuple[str, ...] = NAMES,
            **options) -> dict[str, Timeline]:
    """Every schedule that accepts these sizes, on the same clock. Options are those of `simulate`.

    Raises ValueError when none of the names does.
    """
    timelines, refused = {}, []
    for name in names:
        try:
            schedule = build_schedule(name, ranks=ranks, micro_batches=micro_batches)
        except ValueError as error:
            refused.append(str(error))
            continue
        timelines[name] = simulate(schedule, **share_times(schedule, f, b, w, fb), **options)
    if not timelines:
        raise ValueError("; ".join(refused))
    return timelines


def poster_picture(timelines: dict[str, Timeline], *, width: float = 15.0, row_inch: float = 0.145) -> Figure:
    """The sheet, a block a schedule; what `compare` returns, drawn."""
    longest = max(float(timeline.makespan) for timeline in timelines.values())
    left, right, top, foot, gap = 0.72, 2.35, 0.3, 0.55, 0.34
    inch = (width - left - right) / longest
    rows = sum(timeline.schedule.ranks for timeline in timelines.values())
    high = top + foot + rows * row_inch + gap * len(timelines)
    first = next(iter(timelines.values())).schedule
    with rc_context(RC):
        fig = Figure(figsize=(width, high), facecolor=PAPER)
        y = high - top
        for name, timeline in timelines.items():
            block = timeline.schedule.ranks * row_inch
            y -= gap + block
            ax = fig.add_axes((left / width, y / high, inch * float(timeline.makespan) / width, block / high))
            paint(ax, timeline, inch=inch, idle=WAITS, size=72 * 0.62 * row_inch)
            ax.tick_params(axis="both", labelsize=5.5, labelbottom=False, bottom=False, pad=1)
            fig.text(left / width, (y + block + 0.05) / high, TITLES[name], fontsize=9, weight="bold", va="bottom")
            at = left + inch * float(timeline.makespan) + 0.12
            fig.text(at / width, (y + block / 2) / high, figures(timeline), fontsize=7.5, va="center", linespacing=1.35)
        title = f"{first.ranks} ranks, {first.micro_batches} micro-batches, {len(timelines)} schedules, one time axis"
        fig.text(left / width, 1 - 0.12 / high, title, fontsize=13, va="top", color=INK)
        entries = [Patch(facecolor=PALETTE[kind][way], edgecolor=INK, linewidth=0.4, label=WORDS[kind] + tail)
                   for kind in "FBIW" for way, tail in enumerate((", first way", ", second way"))]  # fmt: skip
        entries.append(Patch(facecolor="none", edgecolor=INK, label="overlapped pair"))
        entries.append(Patch(facecolor=WAITS, edgecolor=HATCH, linewidth=0, hatch="////", label="waits"))
        fig.legend(handles=entries, loc="lower center", ncols=5, frameon=False, fontsize=7.5)
    return fig


def figures(timeline: Timeline) -> str:
    """Bubble, memory and parameters of a schedule in three lines."""
    bubble, share = float(max(timeline.bubble)), max(timeline.bubble_share)
    return (f"bubble {bubble:g} of {float(timeline.makespan):g} ({share:.1%})\n"
            f"activations {float(max(timeline.peak_shares)):g}\n"
            f"parameters {float(max(timeline.parameter_shares)):g}x")


def poster(path: str | Path, *, ranks: int = 8, micro_batches: int = 24, **options) -> Path:
    """Draws the sheet to a file; options as in `compare`. The default suits all seven: 24 divides by 8."""
    check_path(path)
    return save(poster_picture(compare(ranks, micro_batches, **options)), path, dpi=150)
