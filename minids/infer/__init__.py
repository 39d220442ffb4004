"""Inference: sampling, batched generation over the latent cache, speculation, continuous batching over a paged cache."""

from minids.infer.engine import Engine, Event, Request
from minids.infer.generate import generate
from minids.infer.speculate import SpeculationStats

__all__ = ["Engine", "Event", "Request", "SpeculationStats", "generate"]
