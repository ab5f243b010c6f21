"""The bias of every pair of tokens, and what attention's reference walks: groups of samples with the bias of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from onepeace_fast.attention_structures import BiasVectors, Segments
from onepeace_fast.checks import is_on_host
from onepeace_fast.ops.segments import Group, Pairs, check_codes, check_order, check_segments, places_of, sample_pairs
from onepeace_fast.relative_position import CLS_ENTRIES, dense_index

PAIRS_KEPT = 2**20  # in all groups; a head's bias of so many takes 4 MiB


class Side(NamedTuple):
    """What leads each row into the vectors side by side; queries and keys have the same or one each."""

    code: Tensor  # int64
    is_cls: Tensor
    # With several vectors alone: the modality, the entries of equal codes and the first of CLS.
    look_up: Sequence[Tensor]

    def of(self, group: Group, alike: bool) -> list[Tensor]:
        """The values of a group's tokens, [N, L] or, where its samples are all alike, [1, L]."""
        last = slice(-1 if alike else None, None)  # the last sample is the longest
        return [group.gather(x)[last] for x in (self.code, self.is_cls, *self.look_up)]


class PairEntries(NamedTuple):
    """How pairs of rows reach all vectors side by side: one for all, or those of modalities with a zero behind them."""

    queries: Side
    keys: Side
    code_offsets: Sequence[int]
    entries: int  # of all vectors

    def of(self, pairs: Pairs, alike: bool = False) -> Tensor:
        """Entry of every pair of tokens: int64 [N, Lq, Lk], or [1, Lq, Lk] for samples all alike."""
        queries = self.queries.of(pairs.queries, alike)
        keys = queries if self.keys is self.queries else self.keys.of(pairs.keys, alike)
        if not self.queries.look_up:
            return dense_index(queries[0], queries[1], self.code_offsets[0], self.entries, (keys[0], keys[1]))
        code, is_cls, modality, entry, cls_entry = (x.unsqueeze(-1) for x in queries)
        key_code, key_is_cls, key_modality, _, key_cls_entry = (x.unsqueeze(-2) for x in keys)
        index = (code + entry) - key_code
        index = torch.where(key_is_cls, cls_entry + 1, index)
        index = torch.where(is_cls, torch.where(key_is_cls, key_cls_entry + 2, key_cls_entry), index)
        return torch.where(modality == key_modality, index, self.entries)


def pair_entries(bias: BiasVectors, segments: Segments, keys: Segments) -> PairEntries | None:
    """How one index reaches the vectors of all modalities; None without a bias."""
    if not bias.vectors:
        return None
    starts = [*accumulate((vector.shape[1] for vector in bias.vectors), initial=0)]
    equal = [start + offset for start, offset in zip(starts[:-1], bias.code_offsets, strict=True)]
    cls = [stop - CLS_ENTRIES for stop in starts[1:]]

    def side(rows: Segments) -> Side:
        look_up = [_by_modality(rows.modality, entries) for entries in (equal, cls) if len(starts) > 2]
        return Side(rows.code.long(), rows.is_cls, [rows.modality, *look_up] if look_up else [])

    queries = side(segments)
    return PairEntries(queries, queries if keys is segments else side(keys), bias.code_offsets, starts[-1])


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


def _are_alike(pairs: Pairs, segments: Segments, keys: Segments) -> bool:
    """Whether every sample, as far as it goes, has the modalities, codes and orders of the last."""
    if pairs.queries.samples == 1:
        return False
    sides = [(pairs.queries, segments)] if keys is segments else [(pairs.queries, segments), (pairs.keys, keys)]
    for group, of in sides:
        rows = [of.modality, of.code, of.is_cls] + ([] if of.order is None else [of.order])
        tokens = [group.gather(x) for x in rows]
        equal = torch.stack([x == x[-1:] for x in tokens])
        if not (equal if group.valid is None else equal | ~group.valid).all():
            return False
    return True


class Step(NamedTuple):
    """A group of samples, and for its pairs what their scores take; one sample for all where all are alike.

    Where the key is hidden the smallest number is added: minus infinity would make a query without keys 0 / 0.
    """

    pairs: Pairs
    entries: Tensor | None  # [N, Lq, Lk]
    added: Tensor | None  # [N, heads, Lq, Lk], the bias and what hides keys
    sees: Tensor | None  # bool [N, Lq], queries with a key; None: all


class Batch(NamedTuple):
    """What is walked: the segments of queries and of keys, which may be the same, and how many rows each has."""

    segments: Segments
    keys: Segments
    rows: int
    key_rows: int

    def check(self, bias: BiasVectors) -> None:
        """Raise where segments, codes or orders do not fit; only a CPU is read by the host."""
        sides = ((self.segments, self.rows), (self.keys, self.key_rows))
        for segments, rows in sides[: 1 if self.keys is self.segments else 2]:
            check_segments(segments, rows)
            check_order(segments)
        check_codes(bias, self.segments, self.keys)


def walk(bias: BiasVectors, batch: Batch, dtype: torch.dtype) -> Iterable[Step]:
    """The samples in groups, each with the bias of its pairs in ``dtype``; segments and codes of a CPU are checked.

    All layers and the backward pass walk the same batch. So on a CPU a walk is found again by its plan's tensors.
    """
    segments, keys = batch.segments, batch.keys
    if not is_on_host(segments.code):
        entries = pair_entries(bias, segments, keys)
        return _steps(_with_entries(entries, batch, sample_pairs(*_sides(batch))), batch, bias.vectors, dtype)
    return _walk_on_host(bias, batch).steps(bias.vectors, dtype)


def _walk_on_host(bias: BiasVectors, batch: Batch) -> _Walk:
    found = _WALKS.get(batch.segments.cu_seqlens)
    if found is None or not found.is_of(bias, batch):
        batch.check(bias)
        with torch.inference_mode(False):  # it is kept for what has gradients, too
            _WALKS[batch.segments.cu_seqlens] = found = _Walk(bias, batch)
    return found


class SideBySide(NamedTuple):
    """The groups of a walk one after another, for attention by plain PyTorch.

    ``rows`` int64 is the packed row of each token, padding included, ``places`` int64 where each packed row went; both
    None where these are the packed rows themselves. ``sizes`` has samples and length of each group, ``added`` what the
    scores of its pairs take, which autograd follows to the vectors.
    """

    rows: Tensor | None
    places: Tensor | None
    sizes: Sequence[tuple[int, int]]
    added: Sequence[Tensor | None]


def side_by_side(bias: BiasVectors, batch: Batch, dtype: torch.dtype) -> SideBySide | None:
    """The batch of a CPU side by side, queries and keys the same; None where its pairs are too many to keep."""
    return _walk_on_host(bias, batch).side_by_side(bias.vectors, dtype)


def _sides(batch: Batch) -> tuple[Segments, Segments | None]:
    return batch.segments, None if batch.keys is batch.segments else batch.keys


def _with_entries(
    entries: PairEntries | None, batch: Batch, groups: Iterable[Pairs]
) -> Iterator[tuple[Pairs, Tensor | None, bool]]:
    for pairs in groups:
        alike = is_on_host(batch.segments.code) and _are_alike(pairs, batch.segments, batch.keys)
        yield pairs, None if entries is None else entries.of(pairs, alike), alike


def hidden_keys(pairs: Pairs, batch: Batch, alike: bool = False) -> Tensor | None:
    """Which keys a query does not see, padding and those of a higher order: bool [N or 1, Lq or 1, Lk], None if all."""
    queries, keys = pairs
    hidden = None if keys.valid is None else ~keys.valid[:, None, :]
    if batch.segments.order is not None:
        order, key_order = queries.gather(batch.segments.order), keys.gather(batch.keys.order)
        if alike:
            order, key_order = order[-1:], key_order[-1:]
        later = key_order[:, None, :] > order[:, :, None]
        hidden = later if hidden is None else hidden | later
    return hidden


def _steps(
    groups: Iterable[tuple[Pairs, Tensor | None, bool]], batch: Batch, vectors: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[Step]:
    side_by_side = joined(vectors, dtype) if vectors else None
    for pairs, entries, alike in groups:
        added = None if side_by_side is None else pair_values(side_by_side, entries)
        sees = None
        if (hidden := hidden_keys(pairs, batch, alike)) is not None:
            if added is None:
                added = torch.zeros_like(hidden, dtype=dtype).unsqueeze(1)
            # On a CPU every token sees itself, and exp is faster for minus infinity.
            least = -torch.inf if is_on_host(hidden) and batch.keys is batch.segments else torch.finfo(dtype).min
            added = added.masked_fill(hidden.unsqueeze(1), least)
            sees = None if batch.keys is batch.segments else ~hidden.all(-1).expand(-1, pairs.queries.length)
        yield Step(pairs, entries, added, sees)


class _Walk:
    """A walk on a CPU. It keeps what few pairs take: their entries, and their bias for the vectors that came last."""

    def __init__(self, bias: BiasVectors, batch: Batch) -> None:
        # Copies: what is written into a plan is seen, and the plan's own tensors are not kept alive.
        segments = _copied(batch.segments)
        self._batch = Batch(
            segments, segments if batch.keys is batch.segments else _copied(batch.keys), batch.rows, batch.key_rows
        )
        self._layout = _layout(bias)
        self._groups = list(sample_pairs(*_sides(self._batch)))
        self._entries = pair_entries(bias, self._batch.segments, self._batch.keys)
        count = sum(pairs.queries.samples * pairs.queries.length * pairs.keys.length for pairs in self._groups)
        self._kept = list(self._with_entries()) if count <= PAIRS_KEPT else None
        # One tuple, so that threads that share a plan never see the steps of one call beside the vectors of another.
        self._last: tuple[list[Step], list[Tensor], torch.dtype] | None = None
        self._places: tuple[Tensor | None, Tensor | None] | None = None

    def is_of(self, bias: BiasVectors, batch: Batch) -> bool:
        """Whether it was made for such a batch and such vectors."""
        mine, apart = self._batch, batch.keys is not batch.segments
        same = batch[2:] == mine[2:] and _layout(bias) == self._layout and apart == (mine.keys is not mine.segments)
        return (
            same and _are_equal(batch.segments, mine.segments) and not (apart and not _are_equal(batch.keys, mine.keys))
        )

    def steps(self, vectors: Sequence[Tensor], dtype: torch.dtype) -> Iterable[Step]:
        """The groups one after another."""
        if self._kept is None:
            return _steps(self._with_entries(), self._batch, vectors, dtype)
        last = self._last
        if last is None or dtype != last[2] or not all(map(_is_equal, vectors, last[1])):
            kept = [vector.detach().clone() for vector in vectors]
            self._last = last = (list(_steps(self._kept, self._batch, kept, dtype)), kept, dtype)
        return last[0]

    def side_by_side(self, vectors: Sequence[Tensor], dtype: torch.dtype) -> SideBySide | None:
        """The groups one after another, where few pairs are in them."""
        if self._kept is None:
            return None
        added = [step.added for step in _steps(self._kept, self._batch, vectors, dtype)]
        if self._places is None:
            with torch.inference_mode(False):
                self._places = places_of([pairs.queries for pairs in self._groups], self._batch.rows)
        return SideBySide(
            *self._places, [(pairs.queries.samples, pairs.queries.length) for pairs in self._groups], added
        )

    def _with_entries(self) -> Iterator[tuple[Pairs, Tensor | None, bool]]:
        return _with_entries(self._entries, self._batch, self._groups)


def _copied(segments: Segments) -> Segments:
    return Segments._make(x.clone() if isinstance(x, Tensor) else x for x in segments)


def _are_equal(one: Segments, other: Segments) -> bool:
    if (one.order is None) != (other.order is None):
        return False
    pairs: Iterable[tuple[Any, Any]] = zip(one, other, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _layout(bias: BiasVectors) -> tuple[Sequence[int], list[torch.Size]]:
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
