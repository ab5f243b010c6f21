"""Swin's shifted windows (arXiv 2103.14030) as segments of attention, without a mask.

Swin rolls an image by the shift, cuts it into windows, and masks the pairs of a window whose tokens the roll brought
together from opposite edges. Here such a window is several segments, one for each of its parts. Attention inside the
segments computes the same, and no masked pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onepeace_fast.checks import require
from onepeace_fast.relative_position import window_codes


class ShiftedWindows(NamedTuple):
    """Where the tokens of the windows are; T tokens in all images, S segments.

    To attend, gather rows by ``order`` from tokens [T, ...], row by row and image after image, and put the result back
    by ``order.argsort()``.
    """

    order: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [1, S + 1], first row of each segment; the segment's end is the next entry
    codes: Tensor  # int32 [T], of each row, for a bias over this very window: one of another has other strides
    lengths: tuple[int, ...]  # rows of each segment


def shifted_windows(
    size: Sequence[int],
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    *,
    images: int = 1,
    device: torch.device | str | None = None,
) -> ShiftedWindows:
    """Order, segments and codes by which attention is Swin's over windows, shifted or not.

    It computes on the CPU; make one for each size and shift, before the layers run.

    Args:
        size: tokens along each axis, [height, width], for Video Swin [time, height, width].
        window: tokens of a window along each axis; an int stands for equal ones.
        shift: tokens that the windows are shifted by along each axis, less than the window's; likewise. Public models
            take half the window, and most of them 0 along an axis that has one window alone: here it is obeyed.
        images: images of this size after one another.
        device: where the tensors are put.

    Raises:
        ValueError: a size that windows do not divide: pad as the public model does; or a shift past the window.
    """
    axes = len(size)
    windows, shifts = _along(axes, "window", window), _along(axes, "shift", shift)
    require(all(w > 0 for w in windows), f"window: expected positive sides, got {list(windows)}")
    require(
        all(n > 0 and n % w == 0 for n, w in zip(size, windows, strict=True)),
        f"size: expected multiples of the window {list(windows)}, got {list(size)}; pad the tokens first",
    )
    require(
        all(0 <= s < w for s, w in zip(shifts, windows, strict=True)),
        f"shift: expected from 0 to less than the window {list(windows)}, got {list(shifts)}",
    )
    # Of each token of the rolled image: where it was, and which part of which window it is in.
    token = segment = torch.zeros(1, dtype=torch.int64, device="cpu")
    for n, w, s in zip(size, windows, shifts, strict=True):
        rolled = torch.arange(n, device="cpu")
        token = (token[:, None] * n + (rolled + s) % n).flatten()
        # A window has at most two parts along an axis: the roll brought the last s tokens from the other edge.
        part = 2 * (rolled // w) + (rolled >= n - s).long()
        segment = (segment[:, None] * (2 * (n // w)) + part).flatten()
    codes = window_codes(windows, windows, "cpu").view(windows)
    codes = codes.repeat([n // w for n, w in zip(size, windows, strict=True)]).flatten()
    by_segment = segment.argsort(stable=True)
    counts = segment.bincount()
    lengths = counts[counts > 0].repeat(images)
    starts = torch.arange(images, device="cpu")[:, None] * token.shape[0]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    return ShiftedWindows(
        (starts + token[by_segment]).flatten().to(device),
        cu_seqlens[None].to(device),
        codes[by_segment].repeat(images).to(device),
        tuple(lengths.tolist()),
    )


def _along(axes: int, name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else (value,)
    require(
        len(values) == axes and all(isinstance(one, int) for one in values),
        f"{name}: expected a whole number, or one for each of {axes} axes, got {value}",
    )
    return values
