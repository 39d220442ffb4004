"""Training: the recipe, the optimizer, the step, the run folder and the loop (V3 section 4.2)."""
