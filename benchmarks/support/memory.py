"""The most that a call has allocated at once, on a CPU and on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from onepeace_fast.memory import peak_bytes

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints two lines for every profile


def peak_of(call: Callable[[], object]) -> int:
    """The most that a call allocates above what stood before, in bytes: of the GPU where there is one, else here."""
    if torch.cuda.is_available():
        return peak_bytes(call, torch.device("cuda"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    if not len(sizes):
        return 0
    return max(int(sizes.cumsum(0).max()), 0)
