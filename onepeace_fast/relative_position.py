"""Relative positions: upstream's bucketing, and the code form that replaces its [length, length] index.

Every token carries an integer code; the bias of a query i and a key j of one modality depends on ``code_i - code_j``
alone (CLS apart), so each head's table expands once per step into a vector

    vector[h, code_i - code_j + offset],   then three CLS entries: CLS as query, CLS as key, both.

An index here says which row of the bias table each entry of that vector takes. Source: ONE-PEACE (arXiv 2305.11172).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_POSITIONS = 1024
CLS_ENTRIES = 3


def series_table_rows(bucket_size: int) -> int:
    """Rows of a 1-D bias table: one per bucket and three for CLS."""
    return 2 * bucket_size - 1 + CLS_ENTRIES


def grid_table_rows(grid: int) -> int:
    """Rows of a bias table over a ``grid`` x ``grid`` image: one per 2-D distance and three for CLS."""
    return (2 * grid - 1) ** 2 + CLS_ENTRIES


def series_index(bucket_size: int, max_positions: int = MAX_POSITIONS) -> Tensor:
    """Table row of every 1-D distance from ``1 - max_positions`` to ``max_positions - 1``: int64 on the CPU.

    Exact up to half the bucket size, logarithmic beyond. Computed in float32 as upstream does, so that ceil agrees.
    """
    distance = torch.arange(1 - max_positions, max_positions, device="cpu")
    middle = bucket_size // 2
    magnitude = distance.abs().clamp(min=middle - 1)
    steps = torch.log(magnitude.to(torch.float32) / middle) / math.log((max_positions - 1) / middle) * (middle - 1)
    logarithmic = (middle + torch.ceil(steps).long()) * distance.sign()
    return torch.where(magnitude <= middle, distance, logarithmic) + bucket_size - 1


def series_vector_index(index: Tensor, bucket_size: int, width: int) -> Tensor:
    """Table rows of the vector for positions 0 to ``width - 1``: int64 [2 * width - 1 + 3].

    ``index`` is ``series_index(bucket_size)``, whose centre is distance 0.
    """
    centre = index.shape[0] // 2
    first_cls_row = 2 * bucket_size - 1
    cls = torch.arange(first_cls_row, first_cls_row + CLS_ENTRIES, device=index.device)
    return torch.cat([index[centre - (width - 1) : centre + width], cls])


def grid_codes(grid: int, table_grid: int, device: torch.device | str | None = None) -> Tensor:
    """Codes of the tokens of a square image, CLS (whose code is never used) first: int32 [grid * grid + 1].

    The stride is that of the table's own grid, so a smaller image shares a larger table.
    """
    y, x = torch.meshgrid(torch.arange(grid, device=device), torch.arange(grid, device=device), indexing="ij")
    codes = (y * (2 * table_grid - 1) + x).flatten()
    return torch.cat([codes.new_zeros(1), codes]).to(torch.int32)


def grid_code_offset(table_grid: int) -> int:
    """Entry of the grid's vector that belongs to distance (0, 0)."""
    return 2 * table_grid * (table_grid - 1)


def dense_index(code: Tensor, is_cls: Tensor, offset: int, entries: int) -> Tensor:
    """Entry of a vector for every pair of tokens: int64 [..., length, length], queries before keys.

    ``code`` and ``is_cls`` are [..., length]; ``entries`` is the vector's length, its three CLS entries included.
    """
    index = code.unsqueeze(-1).long() - code.unsqueeze(-2).long() + offset
    query, key = is_cls.unsqueeze(-1), is_cls.unsqueeze(-2)
    index = torch.where(key, entries - 2, torch.where(query, entries - 3, index))
    return torch.where(query & key, entries - 1, index)
