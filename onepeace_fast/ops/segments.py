"""What attention's reference walks: packed samples in groups, and the bias entry of every pair of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from onepeace_fast.checks import require, require_values
from onepeace_fast.relative_position import CLS_ENTRIES
from onepeace_fast.structures import RelativeBias, Segments

PAIRS_OF_A_GROUP = 2**13
PAIRS_OF_A_DEVICE_GROUP = 2**22
PAIRS_OF_DEVICE_HEADS = 2**24


class Group(NamedTuple):
    """N samples side by side: the rows of their tokens, int64 [N, L], or one slice of rows where N is 1.

    ``valid`` bool [N, L] marks real tokens, None where all are; padding is written to a spare row.
    """

    rows: Tensor | slice
    valid: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        """[rows, ...] to [N, L, ...]; padding repeats row 0."""
        return x[self.rows].unsqueeze(0) if isinstance(self.rows, slice) else x[self.rows]

    def read(self, x: Tensor) -> Tensor:
        """[rows, ...] to [N, L, ...]; padding is zero, so that a NaN in row 0 stays in its own sample."""
        tokens = self.gather(x)
        if self.valid is None:
            return tokens
        return tokens.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (x.dim() - 1)), 0)

    def scatter(self, x: Tensor, value: Tensor) -> None:
        """Store [N, L, ...] at its rows of x, whose last row is spare."""
        if isinstance(self.rows, slice):
            x[self.rows] = value[0]
        else:
            rows = self.rows if self.valid is None else torch.where(self.valid, self.rows, x.shape[0] - 1)
            x[rows] = value.to(x.dtype)


def sample_groups(segments: Segments) -> Iterator[Group]:
    """Samples to compute at once, few enough for linear memory: on a CPU by length, elsewhere at ``max_length``.

    With ``max_length`` nothing is read from a device.
    """
    cu_seqlens = segments.cu_seqlens
    if cu_seqlens.shape[1] == 1:
        return
    starts, lengths = cu_seqlens[:, :-1].long(), cu_seqlens.diff(dim=1).long()
    if cu_seqlens.device.type != "cpu":
        longest = longest_sample(segments)
        step = _samples_at_once(longest)
        for first in range(0, cu_seqlens.shape[1] - 1, step):
            some = slice(first, first + step)
            yield Group(*_padded_rows(starts[:, some], lengths[:, some], longest))
        return
    host_starts, host_lengths, host_totals = starts.t().tolist(), lengths.t().tolist(), lengths.sum(0).tolist()
    for samples in _by_length(host_totals):
        first, longest = samples[0], host_totals[samples[-1]]
        parts = [(start, start + n) for start, n in zip(host_starts[first], host_lengths[first], strict=True) if n]
        if len(samples) == 1 and len(parts) == 1:
            yield Group(slice(*parts[0]), None)
        else:
            rows, valid = _padded_rows(starts[:, samples], lengths[:, samples], longest)
            yield Group(rows, None if host_totals[first] == longest else valid)


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


def _samples_at_once(longest: int) -> int:
    return max(1, PAIRS_OF_A_DEVICE_GROUP // max(longest, 1) ** 2)


def head_slices(heads: int, samples: int, longest: int) -> Iterator[slice]:
    """Heads to compute at once on a device, few enough for linear memory: at least one, all where samples are short."""
    pairs = min(samples, _samples_at_once(longest)) * longest**2
    step = max(1, PAIRS_OF_DEVICE_HEADS // max(pairs, 1))
    return (slice(first, min(first + step, heads)) for first in range(0, heads, step))


def _by_length(totals: Sequence[int]) -> Iterator[list[int]]:
    """Samples in groups of similar length; a group has so few pairs that padding costs less than a step of Python."""
    group: list[int] = []
    for sample in sorted((s for s, total in enumerate(totals) if total), key=totals.__getitem__):
        if group and (len(group) + 1) * totals[sample] ** 2 > PAIRS_OF_A_GROUP:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _padded_rows(starts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Rows of each sample's tokens, its modalities one after another, and which are real: [samples, longest] each."""
    place = torch.arange(longest, device=starts.device)
    before = lengths.cumsum(0) - lengths
    rows = torch.zeros(lengths.shape[1], longest, dtype=torch.int64, device=starts.device)
    for start, length, first in zip(starts, lengths, before, strict=True):
        within = place - first[:, None]
        rows = torch.where((within >= 0) & (within < length[:, None]), start[:, None] + within, rows)
    return rows, place < lengths.sum(0)[:, None]


class PairBias(NamedTuple):
    """All modalities' vectors side by side, [heads, entries], a zero last, and each row's way into them, [rows]."""

    vectors: Tensor
    starts: list[int]
    modality: Tensor
    is_cls: Tensor
    code: Tensor
    equal_code_entry: Tensor
    cls_entry: Tensor

    def index(self, group: Group) -> Tensor:  # type: ignore[override]  # of a tuple, which nobody asks
        """Entry of every pair of tokens, queries before keys: int64 [N, L, L]."""
        code, is_cls, modality = (group.gather(x) for x in (self.code, self.is_cls, self.modality))
        entry, cls_entry = group.gather(self.equal_code_entry), group.gather(self.cls_entry)
        index = (code + entry).unsqueeze(-1) - code.unsqueeze(-2)
        as_query = torch.where(is_cls, cls_entry + 2, cls_entry)
        index = torch.where(is_cls.unsqueeze(-2), (cls_entry + 1).unsqueeze(-1), index)
        index = torch.where(is_cls.unsqueeze(-1), as_query.unsqueeze(-2), index)
        if len(self.starts) > 2:
            index = torch.where(modality.unsqueeze(-1) == modality.unsqueeze(-2), index, self.starts[-1])
        return index

    def values(self, index: Tensor) -> Tensor:
        """The bias of every pair: [N, heads, L, L]."""
        heads = self.vectors.shape[0]
        return self.vectors.index_select(1, index.flatten()).view(heads, *index.shape).movedim(0, 1)


def pair_bias(bias: RelativeBias, segments: Segments, dtype: torch.dtype) -> PairBias | None:
    """Join the vectors of all modalities so that one index reaches any of them; None without a bias."""
    vectors = bias.vectors
    if not vectors:
        return None
    starts = [*accumulate((vector.shape[1] for vector in vectors), initial=0)]
    zero = vectors[0].new_zeros(vectors[0].shape[0], 1)
    equal = [start + offset for start, offset in zip(starts[:-1], bias.code_offsets, strict=True)]
    cls = [stop - CLS_ENTRIES for stop in starts[1:]]
    look_up = [_by_modality(segments.modality, entries) for entries in (equal, cls)]
    return PairBias(
        torch.cat([*vectors, zero], dim=1).to(dtype), starts, segments.modality, segments.is_cls, segments.code.long(),
        *look_up,
    )  # fmt: skip


def _by_modality(modality: Tensor, values: Sequence[int]) -> Tensor:
    """The value of each row's modality, int64 [rows]; inert rows get 0. No table is copied to the device."""
    result = torch.zeros_like(modality, dtype=torch.int64)
    for m, value in enumerate(values):
        result = torch.where(modality == m, value, result)
    return result


def check_segments(cu_seqlens: Tensor, rows: int) -> None:
    """Raise where segments end past the rows or before they begin; only a CPU is read by the host."""
    if not cu_seqlens.numel():
        return
    inside = (cu_seqlens[-1, -1] <= rows) & (cu_seqlens.diff(dim=1) >= 0).all() & (cu_seqlens[0, 0] >= 0)
    require_values(
        inside, f"cu_seqlens: expected growing bounds from 0 to at most {rows}, got segments outside the rows"
    )


def check_codes(bias: RelativeBias, segments: Segments) -> None:
    """Raise where two codes of a modality differ by more than its vector covers; only a CPU is read by the host."""
    code = segments.code
    for m, (vector, offset) in enumerate(zip(*bias, strict=True)):
        covered = min(offset, vector.shape[1] - CLS_ENTRIES - 1 - offset)
        counted = (segments.modality == m) & ~segments.is_cls
        # Without a row counted this is negative.
        largest = torch.where(counted, code.long(), -(2**31)).amax() if code.numel() else code.new_zeros(())
        smallest = torch.where(counted, code.long(), 2**31).amin() if code.numel() else largest
        span = largest - smallest
        found = int(span) if span.device.type == "cpu" else "more"
        require_values(
            span <= covered,
            f"code: expected codes of modality {m} to differ by at most {covered}, what bias[{m}] covers, got {found}",
        )


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum [heads, pairs] into [heads, size] by the pairs' index, in the same order every time on every device."""
    if values.device.type == "cpu":
        return values.new_zeros(values.shape[0], size).scatter_add_(1, index.expand_as(values), values)
    # On a GPU scatter_add is atomic; an accumulating index_put sorts first.
    return values.new_zeros(size, values.shape[0]).index_put_((index,), values.t(), accumulate=True).t()
