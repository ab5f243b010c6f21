"""What attention's reference walks: packed samples in groups, and the bias entry of every pair of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast.attention_structures import BiasVectors, Segments
from onepeace_fast.checks import is_on_host, require, require_values
from onepeace_fast.relative_position import CLS_ENTRIES

PAIRS_OF_A_GROUP = 2**13
PAIRS_WITHOUT_PADDING = 2**15  # where all samples are of one length
VECTOR = 16
PAIRS_OF_A_DEVICE_GROUP = 2**22
PAIRS_OF_DEVICE_HEADS = 2**24
UNSEEN = 2**31 - 1  # the order of a row that no query is to see, such as a free place of a cache


class Group(NamedTuple):
    """N samples side by side: the rows of their tokens, int64 [N, L], or the slice of rows that they are.

    ``valid`` bool [N, L] marks real tokens, None where all are; padding is written to a spare row.
    """

    rows: Tensor | slice
    valid: Tensor | None
    samples: int
    length: int
    has_empty: bool = False  # whether a sample may be without a token that padding could repeat

    def gather(self, x: Tensor) -> Tensor:
        """[rows, ...] to [N, L, ...]; padding repeats a row of its sample."""
        rows = x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows.flatten())
        return rows.view(self.samples, self.length, *rows.shape[1:])  # a view faster than unflatten's

    def read(self, x: Tensor) -> Tensor:
        """[rows, ...] to [N, L, ...]; padding is zero where a sample may be without a token to repeat."""
        tokens = self.gather(x)
        if self.valid is None or not self.has_empty:
            return tokens
        return tokens.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (x.dim() - 1)), 0)

    def scatter(self, x: Tensor, value: Tensor) -> None:
        """Store [N, L, ...] at its rows of x, whose last row is spare."""
        if isinstance(self.rows, slice):
            x[self.rows].unflatten(0, (self.samples, self.length)).copy_(value)
        else:
            rows = self.rows if self.valid is None else torch.where(self.valid, self.rows, x.shape[0] - 1)
            x.index_copy_(0, rows.flatten(), value.flatten(0, 1).to(x.dtype))

    def placed(self, x: Tensor | None, value: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """``scatter`` into x, [rows + 1, ...] with zeros where it is None; what is all rows is taken as it is."""
        if isinstance(self.rows, slice) and self.rows == slice(0, rows):
            return value.flatten(0, 1).to(dtype).contiguous()
        if x is None:
            x = value.new_zeros(rows + 1, *value.shape[2:], dtype=dtype)
        self.scatter(x, value)
        return x


class Pairs(NamedTuple):
    """Samples side by side: the group of their queries and that of their keys, which may be the same."""

    queries: Group
    keys: Group


def places_of(groups: Sequence[Group], rows: int) -> tuple[Tensor | None, Tensor | None]:
    """The packed row of each token of all groups, padding included, and the place of each of ``rows`` among them.

    Both are None where the groups are all rows in their order.
    """
    in_order = torch.arange(rows)
    packed = [in_order[group.rows] if isinstance(group.rows, slice) else group.rows.flatten() for group in groups]
    index = torch.cat(packed)
    if torch.equal(index, in_order):
        return None, None
    real = [
        torch.ones_like(part, dtype=torch.bool) if group.valid is None else group.valid.flatten()
        for group, part in zip(groups, packed, strict=True)
    ]
    places = torch.cat(real).nonzero().squeeze(1)
    return index, torch.empty_like(in_order).scatter_(0, index[places], places)


def sample_pairs(segments: Segments, keys: Segments | None = None) -> Iterator[Pairs]:
    """Samples to compute at once, few enough for linear memory: on a CPU by length, elsewhere at ``max_length``.

    ``keys`` are the segments of other tokens than the queries'. With ``max_length`` nothing is read from a device.
    """
    cu_seqlens = segments.cu_seqlens
    if cu_seqlens.shape[1] == 1:
        return
    read: Any = _HostGroups if is_on_host(cu_seqlens) else _DeviceGroups
    of_queries = read(segments, 0)
    of_keys = of_queries if keys is None else read(keys, 1)
    for samples in of_queries.together(of_keys):
        queries = of_queries.group(samples)
        yield Pairs(queries, queries if keys is None else of_keys.group(samples))


class _DeviceGroups:
    """Groups of as many samples as fit, padded to the longest of all."""

    def __init__(self, segments: Segments, least: int) -> None:
        cu_seqlens = segments.cu_seqlens
        self._starts, self._lengths = cu_seqlens[:, :-1].long(), cu_seqlens.diff(dim=1).long()
        self.longest = max(longest_sample(segments), least)

    def together(self, keys: _DeviceGroups) -> Iterator[slice]:
        """Which samples to compute at once."""
        step = _samples_at_once(self.longest, keys.longest)
        samples = self._starts.shape[1] if self.longest else 0
        return (slice(first, first + step) for first in range(0, samples, step))

    def group(self, samples: slice) -> Group:
        """Their rows."""
        rows, valid = _padded_rows(self._starts[:, samples], self._lengths[:, samples], self.longest)
        return Group(rows, valid, rows.shape[0], self.longest, has_empty=True)


class _HostGroups:
    """Groups of samples of similar length, padded to the longest of each group, or not at all."""

    def __init__(self, segments: Segments, least: int) -> None:
        self._segments = [
            [(start, stop - start) for start, stop in pairwise(row)] for row in segments.cu_seqlens.tolist()
        ]
        self._totals = [sum(length for _, length in sample) for sample in zip(*self._segments, strict=True)]
        self._least = least

    def together(self, keys: _HostGroups) -> Iterator[list[int]]:
        """Which samples to compute at once: with so few pairs that padding costs less than a step of Python."""
        sides = list(zip(self._totals, keys._totals, strict=True))
        group: list[int] = []
        longest = 0
        for sample in sorted((s for s, total in enumerate(self._totals) if total), key=lambda s: sides[s][::-1]):
            queries, of_keys = sides[sample]
            limit = PAIRS_OF_A_GROUP if group and sides[group[0]] != sides[sample] else PAIRS_WITHOUT_PADDING
            if group and (len(group) + 1) * max(longest, queries) * of_keys > limit:
                yield group
                group, longest = [], 0
            group.append(sample)
            longest = max(longest, queries)
        if group:
            yield group

    def group(self, samples: list[int]) -> Group:
        """Their rows."""
        totals = [self._totals[s] for s in samples]
        shortest, longest = min(totals), max(*totals, self._least)
        chosen = [[row[s] for s in samples] for row in self._segments]
        if (
            together := _as_slice([part for sample in zip(*chosen, strict=True) for part in sample], samples, longest)
        ) is not None:
            return Group(together, None, len(samples), longest)
        longest = _whole_vectors(len(samples), longest)
        starts, lengths = torch.tensor(chosen).unbind(-1)
        index, valid = _padded_rows(starts, lengths, longest)
        return Group(index, None if shortest == longest else valid, len(samples), longest, has_empty=not shortest)


def _whole_vectors(samples: int, length: int) -> int:
    """The length to pad a group to: a softmax takes whole vectors of scores at once, and the others one by one.

    It grows by half a vector at most, and only where many scores are to gain.
    """
    more = -length % VECTOR
    return length + more if more <= VECTOR // 2 and samples * length**2 >= PAIRS_OF_A_GROUP // 8 else length


def _as_slice(segments: Sequence[tuple[int, int]], samples: Sequence[int], length: int) -> slice | None:
    """The rows of samples of one modality and one length that follow one another; None for others."""
    parts = [(start, n) for start, n in segments if n]
    first, count = parts[0][0] if parts else 0, len(samples)
    if parts != [(first + i * length, length) for i in range(count)]:
        return None
    return slice(first, first + count * length)


def longest_sample(segments: Segments) -> int:
    """``max_length``, or where the host does not know it the longest sample, read from the device.

    Raises ValueError while a CUDA graph is captured, which no host read can be part of.
    """
    cu_seqlens = segments.cu_seqlens
    if segments.max_length or cu_seqlens.shape[1] == 1:
        return segments.max_length
    require(
        not _is_captured(cu_seqlens),
        "max_length: expected the longest sample's length while a CUDA graph is captured and PyTorch's attention runs,"
        " got 0; pass max_length, or tensors that the CUDA kernel takes",
    )
    return int(cu_seqlens.diff(dim=1).sum(0).max())


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _samples_at_once(queries: int, keys: int) -> int:
    return max(1, PAIRS_OF_A_DEVICE_GROUP // max(queries * keys, 1))


def head_slices(heads: int, samples: int, queries: int, keys: int) -> Iterator[slice]:
    """Heads to compute at once on a device, few enough for linear memory: at least one, all where samples are short.

    ``queries`` and ``keys`` are the longest samples of each.
    """
    pairs = min(samples, _samples_at_once(queries, keys)) * queries * keys
    step = max(1, PAIRS_OF_DEVICE_HEADS // max(pairs, 1))
    return (slice(first, min(first + step, heads)) for first in range(0, heads, step))


def _padded_rows(starts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Rows of each sample's tokens, its modalities one after another, and which are real: [samples, longest] each.

    Padding repeats the sample's first row, so that a NaN stays in its own sample; without any token it is row 0.
    """
    place = torch.arange(longest, device=starts.device)
    rows, total = starts[0, :, None] + place, lengths[0, :, None]
    for start, length in zip(starts[1:, :, None], lengths[1:, :, None], strict=True):
        rows = torch.where(place >= total, place + (start - total), rows)
        total = total + length
    first = rows[:, :1] * (total > 0)
    valid = place < total
    return torch.where(valid, rows, first), valid


def check_segments(segments: Segments, rows: int) -> None:
    """Raise where segments end past the rows or before they begin, are of others than their modality, or too long.

    Only a CPU is read by the host.
    """
    cu_seqlens, most = segments.cu_seqlens, segments.max_length
    if not cu_seqlens.numel():
        return
    message = f"cu_seqlens: expected growing bounds from 0 to at most {rows}, got segments outside the rows"
    if is_on_host(cu_seqlens):
        bounds = cu_seqlens.flatten().tolist()
        require(bounds == sorted(bounds) and bounds[0] >= 0 and bounds[-1] <= rows, message)
    else:
        inside = (cu_seqlens[-1, -1] <= rows) & (cu_seqlens.flatten().diff() >= 0).all() & (cu_seqlens[0, 0] >= 0)
        require_values(inside, message)
    if most:
        too_long = f"max_length: expected the longest sample's length, or 0, got {most} and a longer sample"
        require_values((cu_seqlens.diff(dim=1).sum(0) <= most).all(), too_long)
    _check_modality(segments)


def _check_modality(segments: Segments) -> None:
    """Raise where a row of a segment has not the segment's modality; only a CPU is read by the host."""
    modality, cu_seqlens = segments.modality, segments.cu_seqlens
    message = "modality: expected that of each row's segment, as a plan's modality and cu_seqlens are, got another"
    if is_on_host(modality):
        of = modality.tolist()
        for m, bounds in enumerate(cu_seqlens.tolist()):
            require(of[bounds[0] : bounds[-1]].count(m) == bounds[-1] - bounds[0], message)
        return
    row = torch.arange(modality.shape[0], device=modality.device)
    for m, row_bounds in enumerate(cu_seqlens):
        require_values(((modality == m) | (row < row_bounds[0]) | (row >= row_bounds[-1])).all(), message)


def check_codes(bias: BiasVectors, segments: Segments, keys: Segments) -> None:
    """Raise where codes differ by more than their vector covers; only a CPU is read by the host."""
    for m, (vector, offset) in enumerate(zip(*bias, strict=True)):
        counted = None if is_shared(bias, segments, keys) else m
        smallest, largest = _span(segments, counted)
        of_keys = (smallest, largest) if keys is segments else _span(keys, counted)
        above, below = largest - of_keys[0], of_keys[1] - smallest
        covered = vector.shape[1] - CLS_ENTRIES - 1 - offset
        tokens = "all tokens" if counted is None else f"modality {m}"
        at_most = f"at most {covered}" if covered == offset else f"-{offset} to {covered}"
        message = f"code: expected codes of {tokens} to differ by {at_most}, what bias[{m}] covers, got "
        if isinstance(above, Tensor):
            require_values((above <= covered) & (below <= offset), message + "more")
        else:
            require(above <= covered and below <= offset, f"{message}{max(above, below)}")


def _span(segments: Segments, modality: int | None) -> tuple[Any, Any]:
    """Smallest and largest code of a modality, or of all, CLS apart; without any, no difference is too large."""
    code, of, is_cls, end = segments.code, segments.modality, segments.is_cls, segments.cu_seqlens.shape[0]
    if is_on_host(code):  # one after another: the transformer takes far longer for a row
        rows = zip(code.tolist(), of.tolist(), is_cls.tolist(), strict=True)
        chosen = [one for one, m, cls in rows if not cls and (m < end if modality is None else m == modality)]
        return (min(chosen), max(chosen)) if chosen else (2**31, -(2**31))
    counted = (of < end if modality is None else of == modality) & ~is_cls
    if not code.numel():
        code, counted = code.new_zeros(1), counted.new_zeros(1)
    code = code.long()
    return torch.where(counted, code, 2**31).amin(), torch.where(counted, code, -(2**31)).amax()


def is_shared(bias: BiasVectors, segments: Segments, keys: Segments) -> bool:
    """Whether one vector is for pairs of tokens of several modalities."""
    return len(bias.vectors) == 1 and max(side.cu_seqlens.shape[0] for side in (segments, keys)) > 1


def check_order(segments: Segments) -> None:
    """Raise where the orders of a sample's tokens, but for unseen ones, leave out a number; a CPU alone is read."""
    order, cu_seqlens = segments.order, segments.cu_seqlens
    if order is None or not is_on_host(order) or not cu_seqlens.numel() or cu_seqlens.shape[1] == 1:
        return
    samples = torch.arange(cu_seqlens.shape[1] - 1)
    sample = torch.cat([samples.repeat_interleave(lengths) for lengths in cu_seqlens.diff(dim=1).long()])
    of_tokens = torch.cat([order[start:stop] for start, *_, stop in cu_seqlens.tolist()]).long()
    found = torch.stack([sample, of_tokens], 1)[of_tokens != UNSEEN].unique(dim=0)  # sorted
    gap = (found[1:, 0] == found[:-1, 0]) & (found[1:, 1] - found[:-1, 1] > 1)
    for place in gap.nonzero().flatten().tolist()[:1]:
        (sample_of_gap, before), (_, after) = found[place : place + 2].tolist()
        raise ValueError(
            f"order: expected every number between a sample's lowest and its highest, got {before} and then {after} in "
            f"sample {sample_of_gap}"
        )
