"""A micro-batch as one CUDA graph: the device's work is recorded once and started as a whole.

The problem: a micro-batch is some thousand kernels. Starting each costs the host about ten microseconds, and Python around
it as much again; a small model, or one in FP8, is done with a kernel before the host has started the next. But the work is
the same for every micro-batch of one shape: which expert gets which token is data on the device, arrays are as long as they can
become (minids/kernels/dispatch.py), and nothing waits for the device. So it is recorded, addresses and all, and a replay
copies the new tokens to where the recorded work reads them.

What follows from recording:
- what Python decides is decided once: numbers that change from step to step come in as tensors;
- gradients stay where they were when it was recorded. Either each replay writes them anew, or it adds to them, and the
  caller sets them to zero before a step's first (`zero`);
- results lie in the same memory every time: whoever keeps one copies it before the next replay;
- weights in lower precision are made inside, once a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 2  # runs before recording: they compile kernels, and let libraries choose theirs


class Graphed:
    """``function`` of tensors on one CUDA device, which ends with a backward pass to ``parameters``; recorded at the first
    call with some shapes and dtypes, replayed at all others. Its results, nested as they are, must not require gradients.

    Args:
        accumulate: whether a call adds to the parameters' gradients, as backward does, or replaces them.
    """

    def __init__(self, function: Callable[..., Any], parameters: Sequence[nn.Parameter], accumulate: bool):
        devices = {p.device.type for p in parameters}
        if devices != {"cuda"}:
            found = ", ".join(sorted(devices)) or "no device"
            raise ValueError(f"Graphed: parameters on {found}, must be on a CUDA device")
        self.function, self.parameters, self.accumulate = function, list(parameters), accumulate
        self.recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Any, list[Tensor | None]]] = {}
        self.gradients: list[Tensor] = []  # of all parameters, where calls add to them

    def zero(self) -> None:
        """Before the first call of a step whose calls add: gradients of 0, where the recorded work adds to them."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(p) for p in self.parameters]
        torch._foreach_zero_(self.gradients)
        self._attach(self.gradients)

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.recorded:
            self.recorded[key] = self._record(inputs)
        graph, places, results, gradients = self.recorded[key]
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x, non_blocking=True)
        graph.replay()
        if not self.accumulate:
            self._attach(gradients)
        return results

    def _record(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any, list[Tensor | None]]:
        places, before = [x.clone() for x in inputs], [p.grad for p in self.parameters]
        self._attach([None] * len(before))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.function(*places)
                self._attach([None] * len(before))
        torch.cuda.current_stream().wait_stream(side)
        if self.accumulate:
            self._attach(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.function(*places)
        gradients = [p.grad for p in self.parameters]
        return graph, places, results, gradients

    def _attach(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
