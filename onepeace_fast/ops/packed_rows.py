"""What the references share: the rows of each modality, and the dtype of sums over rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from onepeace_fast.ops.arguments import check_row_index
from onepeace_fast.structures import Routing


def row_slices(routing: Routing) -> Iterator[slice]:
    """Row range of each modality. Only without ``row_counts`` are the offsets read on the host."""
    bounds = [0, *accumulate(routing.row_counts)] if routing.row_counts else routing.offsets.tolist()
    return (slice(start, stop) for start, stop in pairwise(bounds))


def end_of(ranges: Sequence[slice]) -> int:
    """The first row behind those of all modalities, of which there may be none; it and the others are inert."""
    return ranges[-1].stop if ranges else 0


def rows_of_norms(routing: Routing, norms: int, count: int) -> Sequence[slice]:
    """The row range of each modality, or one of all real rows where the modalities share a norm or have none."""
    if routing.offsets is None:
        return [slice(0, count)]
    ranges = list(row_slices(routing))
    return [slice(0, end_of(ranges))] if norms <= 1 else ranges


def source_rows(routing: Routing, rows: slice, x: Tensor) -> slice | Tensor:
    """The rows of x that a range of rows stands for."""
    if routing.row_index is None:
        return rows
    index = routing.row_index[rows]
    check_row_index(index, None, x)
    return index.long()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and scores are float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
