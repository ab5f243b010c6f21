"""The relative position biases of public models from their papers, the table row of a query and a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor


def t5_bucket(query: int, key: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """T5's bucket in whole numbers: the largest step whose power of the ratio the distance reaches."""
    if bidirectional:
        buckets //= 2
        first, distance = (buckets if key > query else 0), abs(key - query)
    else:
        first, distance = 0, max(query - key, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    # exact * (max_distance / exact) ** (step / steps) <= distance
    steps = buckets - exact
    reached = [
        step for step in range(steps) if max_distance**step * exact ** (steps - step) <= distance**steps
    ]  # fmt: skip
    return first + exact + max(reached)


def window_row(window: Sequence[int], query: Sequence[int], key: Sequence[int]) -> int:
    """Place of a pair's distance in a table that has one row for each distance, the last axis fastest."""
    distances = list(product(*(range(1 - side, side) for side in window)))
    return distances.index(tuple(q - k for q, k in zip(query, key, strict=True)))


def window_index(window: Sequence[int], with_cls: bool = False, tokens: Sequence[tuple] | None = None) -> Tensor:
    """Table rows of all pairs of a window's tokens, behind a CLS whose three rows are the table's last."""
    tokens = list(product(*map(range, window))) if tokens is None else list(tokens)
    rows = len(list(product(*(range(1 - side, side) for side in window)))) + 3

    def row(query: tuple | None, key: tuple | None) -> int:
        if query is None and key is None:
            return rows - 1
        if query is None:
            return rows - 3
        if key is None:
            return rows - 2
        return window_row(window, query, key)

    everyone = [None, *tokens] if with_cls else tokens
    return torch.tensor([[row(query, key) for key in everyone] for query in everyone])


def series_index(length: int, row: Callable[[int, int], int]) -> Tensor:
    """Table rows of all pairs of a series."""
    return torch.tensor([[row(query, key) for key in range(length)] for query in range(length)])


def alibi(heads: int, length: int) -> Tensor:
    """ALiBi's bias; slopes from a table of the paper's numbers and, for others, of its public code."""
    slopes = {
        1: [1 / 256],
        2: [1 / 16, 1 / 256],
        8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
        12: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
        16: [0.5 ** (h / 2) for h in range(1, 17)],
    }[heads]
    distance = [[-abs(i - j) for j in range(length)] for i in range(length)]
    return torch.stack([slope * torch.tensor(distance, dtype=torch.float64) for slope in slopes])


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + bias) v of [tokens, heads, head_dim] with [heads, tokens, tokens]."""
    score = scale * torch.einsum("ihd,jhd->hij", q, k) + bias
    return torch.einsum("hij,jhd->ihd", score.softmax(-1), v)


def shifted_window_pairs(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Which pairs of an image attend, as the paper draws it: the image is cut at shift, shift + window, ...

    That is before the roll, by which the public code makes whole windows of the pieces.
    """

    def piece(token: tuple) -> tuple:
        return tuple((place - s) // w for place, w, s in zip(token, window, shift, strict=True))

    pieces = [piece(token) for token in product(*map(range, size))]
    return torch.tensor([[query == key for key in pieces] for query in pieces])


def shifted_window_bias(size: Sequence[int], window: Sequence[int], shift: Sequence[int], table: Tensor) -> Tensor:
    """The bias of every pair of an image that attends, and minus infinity for all others: [heads, tokens, tokens]."""
    tokens, pairs = list(product(*map(range, size))), shifted_window_pairs(size, window, shift)
    index = [
        [window_row(window, q, k) if pairs[i, j] else 0 for j, k in enumerate(tokens)] for i, q in enumerate(tokens)
    ]
    return table[torch.tensor(index)].permute(2, 0, 1).masked_fill(~pairs, -torch.inf)
