"""Every figure of the package, one named function each, all in one style; a file for each part of the course."""

from minids.plots.training import loss_curve, smooth

__all__ = ["loss_curve", "smooth"]
