"""Every figure of the package, one named function each, all in one style; a file for each part of the course."""

from minids.plots.course_map import cache_bars, cost_bars, flop_shares, parameter_squares, system_map
from minids.plots.training import loss_curve, smooth

__all__ = [
    "cache_bars",
    "cost_bars",
    "flop_shares",
    "loss_curve",
    "parameter_squares",
    "smooth",
    "system_map",
]
