"""Bias tables and positions of images for another size, as upstream makes them when it loads a file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.installation import optional
from onepeace_fast.relative_position import CLS_ENTRIES


def grid_of_table(rows: int) -> int:
    """The side, in patches, of the images that a bias table of so many rows is for."""
    return (round(max(rows - CLS_ENTRIES, 0) ** 0.5) + 1) // 2


def grid_of_positions(rows: int) -> int:
    """The side, in patches, of the grid of so many positions, CLS counted."""
    return round(max(rows - 1, 0) ** 0.5)


def resample_table(table: Tensor, grid: int) -> Tensor:
    """A bias table [rows, heads] for images of ``grid`` x ``grid`` patches, more than it has; CLS rows stay.

    Distances of the old table lie on a geometric sequence that reaches the new one's largest, so that small distances
    keep their values (BEiT, arXiv 2106.08254); between them a cubic spline interpolates.

    Raises:
        ImportError: SciPy is missing; one line that says how to install it.
    """
    spline = optional("scipy.interpolate", "resample").RectBivariateSpline
    old = 2 * grid_of_table(len(table)) - 1
    new = 2 * grid - 1
    ratio = _ratio(old // 2, new // 2)
    places = [0.0]
    for step in range(old // 2):
        places.append(places[-1] + ratio**step)
    knots = [-place for place in places[:0:-1]] + places
    targets = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64, device="cpu").numpy()
    columns = []
    for head in table[:-CLS_ENTRIES].float().t():
        surface = spline(knots, knots, head.view(old, old).t().double().numpy())
        columns.append(torch.from_numpy(surface(targets, targets).T.copy()).flatten())
    return torch.cat([torch.stack(columns, dim=1).to(table.dtype), table[-CLS_ENTRIES:]])


def _ratio(steps: int, reach: int) -> float:
    """The ratio of a geometric sequence from 1 whose sum over so many steps is ``reach``, to 1e-6, from 1.01 to 1.5."""
    left, right = 1.01, 1.5
    middle = left
    while right - left > 1e-6:
        middle = (left + right) / 2
        if (1 - middle**steps) / (1 - middle) > reach:
            right = middle
        else:
            left = middle
    return middle


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """Positions [1 + patches, dim], CLS first, of another square grid, bicubically in float32."""
    old = grid_of_positions(len(positions))
    patches = positions[1:].float().t().reshape(1, -1, old, old)
    resampled = F.interpolate(patches, size=(grid, grid), mode="bicubic")[0].flatten(1).t()
    return torch.cat([positions[:1], resampled.to(positions.dtype)])
