"""Capturing a step in a CUDA graph; without a GPU a replay runs the step, which tries a test's own host side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP_CALLS = 3


def captured(step: Callable[[], Sequence[Tensor]], device: str = "cuda") -> tuple[Callable[[], None], Sequence[Tensor]]:
    """The replay of a step, and the tensors that every replay stores its results into."""
    if device != "cuda":
        results = step()
        return lambda: [result.copy_(again) for result, again in zip(results, step(), strict=True)] and None, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # what the step reads may still be on its way there
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results
