"""Inference: sampling, and batched generation over the latent cache."""

from minids.infer.generate import generate

__all__ = ["generate"]
