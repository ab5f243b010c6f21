"""The weighted average of a tensor over models, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements that are in float64 at a time


def average(values: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The sum of weight * value, on the CPU.

    Every product and sum is in float64, and the products of an element are added from the least to the largest, so
    the order of the models changes nothing. A model of weight 0 is not read. Values with the same bits in all models
    stay what they are, whatever the rounding of the weights' sum.

    Args:
        values: floating point, of one shape.
        weights: of each.
        dtype: of the result.
    """
    used = [(value.detach(), weight) for value, weight in zip(values, weights, strict=True) if weight]
    first, _ = used[0]
    result = torch.empty(first.shape, dtype=dtype, device="cpu")
    flat, parts = result.view(-1), [(value.reshape(-1), weight) for value, weight in used]
    for start in range(0, flat.numel(), CHUNK):
        place = slice(start, start + CHUNK)
        chunks = [(value[place].cpu().double(), weight) for value, weight in parts]
        flat[place] = _for_halves(_sum(chunks)) if dtype.itemsize == 2 else _sum(chunks)
    return result


def _for_halves(x: Tensor) -> Tensor:
    """float64 in float32, rounded to odd: torch takes halves from float32, and so they are rounded once."""
    near = x.float()
    inexact = (near.double() != x) & ~x.isnan()
    bits = near.view(torch.int32)
    below = bits - (near.double().abs() > x.abs()).int()
    return torch.where(inexact, below | 1, bits).view(torch.float32)


def _sum(chunks: Sequence[tuple[Tensor, float]]) -> Tensor:
    (first, _), *others = chunks
    if not others:
        return first
    products = [value * weight for value, weight in chunks]
    for last in range(len(products) - 1, 0, -1):  # bubble sort: few models, and each comparison is of a whole chunk
        for place in range(last):
            low, high = products[place], products[place + 1]
            products[place], products[place + 1] = torch.minimum(low, high), torch.maximum(low, high)
    total = products[0]
    for product in products[1:]:
        total = total + product
    bits = first.view(torch.int64)  # two zeros may have two signs, and NaN equals nothing
    same = torch.stack([value.view(torch.int64) == bits for value, _ in others]).all(0)
    return torch.where(same, first, total)
