"""The figures of notebook 00: the map of the course, and where parameters, FLOPs, cache and GPU hours are.

`figures/map.json` holds what the map shows and which notebooks exist; `figures/map.png` is drawn from it by

    system_map(json.loads(Path("figures/map.json").read_text())).savefig("figures/map.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from minids.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, styled

COLUMN, ROW, BOX_WIDTH, BOX_HEIGHT = 22.0, 15.0, 20.0, 10.5  # of the map, in its own units
INK, PALE = "#222222", "#f3f6fa"
BOX_KEYS = {"key", "column", "label", "detail", "section", "notebook", "ready"}


# ---- the map ---------------------------------------------------------------------------------------------------------


def _check_map(data: Mapping) -> dict[str, tuple[Mapping, float, float]]:
    """key -> (box, left, bottom) of every box; ValueError for a box without a field or an arrow to nowhere."""
    placed = {}
    for i, row in enumerate(data["rows"]):
        for box in row["boxes"]:
            if missing := BOX_KEYS - set(box):
                raise ValueError(f"box {box.get('key')!r} of row {row['title']!r} lacks {', '.join(sorted(missing))}")
            placed[box["key"]] = (box, box["column"] * COLUMN, -i * ROW)
    for arrow in data["arrows"]:
        if unknown := set(arrow) - set(placed):
            raise ValueError(f"arrow {arrow}: no box {', '.join(sorted(unknown))}; there are {', '.join(placed)}")
    return placed


def _draw_box(ax: Axes, box: Mapping, x: float, y: float) -> None:
    ready = box["ready"]
    colour = BLUE if ready else GREY
    ax.add_patch(FancyBboxPatch((x, y), BOX_WIDTH, BOX_HEIGHT, boxstyle="round,pad=0,rounding_size=0.8",
                                facecolor=PALE if ready else "white", edgecolor=colour, linewidth=1.4,
                                linestyle="-" if ready else (0, (3, 2))))  # fmt: skip
    ax.add_patch(FancyBboxPatch((x + 0.8, y + 7.4), 2.6, 2.3, boxstyle="round,pad=0,rounding_size=0.4",
                                facecolor=colour if ready else "white", edgecolor=colour, linewidth=1.0))
    ax.text(x + 2.1, y + 8.5, box["notebook"][:2], color="white" if ready else colour, fontsize=8.5, weight="bold",
            ha="center", va="center")
    ax.text(x + 4.3, y + 8.5, box["label"], color=INK, fontsize=10, weight="bold", va="center")
    ax.text(x + 0.9, y + 4.8, box["detail"], color=INK, fontsize=8.2, va="center", linespacing=1.3)
    ax.text(x + 0.9, y + 1.3, box["section"], color="#555555", fontsize=7.5, va="center")


def _draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Between neighbours of a row straight across; to the row below out of the bottom, into the top."""
    style = dict(arrowstyle="-|>", color=INK, linewidth=1.2, mutation_scale=10, shrinkA=0, shrinkB=0)
    if start[1] == end[1]:
        middle = BOX_HEIGHT / 2
        tail, head = (start[0] + BOX_WIDTH, start[1] + middle), (end[0], end[1] + middle)
    else:
        tail, head = (start[0] + BOX_WIDTH / 2, start[1]), (end[0] + BOX_WIDTH / 2, end[1] + BOX_HEIGHT)
        if start[0] != end[0]:  # an elbow in the gap between the rows
            style["connectionstyle"] = "angle,angleA=0,angleB=90,rad=0"
            turn = (tail[1] + head[1]) / 2
            ax.plot([tail[0], tail[0]], [tail[1], turn], color=INK, linewidth=1.2)
            tail = (tail[0], turn)
    ax.annotate("", xy=head, xytext=tail, arrowprops=style)


@styled
def system_map(data: Mapping) -> Figure:
    """The system and the course: stages, parts, and the notebook that covers each; dashed boxes are to come, if any.

    Args:
        data: ``title``; ``rows`` with ``title``, ``boxes`` (see ``BOX_KEYS``; ``column`` counts from the left) and a
            ``note`` for a row that starts further right; ``arrows`` between keys.

    Raises:
        ValueError: a box lacks a field, or an arrow names a box that is not there.
    """
    placed = _check_map(data)
    bottom = -(len(data["rows"]) - 1) * ROW
    columns = 1 + max(box["column"] for box, _, _ in placed.values())
    width, height = columns * COLUMN + 2, ROW * len(data["rows"]) + 3
    fig, ax = plt.subplots(figsize=(width / 10, height / 10))
    for i, row in enumerate(data["rows"]):
        top = BOX_HEIGHT - i * ROW
        ax.text(0, top + 1.1, row["title"], color=BLUE, fontsize=9.5, weight="bold", va="center")
        ax.text(0, top - 0.8, row.get("note", ""), color=INK, fontsize=8.5, va="top", linespacing=1.5)
    for box, x, y in placed.values():
        _draw_box(ax, box, x, y)
    for start, end in data["arrows"]:
        _draw_arrow(ax, placed[start][1:], placed[end][1:])
    ax.text(0, BOX_HEIGHT + 4.6, data["title"], fontsize=14, weight="bold", color=INK, va="center")
    handles = [Patch(facecolor=PALE, edgecolor=BLUE, label="built from nothing in the notebook of this number")]
    if not all(box["ready"] for box, _, _ in placed.values()):
        handles.append(Patch(facecolor="white", edgecolor=GREY, linestyle="--", label="to come"))
    ax.legend(handles=handles, loc="center right", ncols=2, fontsize=8.5, borderaxespad=0,
              bbox_to_anchor=(columns * COLUMN - COLUMN + BOX_WIDTH, BOX_HEIGHT + 4.6), bbox_transform=ax.transData)
    ax.set(xlim=(-1, width - 3), ylim=(bottom - 1, bottom + height - 1), aspect="equal")
    ax.axis("off")
    return fig


# ---- where things are ------------------------------------------------------------------------------------------------


def _squares(parts: Mapping[str, float], unit: float) -> dict[str, int]:
    """Whole squares a part, adding up to the rounded total: largest remainders first."""
    exact = {name: value / unit for name, value in parts.items()}
    squares = {name: int(value) for name, value in exact.items()}
    missing = round(sum(exact.values())) - sum(squares.values())
    for name in sorted(exact, key=lambda n: squares[n] - exact[n])[:missing]:
        squares[name] += 1
    return squares


@styled
def parameter_squares(awake: Mapping[str, int], asleep: int, unit: float = 1e9, rows: int = 17) -> Figure:
    """Every parameter of the model as area: one square is ``unit`` parameters, coloured if a token uses it.

    Args:
        awake: part -> parameters that each token uses, at most seven parts.
        asleep: parameters of the routed experts that the token was not sent to.
    """
    squares = _squares({**awake, "asleep": asleep}, unit)
    palette = (ORANGE, BLUE, GREEN, PURPLE, RED, "#56b4e9", GREY)
    colours = dict(zip(awake, palette, strict=False)) | {"asleep": "#e3e3e3"}
    order = [colours[name] for name, n in squares.items() for _ in range(n)]
    fig, ax = plt.subplots(figsize=(10, 4.9))
    for i, colour in enumerate(order):
        ax.add_patch(Rectangle((i // rows, -(i % rows)), 0.86, 0.86, facecolor=colour, linewidth=0))
    total = {**awake, "asleep": asleep}
    names = {"asleep": "routed experts not chosen"} | {n: f"{n} (no square)" for n in awake if not squares[n]}
    handles = [Patch(color=colours[n], label=f"{names.get(n, n)}: {v / 1e9:.1f}B") for n, v in total.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    ax.set(xlim=(-0.2, -(-len(order) // rows) + 0.2), ylim=(-rows + 0.8, 1.2), aspect="equal")
    ax.set_title(f"{sum(total.values()) / 1e9:.0f}B parameters, one square is {unit / 1e9:.0f}B; coloured: the"
                 f" {sum(awake.values()) / 1e9:.1f}B that a token uses", pad=8)  # fmt: skip
    ax.axis("off")
    return fig


@styled
def flop_shares(lengths: Sequence[float], matrices: Mapping[str, float], core: Sequence[float],
                marks: Sequence[float]) -> Figure:  # fmt: skip
    """Share of a token's training FLOPs by part, over the context length.

    Args:
        lengths: context lengths in tokens, increasing.
        matrices: name -> FLOPs a token, the same at every length, stacked bottom to top; at most five.
        core: FLOPs a token of the core of attention at each length, stacked on top.
        marks: lengths to draw a vertical line at.
    """
    bands = {name: [value] * len(lengths) for name, value in matrices.items()} | {"attention core": core}
    totals = [sum(values) for values in zip(*bands.values(), strict=True)]
    shares = [[100 * v / t for v, t in zip(values, totals, strict=True)] for values in bands.values()]
    fig, ax = plt.subplots(figsize=(9.5, 4.6))
    colours = (ORANGE, GREEN, PURPLE, GREY, "#80b9d8")[: len(matrices)] + (BLUE,)
    ax.stackplot(lengths, shares, labels=list(bands), colors=colours, linewidth=0.4, edgecolor="white")
    for length in marks:
        ax.axvline(length, color=INK, linewidth=1.0, linestyle="--")
        ax.annotate(f"{length:,.0f}", (length, 100), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    ax.set_title("Training FLOPs of DeepSeek-V3: the core of attention takes over", pad=20)
    ax.set(xlim=(lengths[0], lengths[-1]), ylim=(0, 100), xlabel="context length (tokens, K = 1024)",
           ylabel="share of training FLOPs a token (%)")  # fmt: skip
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles[::-1], labels[::-1], loc="outside right center")
    return fig


@styled
def cache_bars(rows: Sequence[tuple[str, float, bool]]) -> Figure:
    """Cache a token of several attention designs, logarithmic: (name, bytes, whether to highlight), top to bottom."""
    fig, ax = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.2))
    names, values = [row[0] for row in rows], [row[1] / 1e3 for row in rows]
    bars = ax.barh(names, values, color=[BLUE if row[2] else GREY for row in rows], height=0.66)
    ax.bar_label(bars, [f"{v:,.1f} KB" for v in values], padding=4)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlim(10, max(values) * 3)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_title("What decoding must remember of each token")
    ax.set_xlabel("cache a token, all layers, BF16 (KB = 1000 bytes, logarithmic)")
    ax.grid(axis="y", visible=False)
    return fig


@styled
def cost_bars(hours: Mapping[str, float], price: float, r1: Sequence[str] = ()) -> Figure:
    """GPU hours of each stage and what they cost at ``price`` dollars an hour; the stages ``r1`` in another colour."""
    fig, ax = plt.subplots(figsize=(9, 0.42 * len(hours) + 1.2))
    colours = [ORANGE if name in r1 else BLUE for name in hours]
    bars = ax.barh(list(hours), [h / 1e3 for h in hours.values()], color=colours, height=0.66)
    ax.bar_label(bars, [f"{h / 1e3:,.0f}K h   ${h * price / 1e6:.3f}M" for h in hours.values()], padding=4)
    ax.invert_yaxis()
    ax.set_xlim(0, max(hours.values()) / 1e3 * 1.22)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_title("Price of the published runs")
    ax.set_xlabel(f"H800 GPU hours (thousands), at ${price:g} an hour")
    ax.legend(handles=[Patch(color=BLUE, label="DeepSeek-V3"), Patch(color=ORANGE, label="R1, on top")], loc="lower right")
    ax.grid(axis="y", visible=False)
    return fig
