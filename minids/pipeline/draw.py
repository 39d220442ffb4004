"""The picture of a schedule: a row a rank, time to the right, a cell an action with the number of its micro-batch.

    colour         forward, full backward, input gradient, weight gradient; in greyscale from light to dark in this order
    light / dark   which way the micro-batch goes: dark cells with white numbers entered at the last rank (DualPipe), come
                   back up the V (ZBV, DualPipeV), or are on a later round (interleaved)
    split cell     an overlapped pair inside one border: forward above, backward below
    hatched        the rank waits

It is drawn from a Timeline, so unequal times and slow links show as they are. Files: .svg and .pdf for print, .png for a
screen; each is written under a temporary name and renamed.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minids.pipeline.action import Action, Schedule
from minids.pipeline.simulate import Cell, Timeline, simulate

# kind -> (light, dark): the two ways. Lightness falls from F to W in either, so that a grey copy can be read.
PALETTE = {
    "F": ("#ffefb0", "#a9680a"),
    "I": ("#c2e2f4", "#2b6c9c"),
    "B": ("#8fceb2", "#00614a"),
    "W": ("#c2a5d8", "#552673"),
}
WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
TITLES = {
    "gpipe": "GPipe", "1f1b": "1F1B", "interleaved_1f1b": "Interleaved 1F1B", "zb1p": "ZB1P", "zbv": "ZBV",
    "dualpipe": "DualPipe", "dualpipe_v": "DualPipeV",
}  # fmt: skip
IDLE, HATCH, INK, PAPER = "white", "#b4b4b4", "#222222", "white"
SUFFIXES = (".svg", ".png", ".pdf")
RC = {"svg.fonttype": "none", "svg.hashsalt": "minids", "pdf.fonttype": 42, "font.size": 8, "hatch.linewidth": 0.5}
WIDEST = 40.0  # inches; longer schedules get narrower cells, without numbers where they no longer fit


def blend(light: str, dark: str, amount: float) -> tuple[float, float, float]:
    pairs = zip(bytes.fromhex(light[1:]), bytes.fromhex(dark[1:]), strict=True)
    return tuple((a + (b - a) * amount) / 255 for a, b in pairs)


def shades(schedule: Schedule) -> dict[tuple[int, int], float]:
    """(direction, stage) -> 0 light to 1 dark: by direction if there are two, else by the order of a rank's stages."""
    if schedule.directions == 2:
        return {pair: float(pair[0]) for pair in schedule.rank_of}
    most = max(schedule.chunks - 1, 1)
    return {pair: order / most for rank in range(schedule.ranks) for order, pair in enumerate(schedule.stages_of(rank))}


def colour(part: Action, shade: dict[tuple[int, int], float]) -> tuple[float, float, float]:
    return blend(*PALETTE[part.kind], shade[part.direction, part.stage])


def ink_on(rgb: Sequence[float]) -> str:
    """Black or white, whichever can be read."""
    return PAPER if 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 0.55 else INK


def box(x0: float, x1: float, y0: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def pieces(cell: Cell, row: int) -> list[tuple[Action, list[tuple[float, float]]]]:
    """The part or two parts of a cell, each with its rectangle. Row 0 is on top: y grows downwards."""
    x0, x1, top, bottom = float(cell.start), float(cell.end), row + 0.06, row + 0.94
    parts = cell.action.parts()
    if len(parts) == 1:
        return [(parts[0], box(x0, x1, top, bottom))]
    middle = (top + bottom) / 2
    return [(parts[0], box(x0, x1, top, middle)), (parts[1], box(x0, x1, middle, bottom))]


def paint(ax: Axes, timeline: Timeline, *, inch: float, numbers: bool = True, idle: str = IDLE, size: float = 7.5) -> None:
    """Draws the rows into axes whose x axis has `inch` inches for a unit of time."""
    shade = shades(timeline.schedule)
    boxes, colours, pairs, labels = [], [], [], []
    for row, cells in enumerate(timeline.cells):
        for cell in cells:
            for part, corners in pieces(cell, row):
                boxes.append(corners)
                colours.append(colour(part, shade))
                labels.append((part, corners, colours[-1]))
            if cell.action.kind == "FB":
                pairs.append(box(float(cell.start), float(cell.end), row + 0.06, row + 0.94))
    ends, ranks = float(timeline.makespan), timeline.schedule.ranks
    rows = [box(0, ends, row + 0.06, row + 0.94) for row in range(ranks)]
    ax.add_collection(PolyCollection(rows, facecolors=idle, edgecolors=HATCH, linewidths=0, hatch="////"))
    thin = 0.5 if inch > 0.05 else 0.0
    ax.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors=PAPER if thin else "face", linewidths=thin))
    ax.add_collection(PolyCollection(pairs, facecolors="none", edgecolors=INK, linewidths=0.9 if thin else 0.2))
    if numbers:
        digits = len(str(timeline.schedule.micro_batches - 1))
        for part, corners, rgb in labels:
            write_number(ax, part, corners, rgb, inch, size, digits)
    ax.set(xlim=(0, ends), ylim=(ranks, 0), yticks=[row + 0.5 for row in range(ranks)],
           yticklabels=[f"rank {row}" for row in range(ranks)])
    ax.tick_params(axis="y", length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def write_number(ax: Axes, part: Action, corners: list, rgb: Sequence[float], inch: float, size: float,
                 digits: int) -> None:
    """The micro-batch's number, smaller in a narrow or a split cell, left out where the longest would not fit."""
    (x0, y0), _, (x1, y1), _ = corners
    text = str(part.micro_batch)
    fits = 72 * 0.92 * inch * (x1 - x0) / (0.62 * digits)  # points: a digit is about 0.62 of the font's size wide
    size = min(size if y1 - y0 > 0.5 else 0.85 * size, fits)
    if size >= 3:
        ax.text((x0 + x1) / 2, (y0 + y1) / 2, text, ha="center", va="center_baseline", fontsize=size, color=ink_on(rgb),
                clip_on=True)


def legend_of(timeline: Timeline) -> list[Patch]:
    """What occurs in the picture and nothing else."""
    schedule = timeline.schedule
    parts = {part.kind for actions in schedule.actions for action in actions for part in action.parts()}
    if schedule.directions == 2:
        ways = ["from rank 0", f"from rank {schedule.ranks - 1}"]
    elif schedule.chunks == 2 and schedule.rank_of[0, schedule.stages - 1] == 0:
        ways = ["down the V", "up the V"]
    else:
        ways = [f"round {k}" for k in range(schedule.chunks)]
    entries = []
    for kind in (kind for kind in "FBIW" if kind in parts):  # kind by kind: a legend of two rows has a way in each
        for way, name in enumerate(ways):
            tail = f", {name}" if len(ways) > 1 else ""
            shade = blend(*PALETTE[kind], way / max(len(ways) - 1, 1))
            entries.append(Patch(facecolor=shade, edgecolor=INK, linewidth=0.4, label=WORDS[kind] + tail))
    if any(action.kind == "FB" for actions in schedule.actions for action in actions):
        entries.append(Patch(facecolor="none", edgecolor=INK, linewidth=1.1, label="overlapped pair, one border"))
    entries.append(Patch(facecolor=IDLE, edgecolor=HATCH, linewidth=0, hatch="////", label="waits"))
    return entries


def headline(timeline: Timeline) -> str:
    schedule = timeline.schedule
    longest, bubble = float(timeline.makespan), float(max(timeline.bubble))
    return (f"{TITLES.get(schedule.name, schedule.name)}, {schedule.ranks} ranks, {schedule.micro_batches} micro-batches: "
            f"makespan {longest:g}, bubble {bubble:g} ({bubble / longest if longest else 0:.1%}), "
            f"at most {float(max(timeline.peak_shares)):g} activations")


def picture(timeline: Timeline, *, title: str | None = None, legend: bool = True, width: float | None = None,
            row_inch: float = 0.32) -> Figure:
    """One schedule as a figure. width in inches; by default wide enough for the numbers of the shortest cells."""
    span, ranks = float(timeline.makespan), timeline.schedule.ranks
    if not span:
        raise ValueError("f, b and w must not all be 0: there is nothing to draw")
    shortest = min((float(c.end - c.start) for row in timeline.cells for c in row if c.end > c.start), default=1.0)
    inch = min(0.2 / shortest, (WIDEST - 1) / span) if width is None else (width - 0.9) / span
    wide = max(inch * span + 0.9, 4.0) if width is None else width
    entries = legend_of(timeline) if legend else []
    lines = max(2, -(-len(entries) // max(1, int(wide / 1.75))))
    foot = 0.45 + (0.16 * lines if entries else 0)
    high = 0.36 + ranks * row_inch + foot
    with rc_context(RC):
        fig = Figure(figsize=(wide, high), facecolor=PAPER)
        inch = (wide - 0.9) / span
        ax = fig.add_axes((0.75 / wide, foot / high, (wide - 0.9) / wide, ranks * row_inch / high))
        paint(ax, timeline, inch=inch)
        ax.set_xlabel("time", labelpad=1)
        ax.spines["bottom"].set_visible(True)
        fig.text(0.75 / wide, 1 - 0.11 / high, title or headline(timeline), fontsize=9.5, va="top", color=INK)
        if entries:
            fig.legend(handles=entries, loc="lower center", ncols=-(-len(entries) // lines), frameon=False, fontsize=7.5,
                       handlelength=1.4, columnspacing=1.2, borderaxespad=0.1, labelspacing=0.25)
    return fig


def check_path(path: str | Path) -> Path:
    """Before any work: a suffix that can be written and a folder that exists."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out: the name must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"out: the folder {str(path.parent)!r} does not exist")
    return path


def save(fig: Figure, path: str | Path, dpi: int = 160) -> Path:
    """Writes a figure whole or not at all; the same figure gives the same bytes in .svg and .pdf."""
    path = check_path(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    dateless = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    try:
        with rc_context(RC):
            fig.savefig(partial, dpi=dpi, metadata=dateless)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def draw(schedule: Schedule, path: str | Path, *, title: str | None = None, legend: bool = True, width: float | None = None,
         **times) -> Path:
    """Draws a schedule to a file. times: those of `simulate` (default F = 1, B = 2, W = 1, an overlapped pair 3)."""
    check_path(path)
    return save(picture(simulate(schedule, **times), title=title, legend=legend, width=width), path)
