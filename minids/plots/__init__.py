"""Every figure of the package, one named function each, all in one style; a file for each part of the course."""

from minids.plots.course_map import cache_bars, cost_bars, flop_shares, parameter_squares, system_map
from minids.plots.mla import cheaper_form, decode_times, merged_rank, recall_by_cache, roofline, shared_heads
from minids.plots.rope import distance_profile, loss_by_position, needle_maps, rotation_dials, wavelength_chart
from minids.plots.training import loss_curve, smooth

__all__ = [
    "cache_bars",
    "cheaper_form",
    "cost_bars",
    "decode_times",
    "distance_profile",
    "flop_shares",
    "loss_by_position",
    "loss_curve",
    "merged_rank",
    "needle_maps",
    "parameter_squares",
    "recall_by_cache",
    "roofline",
    "rotation_dials",
    "shared_heads",
    "smooth",
    "system_map",
    "wavelength_chart",
]
