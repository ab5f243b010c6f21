"""A relative bias that is given for all pairs of tokens, read back as what attention takes: a vector and segments.

A window of any number of axes has tokens row by row; a series is a window of one axis. Of such a bias every pair with
the same distance along each axis has the same number. So one pair stands for each distance, and their numbers are the
vector. Autograd writes the vector's gradient to these pairs alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.attention_structures import Segments
from onepeace_fast.relative_position import CLS_ENTRIES, window_codes
from onepeace_fast.remembered import remembered


def dense_vector(dense: Tensor, window: Sequence[int], with_cls: bool = False) -> Tensor:
    """The vector of a bias of all pairs, for tokens with the codes of the window: [heads, entries + 3].

    It is right only where ``is_relative`` holds. Its entry of equal codes is ``window_code_offset`` of the window.

    Args:
        dense: [heads, tokens, tokens], queries before keys.
        window: tokens along each axis.
        with_cls: whether a CLS stands before the window's tokens, with entries of its own. Otherwise they are zeros.
    """
    pairs = _standing_pairs(tuple(window), with_cls, dense.device)
    vector = dense.flatten(1).index_select(1, pairs)
    return vector if with_cls else F.pad(vector, (0, CLS_ENTRIES))


def is_relative(dense: Tensor, window: Sequence[int], with_cls: bool = False) -> Tensor:
    """Whether each number of a bias depends on the distance of its tokens alone: bool [], which no host reads.

    The arguments are those of ``dense_vector``; a CLS has one number for all keys, and one for all queries.
    """
    axes, fits = len(window), []
    if with_cls:
        fits = [dense[:, 0, 1:] == dense[:, 0, 1:2], dense[:, 1:, 0] == dense[:, 1:2, 0]]
        dense = dense[:, 1:, 1:]
    pairs = dense.unflatten(2, window).unflatten(1, window)
    for axis, side in enumerate(window, 1):
        # A step along an axis, of the query and of the key.
        ahead = pairs.narrow(axis, 1, side - 1).narrow(axis + axes, 1, side - 1)
        fits.append(ahead == pairs.narrow(axis, 0, side - 1).narrow(axis + axes, 0, side - 1))
    return torch.stack([fit.all() for fit in fits]).all()


@remembered
def _standing_pairs(window: tuple[int, ...], with_cls: bool, device: torch.device) -> Tensor:
    """The pair that stands for each entry of the vector, its place in the flattened bias: int64 [entries]."""
    query = key = torch.zeros(1, dtype=torch.int64, device=device)
    for side in window:
        distance = torch.arange(1 - side, side, device=device)
        query = (query[:, None] * side + distance.clamp(min=0)).flatten()
        key = (key[:, None] * side + (-distance).clamp(min=0)).flatten()
    tokens = math.prod(window)
    if not with_cls:
        return query * tokens + key
    tokens += 1
    pairs = (query + 1) * tokens + key + 1
    cls = torch.arange(CLS_ENTRIES, device=device)  # as query (0, 1), as key (1, 0), both (0, 0)
    return torch.cat([pairs, (cls == 0).long() + (cls == 1).long() * tokens])


@remembered
def full_segments(samples: int, window: tuple[int, ...], with_cls: bool, device: torch.device) -> Segments:
    """Segments of samples that all are a whole window, behind a CLS where there is one."""
    code = window_codes(window, window, device)
    if with_cls:
        code = F.pad(code, (1, 0))  # whose code is never used
    tokens = code.shape[0]
    is_cls = torch.arange(tokens, device=device) < int(with_cls)
    code, is_cls = code.repeat(samples), is_cls.repeat(samples)
    starts = torch.arange(samples + 1, dtype=torch.int32, device=device) * tokens
    return Segments(starts[None], torch.zeros_like(code), code, is_cls, tokens)


def window_parts(hidden: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of each token of N windows the part that it is in, where a mask hides all pairs of two parts, and no other.

    Args:
        hidden: bool [N, tokens, tokens], the pairs that a mask hides.
        most: parts that a window may have.

    Returns:
        int64 [N, tokens], from 0 in the order of the parts' first tokens, and bool [] whether the mask is of that kind.
    """
    # A token sees the first token of its part, and none before it.
    first = (~hidden).to(torch.uint8).argmax(-1)
    apart = first[:, :, None] != first[:, None, :]
    is_first = first == torch.arange(hidden.shape[1], device=hidden.device)
    part = (is_first.cumsum(-1) - 1).gather(-1, first)
    return part, (apart == hidden).all() & (part < most).all()
