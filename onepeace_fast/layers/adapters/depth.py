"""Depth and normal maps: the image's stem, positions and bias over patches of 1 and of 3 channels."""

from __future__ import annotations

import torch
from torch import Tensor

from onepeace_fast.config import ImageAdapterConfig, TransformerConfig
from onepeace_fast.layers.adapters.adapter import Fault
from onepeace_fast.layers.adapters.image import ImageAdapter

LENGTH_TOLERANCE = 0.02  # that of a unit vector in bfloat16 is off by up to 0.007


class _MapAdapter(ImageAdapter):
    """An image adapter of an added modality.

    Args:
        config: the model's ``config.encoder``.
        position_grid, bias_grid: patches of the side, as of ``ImageAdapterConfig``.
    """

    def __init__(self, config: TransformerConfig, position_grid: int = 16, bias_grid: int = 16) -> None:
        grids = ImageAdapterConfig(position_grid=position_grid, bias_grid=bias_grid)
        super().__init__(grids, config.embed_dim, config.attention_heads, config.bias_tables, stem=True)


class DepthAdapter(_MapAdapter):
    """Depth maps [rows, 1, side, side] in metres, 0 where it is not known.

    The stem sees the logarithm, and beside it a 1 where it is known: its first norm would hide how far away all is.
    """

    channels, stem_channels = 1, 2

    def faults(self, name: str, value: Tensor, padding: Tensor | None) -> list[Fault]:
        outside = ~(value.isfinite() & (value >= 0))
        return [(outside.sum(), lambda n: f"{name}: expected metres, 0 where unknown, got {n} negative or not finite")]

    def tokens(self, value: Tensor) -> Tensor:
        known = value > 0
        return super().tokens(torch.cat([torch.where(known, value, 1).log(), known.to(value.dtype)], dim=1))


class NormalAdapter(_MapAdapter):
    """Maps of surface normals [rows, 3, side, side]: unit vectors, zeros where they are not known."""

    def faults(self, name: str, value: Tensor, padding: Tensor | None) -> list[Fault]:
        length = value.float().norm(dim=1)
        outside = ~((length == 0) | ((length - 1).abs() <= LENGTH_TOLERANCE))
        return [(outside.sum(), lambda n: f"{name}: expected unit vectors, zeros where unknown, got {n} others")]
