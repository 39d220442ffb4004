"""Inference: sampling, batched generation over the latent cache, speculation, continuous batching over a paged cache."""

from minids.infer.generate import generate
from minids.infer.speculate import SpeculationStats

__all__ = ["SpeculationStats", "generate"]
