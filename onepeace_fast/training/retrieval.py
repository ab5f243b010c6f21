"""Retrieval figures from embeddings: recall at k, median rank, and both by chance.

An item may have several right answers, as in COCO and Flickr30k with five captions for an image: its rank is that of
its first right answer, counted from 1. What scores the same as that answer and is wrong stands before it, so that
equal embeddings earn nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
_ROWS = 1024  # queries that are compared with all candidates at once


class Figures(NamedTuple):
    """One direction: recall is {k: share of the queries}; the figures by chance are those of a random order."""

    queries: int
    candidates: int
    recall: dict[int, float]
    median_rank: float
    chance_recall: dict[int, float]
    chance_median_rank: int


def ranks(queries: Tensor, candidates: Tensor, right: Sequence[Sequence[int]]) -> list[int]:
    """The rank of each query's first right answer, from 1.

    Args:
        queries, candidates: embeddings, [items, dim], compared by their products.
        right: for each query the indices of its right answers, at least one.
    """
    result: list[int] = []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.t()
        answers = right[start : start + _ROWS]
        row = torch.tensor([place for place, found in enumerate(answers) for _ in found], device=scores.device)
        column = torch.tensor([index for found in answers for index in found], device=scores.device)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[row, column] = True
        best = scores.masked_fill(~is_right, -math.inf).amax(1, keepdim=True)
        result += (1 + (~(scores < best) & ~is_right).sum(1)).tolist()
    return result


def figures(queries: Tensor, candidates: Tensor, right: Sequence[Sequence[int]]) -> Figures:
    """All figures of one direction; arguments as for ``ranks``."""
    found, count = ranks(queries, candidates, right), len(candidates)
    answers = Counter(len(set(indices)) for indices in right)
    return Figures(
        len(queries),
        count,
        {k: sum(rank <= k for rank in found) / len(found) for k in RECALL_AT},
        statistics.median(found),
        {k: chance_recall(count, answers, k) for k in RECALL_AT},
        chance_median_rank(count, answers),
    )


def chance_recall(count: int, answers: Counter[int], k: int) -> float:
    """The recall at k of a random order of ``count`` candidates; ``answers``: {right answers: how many queries}.

    One query with r right answers misses them all with probability C(count - r, k) / C(count, k).
    """
    k = min(k, count)
    hits = (many * (1 - math.comb(count - r, k) / math.comb(count, k)) for r, many in answers.items())
    return sum(hits) / answers.total()


def chance_median_rank(count: int, answers: Counter[int]) -> int:
    """The smallest k at which a random order has a recall of a half."""
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if chance_recall(count, answers, middle) >= 0.5 else (middle + 1, high)
    return low
