"""Packed rows of any number of modalities, each with an FFN of its own: the routed FFN without the rest of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.support.shapes import Shape, Sizes
from onepeace_fast.layers.transformer import TransformerLayer, new_ffn
from onepeace_fast.route_plan import RoutePlan


def ragged_shape(modalities: int, rows: int) -> Shape:
    """One sample whose modalities have rows in the proportion of 1 to 2 to 3 and so on, all together ``rows``."""
    steps = modalities * (modalities + 1) // 2
    bounds = [rows * (m * (m + 1) // 2) // steps for m in range(modalities + 1)]
    lengths = {f"modality_{m}": [bounds[m + 1] - bounds[m]] for m in range(modalities)}
    return Shape(f"{modalities} modalities, {rows} rows", lengths)


class RoutedRows:
    """What ``FeedForwardCase`` measures in place of a layer and its batch."""

    def __init__(self, shape: Shape, sizes: Sizes, device: torch.device, dtype: torch.dtype, sets: int) -> None:
        torch.manual_seed(0)
        self.shape, self.sizes, self.device, self.dtype, self.sets = shape, sizes, device, dtype, sets
        config = sizes.config(["text"])
        self.layer = TransformerLayer(config)
        for name in shape.lengths:
            self.layer.add_module(f"{name}_ffn", new_ffn(config))
        self.layer.to(device, dtype)
        self.plan = RoutePlan.from_lengths(shape.lengths, device=device, first_is_cls=True)
        self.packed = [self._random() for _ in range(sets)]
        self.gradients = [self._random() for _ in range(sets)]

    def _random(self) -> Tensor:
        return torch.randn(self.shape.real_tokens, self.sizes.width, device=self.device).to(self.dtype)
