"""Experiments: a question of the papers in miniature, many small runs, their data kept and figures drawn from it."""
