"""A family made for the tests of ``fuse`` itself, and a model of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onepeace_fast.fusion.family import FusedCall, Refusal


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Encoder(nn.Module):
    """A stack whose fused form says so by a second output."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        for layer in self.layers:
            x = layer(x)
        return scale * x, "own"


class Sums(FusedCall):
    family = "sums"

    def __init__(self, root: nn.Module) -> None:
        if root.norm.normalized_shape != (3,):
            raise Refusal(f"norm: expected width 3, got {root.norm.normalized_shape[0]}")
        super().__init__(root, root.layers)
        for layer in root.layers:
            self.replace(layer, "forward", "layer")

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return isinstance(module, Encoder)

    def declines(self, x: Tensor, scale: float = 1.0) -> str:
        return "" if scale == 1 else "a scale was asked for"

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        self.count_tokens(2 * x.shape[0], x.shape[0])
        for layer in self.root.layers:
            x = layer(x, "fused")
        return x, "fused"

    def layer(self, replacement: Any, x: Tensor, way: str = "") -> Tensor:
        if not way:
            return replacement.original(x)
        linear = replacement.module.linear
        return x + nn.functional.linear(x, linear.weight, linear.bias)


class Model(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        encoded, self.way = self.encoder(x, scale=scale)
        return self.head(encoded)


class Around(nn.Module):
    """As an adapter of low rank stands in the place of a linear layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Tensor:
        return 2 * self.inner(*args)


X = torch.arange(6.0).view(2, 3)


def ways(model: Model) -> str:
    model(X)
    return model.way
