"""What attention's reference walks: packed samples in groups, and the bias entry of every pair of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast.checks import require, require_values
from onepeace_fast.relative_position import CLS_ENTRIES
from onepeace_fast.structures import BiasVectors, Segments

PAIRS_OF_A_GROUP = 2**13
PAIRS_OF_A_DEVICE_GROUP = 2**22
PAIRS_OF_DEVICE_HEADS = 2**24


def is_on_host(x: Tensor) -> bool:
    """Whether the host can read a tensor's values without waiting for a device."""
    return x.device.type == "cpu"


class Group(NamedTuple):
    """N samples side by side: the rows of their tokens, int64 [N, L], or the slice of rows that they are.

    ``valid`` bool [N, L] marks real tokens, None where all are; padding is written to a spare row.
    """

    rows: Tensor | slice
    valid: Tensor | None
    samples: int
    length: int

    def gather(self, x: Tensor) -> Tensor:
        """[rows, ...] to [N, L, ...]; padding repeats a row of its sample."""
        rows = x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows.flatten())
        return rows.unflatten(0, (self.samples, self.length))

    def read(self, x: Tensor) -> Tensor:
        """[rows, ...] to [N, L, ...]; padding is zero where a sample may be without a token to repeat."""
        tokens = self.gather(x)
        if self.valid is None or is_on_host(x):
            return tokens
        return tokens.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (x.dim() - 1)), 0)

    def scatter(self, x: Tensor, value: Tensor) -> None:
        """Store [N, L, ...] at its rows of x, whose last row is spare."""
        if isinstance(self.rows, slice):
            x[self.rows].unflatten(0, (self.samples, self.length)).copy_(value)
        else:
            rows = self.rows if self.valid is None else torch.where(self.valid, self.rows, x.shape[0] - 1)
            x.index_copy_(0, rows.flatten(), value.flatten(0, 1).to(x.dtype))


class Pairs(NamedTuple):
    """Samples side by side: the group of their queries and that of their keys, which may be the same."""

    queries: Group
    keys: Group


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
        return Group(rows, valid, rows.shape[0], self.longest)


class _HostGroups:
    """Groups of samples of similar length, padded to the longest of each group, or not at all."""

    def __init__(self, segments: Segments, least: int) -> None:
        cu_seqlens = segments.cu_seqlens
        self._starts, self._lengths = cu_seqlens[:, :-1].long(), cu_seqlens.diff(dim=1).long()
        self._host_starts, self._host_lengths = self._starts.t().tolist(), self._lengths.t().tolist()
        self._totals, self._least = self._lengths.sum(0).tolist(), least

    def together(self, keys: _HostGroups) -> Iterator[list[int]]:
        """Which samples to compute at once: with so few pairs that padding costs less than a step of Python."""
        group: list[int] = []
        sides = list(zip(self._totals, keys._totals, strict=True))
        longest = 0
        for sample in sorted((s for s, (total, _) in enumerate(sides) if total), key=lambda s: sides[s][::-1]):
            total, of_keys = sides[sample]
            if group and (len(group) + 1) * max(longest, total) * of_keys > PAIRS_OF_A_GROUP:
                yield group
                group, longest = [], 0
            group.append(sample)
            longest = max(longest, total)
        if group:
            yield group

    def group(self, samples: list[int]) -> Group:
        """Their rows."""
        totals = [self._totals[s] for s in samples]
        shortest, longest = min(totals), max(*totals, self._least)
        together = _as_slice([(self._host_starts[s], self._host_lengths[s]) for s in samples], longest)
        if together is not None:
            return Group(together, None, len(samples), longest)
        index, valid = _padded_rows(self._starts[:, samples], self._lengths[:, samples], longest)
        return Group(index, None if shortest == longest else valid, len(samples), longest)


def _as_slice(samples: Sequence[tuple[list[int], list[int]]], length: int) -> slice | None:
    """The rows of samples of one modality and one length that follow one another; None for others."""
    parts = [(start, n) for starts, lengths in samples for start, n in zip(starts, lengths, strict=True) if n]
    first = parts[0][0] if parts else 0
    if parts != [(first + i * length, length) for i in range(len(samples))]:
        return None
    return slice(first, first + len(samples) * length)


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
    before = lengths.cumsum(0) - lengths
    rows = torch.zeros(lengths.shape[1], longest, dtype=torch.int64, device=starts.device)
    for start, length, first in zip(starts, lengths, before, strict=True):
        within = place - first[:, None]
        rows = torch.where((within >= 0) & (within < length[:, None]), start[:, None] + within, rows)
    valid = place < lengths.sum(0)[:, None]
    return torch.where(valid, rows, rows[:, :1]), valid


def check_segments(cu_seqlens: Tensor, rows: int) -> None:
    """Raise where segments end past the rows or before they begin; only a CPU is read by the host."""
    if not cu_seqlens.numel():
        return
    inside = (cu_seqlens[-1, -1] <= rows) & (cu_seqlens.diff(dim=1) >= 0).all() & (cu_seqlens[0, 0] >= 0)
    require_values(
        inside, f"cu_seqlens: expected growing bounds from 0 to at most {rows}, got segments outside the rows"
    )


def check_codes(bias: BiasVectors, segments: Segments, keys: Segments) -> None:
    """Raise where codes differ by more than their vector covers; only a CPU is read by the host."""
    for m, (vector, offset) in enumerate(zip(*bias, strict=True)):
        counted = None if is_shared(bias, segments) else m
        smallest, largest = _span(segments, counted)
        of_keys = (smallest, largest) if keys is segments else _span(keys, counted)
        above, below = largest - of_keys[0], of_keys[1] - smallest
        covered = vector.shape[1] - CLS_ENTRIES - 1 - offset
        tokens = "all tokens" if counted is None else f"modality {m}"
        at_most = f"at most {covered}" if covered == offset else f"-{offset} to {covered}"
        found = str(max(int(above), int(below))) if is_on_host(above) else "more"
        require_values(
            (above <= covered) & (below <= offset),
            f"code: expected codes of {tokens} to differ by {at_most}, what bias[{m}] covers, got {found}",
        )


def _span(segments: Segments, modality: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of a modality, or of all, CLS apart; without any, no difference is too large."""
    code = segments.code.long()
    of = segments.modality
    counted = (of < segments.cu_seqlens.shape[0] if modality is None else of == modality) & ~segments.is_cls
    if not code.numel():
        code, counted = code.new_zeros(1), counted.new_zeros(1)
    return torch.where(counted, code, 2**31).amin(), torch.where(counted, code, -(2**31)).amax()


def is_shared(bias: BiasVectors, segments: Segments) -> bool:
    """Whether one vector is for pairs of tokens of all modalities."""
    return len(bias.vectors) == 1 and segments.cu_seqlens.shape[0] > 1


def check_order(segments: Segments) -> None:
    """Raise where the orders of a sample's tokens leave out a number; only a CPU is read by the host."""
    order, cu_seqlens = segments.order, segments.cu_seqlens
    if order is None or not is_on_host(order) or not cu_seqlens.numel():
        return
    samples = torch.arange(cu_seqlens.shape[1] - 1)
    sample = torch.cat([samples.repeat_interleave(lengths) for lengths in cu_seqlens.diff(dim=1).long()])
    of_tokens = torch.cat([order[start:stop] for start, *_, stop in cu_seqlens.tolist()]).long()
    found = torch.stack([sample, of_tokens], 1).unique(dim=0)  # sorted
    gap = (found[1:, 0] == found[:-1, 0]) & (found[1:, 1] - found[:-1, 1] > 1)
    for place in gap.nonzero().flatten().tolist()[:1]:
        (sample_of_gap, before), (_, after) = found[place : place + 2].tolist()
        raise ValueError(
            f"order: expected every number between a sample's lowest and its highest, got {before} and then {after} in "
            f"sample {sample_of_gap}"
        )
