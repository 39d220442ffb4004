"""A micro-batch as one CUDA graph: the device's work is recorded once and started as a whole.

The problem: a micro-batch is some thousand kernels. Starting each costs the host about ten microseconds, and Python around
it as much again; a small model, or one in FP8, is done with a kernel before the host has started the next. But the work is
the same for every micro-batch of one shape: which expert gets which token is data on the device, arrays are as long as
they can become (minids/kernels/dispatch.py), and nothing waits for the device. So it is recorded, addresses and all, and
a replay copies the new tokens to where the recorded work reads them.

What follows from recording:
- what Python decides is decided once: numbers that change from step to step come in as tensors;
- gradients stay where they were when it was recorded. Either each replay writes them anew, or it adds to them, and a step's
  first call sets them to zero before;
- results lie in the same memory every time: whoever keeps one copies it before the next call;
- weights in lower precision are made inside, once a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WARM_UP = 2  # runs before recording: they compile kernels, and let libraries choose theirs


class Recording(NamedTuple):
    """One graph, where it reads its inputs, and where it leaves results and gradients."""

    graph: torch.cuda.CUDAGraph
    places: list[Tensor]
    results: Any
    gradients: list[Tensor | None]


class Graphed:
    """``function`` of tensors on one CUDA device, which ends with a backward pass to ``parameters``; recorded at the first
    call with some shapes and dtypes, replayed at all others. Its results, nested as they are, must not require gradients.

    Args:
        accumulate: calls add to the gradients, from 0 after `begin`; else each replaces them.
    """

    def __init__(self, function: Callable[..., Any], parameters: Sequence[nn.Parameter], accumulate: bool = False):
        devices = {p.device.type for p in parameters}
        if devices != {"cuda"}:
            found = ", ".join(sorted(devices)) or "no device"
            raise ValueError(f"Graphed: parameters on {found}, must be on a CUDA device")
        self.function, self.parameters, self.accumulate = function, list(parameters), accumulate
        self.recorded: dict[tuple, Recording] = {}
        self.sums: list[Tensor | None] = []  # gradients that calls add to; None for parameters that get none
        self.first = True

    def begin(self) -> None:
        """The next call is the first of a step."""
        self.first = True

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.recorded:
            self.recorded[key] = self._record(inputs)
        found = self.recorded[key]
        if self.accumulate and self.first:
            torch._foreach_zero_([g for g in self.sums if g is not None])
        self.first = False
        for place, x in zip(found.places, inputs, strict=True):
            place.copy_(x, non_blocking=True)
        found.graph.replay()
        self._attach(found.gradients)
        return found.results

    def _record(self, inputs: Sequence[Tensor]) -> Recording:
        places = [x.clone() for x in inputs]
        self._warm_up(places)
        self._attach(self.sums if self.accumulate else [None] * len(self.parameters))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.function(*places)
        return Recording(graph, places, results, [p.grad for p in self.parameters])

    def _warm_up(self, places: list[Tensor]) -> None:
        """On another stream, as recording does; the gradients are thrown away."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._attach([None] * len(self.parameters))
                self.function(*places)
        torch.cuda.current_stream().wait_stream(side)
        if self.accumulate and not self.sums:
            self.sums = [None if p.grad is None else torch.zeros_like(p.grad) for p in self.parameters]

    def _attach(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient


class Recorder:
    """The graphs of a run: of steps of one micro-batch, whose gradients are written, and of several, which add up."""

    def __init__(self):
        self.graphs: dict[bool, Graphed] = {}

    def begin(
        self, function: Callable[..., Any], parameters: Sequence[nn.Parameter], accumulate: bool
    ) -> Callable[..., Any]:
        """``function`` for the micro-batches of one step. What it refers to must be the same at every step; its arguments
        are tensors, or numbers that become some."""
        if accumulate not in self.graphs:
            self.graphs[accumulate] = Graphed(function, parameters, accumulate)
        graphed = self.graphs[accumulate]
        graphed.begin()

        def run(*inputs: Tensor | float) -> Any:
            device = graphed.parameters[0].device
            return graphed(*(x if isinstance(x, Tensor) else torch.full((), x, device=device) for x in inputs))

        return run
