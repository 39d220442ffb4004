"""The one style of every figure.

A figure function takes data, returns a matplotlib Figure and shows nothing: a notebook displays the returned figure, a
program calls `fig.savefig`. The background is opaque white, so figures read the same in light and dark themes; the
colours keep their order under the common forms of colour blindness; every axis has a unit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a5fa8", "#7a7a7a"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
STYLE = {
    "figure.figsize": (6.4, 3.6), "figure.dpi": 110, "figure.facecolor": "white", "savefig.facecolor": "white",
    "savefig.dpi": 150, "figure.constrained_layout.use": True, "axes.facecolor": "white", "axes.edgecolor": "#444444",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.titlesize": 11, "axes.labelsize": 10, "font.size": 9,
    "legend.frameon": False, "lines.linewidth": 1.6, "axes.prop_cycle": plt.cycler(color=COLOURS),
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a figure function in the style above and close its figure, so that a notebook shows it once."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            fig = draw(*args, **kwargs)
            plt.close(fig)
            return fig

    return wrapped
