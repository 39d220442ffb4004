"""Every figure of the package, one named function each, all in one style; a file for each part of the course."""

from minids.plots.balance import balance_over_time, gamma_sweep, loss_by_kind, node_limit, pareto, specialisation
from minids.plots.course_map import cache_bars, cost_bars, flop_shares, parameter_squares, system_map
from minids.plots.inference import (
    cheaper_map,
    compute_or_read,
    experts_read,
    form_times,
    page_table,
    slot_timelines,
    step_parts,
)
from minids.plots.mla import cheaper_form, decode_times, merged_rank, recall_by_cache, roofline, shared_heads
from minids.plots.mtp import accepted_by_depth, chain_of_modules, depth_losses, overlap_of_two, with_and_without
from minids.plots.placement import gpu_load_bars, nodes_reached_bars
from minids.plots.pretraining import (
    gradient_ranges,
    packed_row,
    recipe_phases,
    seed_effects,
    seed_spread,
    spike_watch,
    training_run,
)
from minids.plots.rope import distance_profile, loss_by_position, needle_maps, rotation_dials, wavelength_chart
from minids.plots.router import bias_at_work, collapse, counting_mistakes, routing_steps, strategy_loads, wire_times
from minids.plots.speculation import draft_slots, drafted_text, rejection_rule, speculation_gain, tokens_per_step
from minids.plots.training import loss_curve, smooth

__all__ = [
    "accepted_by_depth",
    "balance_over_time",
    "bias_at_work",
    "cache_bars",
    "chain_of_modules",
    "cheaper_form",
    "cheaper_map",
    "collapse",
    "compute_or_read",
    "cost_bars",
    "counting_mistakes",
    "decode_times",
    "depth_losses",
    "distance_profile",
    "draft_slots",
    "drafted_text",
    "experts_read",
    "flop_shares",
    "form_times",
    "gamma_sweep",
    "gpu_load_bars",
    "gradient_ranges",
    "loss_by_kind",
    "loss_by_position",
    "loss_curve",
    "merged_rank",
    "needle_maps",
    "node_limit",
    "nodes_reached_bars",
    "overlap_of_two",
    "packed_row",
    "page_table",
    "parameter_squares",
    "pareto",
    "recall_by_cache",
    "recipe_phases",
    "rejection_rule",
    "roofline",
    "rotation_dials",
    "routing_steps",
    "seed_effects",
    "seed_spread",
    "shared_heads",
    "slot_timelines",
    "smooth",
    "specialisation",
    "speculation_gain",
    "spike_watch",
    "step_parts",
    "strategy_loads",
    "system_map",
    "tokens_per_step",
    "training_run",
    "wavelength_chart",
    "wire_times",
    "with_and_without",
]
