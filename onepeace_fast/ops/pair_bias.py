"""The bias of every pair of tokens, and what attention's reference walks: groups of samples with the bias of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from onepeace_fast.ops.segments import Group, check_codes, check_segments, is_on_host, sample_groups
from onepeace_fast.relative_position import CLS_ENTRIES, dense_index
from onepeace_fast.structures import RelativeBias, Segments

PAIRS_KEPT = 2**20  # in all groups; a head's bias of so many takes 4 MiB


class PairEntries(NamedTuple):
    """Each row's way into all modalities' vectors side by side, with a zero last: [rows], and where they start."""

    starts: list[int]
    code_offsets: Sequence[int]
    modality: Tensor
    is_cls: Tensor
    code: Tensor
    look_up: Sequence[Tensor]  # the entries of equal codes and the first of CLS; none for a single modality

    def of(self, group: Group, alike: bool = False) -> Tensor:
        """Entry of every pair of tokens, queries before keys: int64 [N, L, L], or [1, L, L] for samples all alike."""
        last = slice(-1 if alike else None, None)  # the last sample is the longest
        code, is_cls = (group.gather(x)[last] for x in (self.code, self.is_cls))
        if not self.look_up:
            return dense_index(code, is_cls, self.code_offsets[0], self.starts[1])
        modality, entry, cls_entry = (group.gather(x)[last] for x in (self.modality, *self.look_up))
        index = (code + entry).unsqueeze(-1) - code.unsqueeze(-2)
        as_query = torch.where(is_cls, cls_entry + 2, cls_entry)
        index = torch.where(is_cls.unsqueeze(-2), (cls_entry + 1).unsqueeze(-1), index)
        index = torch.where(is_cls.unsqueeze(-1), as_query.unsqueeze(-2), index)
        return torch.where(modality.unsqueeze(-1) == modality.unsqueeze(-2), index, self.starts[-1])


def pair_entries(bias: RelativeBias, segments: Segments) -> PairEntries | None:
    """How one index reaches the vectors of all modalities; None without a bias."""
    if not bias.vectors:
        return None
    starts = [*accumulate((vector.shape[1] for vector in bias.vectors), initial=0)]
    look_up: list[Tensor] = []
    if len(bias.vectors) > 1:
        equal = [start + offset for start, offset in zip(starts[:-1], bias.code_offsets, strict=True)]
        cls = [stop - CLS_ENTRIES for stop in starts[1:]]
        look_up = [_by_modality(segments.modality, entries) for entries in (equal, cls)]
    modality, code, is_cls = segments.modality, segments.code.long(), segments.is_cls
    return PairEntries(starts, bias.code_offsets, modality, is_cls, code, look_up)


def joined(vectors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All modalities' vectors side by side and a zero, for pairs of two modalities, [heads, entries]."""
    if len(vectors) == 1:
        return vectors[0].to(dtype)
    return torch.cat([*vectors, vectors[0].new_zeros(vectors[0].shape[0], 1)], dim=1).to(dtype)


def pair_values(vectors: Tensor, index: Tensor) -> Tensor:
    """The bias of every pair: [N, heads, L, L]."""
    return vectors.index_select(1, index.flatten()).view(vectors.shape[0], *index.shape).movedim(0, 1)


def _by_modality(modality: Tensor, values: Sequence[int]) -> Tensor:
    """The value of each row's modality, int64 [rows]; inert rows get 0. No table is copied to the device."""
    result = torch.zeros_like(modality, dtype=torch.int64)
    for m, value in enumerate(values):
        result = torch.where(modality == m, value, result)
    return result


def _are_alike(group: Group, segments: Segments) -> bool:
    """Whether every sample, as far as it goes, has the modalities and codes of the last."""
    if group.samples == 1:
        return False
    tokens = (group.gather(x) for x in (segments.modality, segments.code, segments.is_cls))
    equal = torch.stack([x == x[-1:] for x in tokens])
    return bool((equal if group.valid is None else equal | ~group.valid).all())


class Step(NamedTuple):
    """A group of samples, the entries of its pairs [N, L, L], and what is added to its scores [N, heads, L, L].

    Both have one sample for all where all are alike. Where the key is padding, that is the smallest number: minus
    infinity would make a sample without tokens 0 / 0.
    """

    group: Group
    entries: Tensor | None
    bias: Tensor | None


def walk(bias: RelativeBias, segments: Segments, rows: int, dtype: torch.dtype) -> Iterable[Step]:
    """The samples in groups, each with the bias of its pairs in ``dtype``; segments and codes of a CPU are checked.

    All layers and the backward pass walk the same batch. So on a CPU a walk is found again by its plan's tensors.
    """
    if not is_on_host(segments.code):
        entries = pair_entries(bias, segments)
        groups = ((group, None if entries is None else entries.of(group)) for group in sample_groups(segments))
        return _steps(groups, bias.vectors, dtype)
    found = _WALKS.get(segments.cu_seqlens)
    if found is None or not found.is_of(bias, segments, rows):
        check_segments(segments.cu_seqlens, rows)
        check_codes(bias, segments)
        _WALKS[segments.cu_seqlens] = found = _Walk(bias, segments, rows)
    return found.steps(bias.vectors, dtype)


def _steps(
    groups: Iterable[tuple[Group, Tensor | None]], vectors: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[Step]:
    side_by_side = joined(vectors, dtype) if vectors else None
    for group, entries in groups:
        added = None if side_by_side is None else pair_values(side_by_side, entries)
        if group.valid is not None:
            padding = ~group.valid[:, None, None, :]
            if added is None:
                added = padding.new_zeros(padding.shape, dtype=dtype)
            # On a CPU every sample of a group has a token, and exp is faster for minus infinity.
            added = added.masked_fill(padding, -torch.inf if is_on_host(padding) else torch.finfo(dtype).min)
        yield Step(group, entries, added)


class _Walk:
    """A walk on a CPU. It keeps what few pairs take: their entries, and their bias for the vectors that came last."""

    def __init__(self, bias: RelativeBias, segments: Segments, rows: int) -> None:
        # Copies: what is written into a plan is seen, and the plan's own tensors are not kept alive.
        cu_seqlens, modality, code, is_cls = (x.clone() for x in segments[:4])
        self._segments = Segments(cu_seqlens, modality, code, is_cls, segments.max_length)
        self._rows, self._layout = rows, _layout(bias)
        self._groups = list(sample_groups(self._segments))
        self._entries = pair_entries(bias, self._segments)
        pairs = sum(group.samples * group.length**2 for group in self._groups)
        self._kept = list(self._with_entries()) if pairs <= PAIRS_KEPT else None
        self._steps: list[Step] | None = None
        self._vectors: list[Tensor] = []
        self._dtype: torch.dtype | None = None

    def is_of(self, bias: RelativeBias, segments: Segments, rows: int) -> bool:
        """Whether it was made for such a batch and such vectors."""
        same = rows == self._rows and _layout(bias) == self._layout
        return same and all(map(torch.equal, segments[:4], self._segments[:4]))

    def steps(self, vectors: Sequence[Tensor], dtype: torch.dtype) -> Iterable[Step]:
        """The groups one after another."""
        if self._kept is None:
            return _steps(self._with_entries(), vectors, dtype)
        if self._steps is None or dtype != self._dtype or not all(map(_is_equal, vectors, self._vectors)):
            self._steps = list(_steps(self._kept, vectors, dtype))
            self._vectors, self._dtype = [vector.detach().clone() for vector in vectors], dtype
        return self._steps

    def _with_entries(self) -> Iterator[tuple[Group, Tensor | None]]:
        for group in self._groups:
            entries = self._entries
            yield group, None if entries is None else entries.of(group, _are_alike(group, self._segments))


def _layout(bias: RelativeBias) -> tuple[Sequence[int], list[torch.Size]]:
    return bias.code_offsets, [vector.shape for vector in bias.vectors]


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


_WALKS = WeakIdKeyDictionary()


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum [heads, pairs] into [heads, size] by the pairs' index, in the same order every time on every device."""
    if is_on_host(values):
        return values.new_zeros(values.shape[0], size).scatter_add_(1, index.expand_as(values), values)
    # On a GPU scatter_add is atomic; an accumulating index_put sorts first.
    return values.new_zeros(size, values.shape[0]).index_put_((index,), values.t(), accumulate=True).t()
