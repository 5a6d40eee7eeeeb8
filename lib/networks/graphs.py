"""CUDA graphs: the kernels of a forward pass, recorded once for each shape of input and replayed without the CPU.

A window always has the same shape, and small networks spend their time on launching kernels: a window of
``hippocampus_mr`` takes 1.6 ms instead of 15.1 on an H200, one of ``abdomen_ct`` 4.1 instead of 21.6 (bf16,
docs/experiments/benchmark-notebook.md). It is off by default, since a recording keeps the memory of its batch for as
long as the network is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP_PASSES = 3


class GraphedForward:
    """A forward pass that is recorded for the first input of each shape and then replayed; for GPUs only.

    On an H200 in bf16 a window of ``abdomen_ct`` takes 4.1 ms instead of 21.6, one of ``hippocampus_mr`` 1.6 instead of
    15.1 (``benchmarks``, docs/experiments/benchmark-notebook.md).

    Args:
        forward: function from one tensor to another, in evaluation mode, whose operations do not depend on values.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._forward = forward
        self._recordings: dict[torch.Size, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """The output, in its own memory, since the next replay overwrites that of the recording."""
        if windows.shape not in self._recordings:
            self._recordings[windows.shape] = self._record(windows)
        graph, inputs, outputs = self._recordings[windows.shape]
        inputs.copy_(windows)
        graph.replay()
        return outputs.clone()

    def _record(self, windows: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        """Warm up on a separate stream, where libraries choose their algorithms, and record."""
        inputs, stream = windows.clone(), torch.cuda.Stream(windows.device)
        stream.wait_stream(torch.cuda.current_stream(windows.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._forward(inputs)
        torch.cuda.current_stream(windows.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._forward(inputs)
        return graph, inputs, outputs
