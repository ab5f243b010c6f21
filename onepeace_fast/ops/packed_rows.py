"""What the references share: the rows of each modality, and the dtype of sums over rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from onepeace_fast.structures import Routing


def row_slices(routing: Routing) -> Iterator[slice]:
    """Row range of each modality. Only without ``row_counts`` are the offsets read on the host."""
    bounds = [0]
    if routing.row_counts:
        for count in routing.row_counts:
            bounds.append(bounds[-1] + count)
    else:
        bounds = routing.offsets.tolist()
    return (slice(start, stop) for start, stop in pairwise(bounds))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and scores are float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
