"""Several passes of one step as one packed batch: what goes in is joined, what comes out is taken apart.

A pass is a set of sequences, such as all texts alone, or all pairs with the tokens that a mask leaves visible. Each
sample of each pass becomes a sample of the joint batch, so that a step costs one call of the stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.route_plan import RoutePlan

Samples = Mapping[str, Sequence[int]]


class PaddedTokens(NamedTuple):
    """One modality's tokens in one pass, padded, CLS first, and what is known of them.

    ``x`` [rows, length, dim] holds their embeddings. ``valid`` bool [rows, length] marks real tokens, ``lengths``
    counts them in each row; ``ids`` int64 [rows, length] are position ids where only some are visible or the input says
    them, else None; ``width`` is the number of positions, before any was hidden.
    """

    x: Tensor
    valid: Tensor
    lengths: list[int]
    ids: Tensor | None
    width: int


Tokens = Mapping[str, PaddedTokens]


class PackedRows(NamedTuple):
    """One modality's packed rows in one pass; a step reads few of the properties, so each is made when it is asked for.

    ``x`` [n, dim]; ``source`` int64 [n], each row's flat index in padded rows of ``joint_length``; ``ids`` int32 [n],
    position ids; ``ends`` int32 [samples], the row behind each sample's last; ``shape``, [rows, length] of the pass.
    """

    x: Tensor
    source: Tensor
    joint_length: int
    ids: Tensor
    ends: Tensor
    shape: tuple[int, int]

    @property
    def row(self) -> Tensor:
        """The padded row of each: int64 [n]."""
        return self.source.div(self.joint_length, rounding_mode="floor")

    @property
    def position(self) -> Tensor:
        """The position id of each: int64 [n]."""
        return self.ids.long()

    @property
    def place(self) -> Tensor:
        """The flat index of each in [rows, length] of ``shape``: int64 [n]."""
        shorter = self.joint_length - self.shape[1]
        return self.source - self.row * shorter if shorter else self.source

    @property
    def cls(self) -> Tensor:
        """The entry of each sample's CLS: int64 [samples]."""
        return self.ends.long() - 1


@dataclass(frozen=True)
class Encoded:
    """What a stack makes of one pass: padded {modality: [rows, length, dim]}, or packed rows."""

    padded: dict[str, Tensor] | None = None
    packed: dict[str, PackedRows] = field(default_factory=dict)

    def through(self, modules: Mapping[str, nn.Module]) -> Encoded:
        """What each modality's module makes of its rows."""
        if self.padded is not None:
            return Encoded(padded={name: modules[name](x) for name, x in self.padded.items()})
        return Encoded(packed={name: rows._replace(x=modules[name](rows.x)) for name, rows in self.packed.items()})

    def rows_of(self, name: str, tokens: PaddedTokens) -> tuple[Tensor, Tensor]:
        """The real rows [n, dim] of a modality, and the place of each in [rows, width]: int64 [n]."""
        if self.padded is None:
            rows = self.packed[name]
            return rows.x, rows.row * tokens.width + rows.position
        assert tokens.ids is not None  # some are visible
        real = tokens.valid.flatten().nonzero().squeeze(1)
        starts = torch.arange(tokens.valid.shape[0], device=real.device)[:, None] * tokens.width
        return self.padded[name].flatten(0, 1)[real], (tokens.ids + starts).flatten()[real]

    def unpacked(self) -> dict[str, Tensor]:
        """{modality: [rows, length, dim]}, CLS first; packed padding comes out as zero."""
        if self.padded is not None:
            return self.padded
        result = {}
        for name, rows in self.packed.items():
            count, length = rows.shape
            target = rows.x.new_zeros(count * length, rows.x.shape[1])
            result[name] = target.index_copy(0, rows.place, rows.x).view(count, length, rows.x.shape[1])
        return result

    def without_padding(self, tokens: Tokens) -> Encoded:
        """The same padded results with zeros at padding, as packed rows unpacked have them."""
        assert self.padded is not None  # packed rows have no padding
        result = dict(self.padded)
        for name, one in tokens.items():
            if sum(one.lengths) < one.valid.numel():
                result[name] = result[name].masked_fill(~one.valid[..., None], 0)
        return Encoded(padded=result)

    def tensors(self) -> list[Tensor]:
        """Every modality's output as it is, padded or packed."""
        return [rows.x for rows in self.packed.values()] if self.padded is None else list(self.padded.values())

    def cls(self) -> tuple[str, Tensor]:
        """The only modality and its CLS rows, [rows, dim]."""
        if self.padded is not None:
            ((name, x),) = self.padded.items()
            return name, x[:, 0]
        ((name, rows),) = self.packed.items()
        return name, rows.x[rows.cls]


def sample_count(tokens: Tokens, samples: Samples | None) -> int:
    """How many samples a pass has."""
    if samples is None:
        return len(next(iter(tokens.values())).lengths)
    return len(set().union(*(samples[name] for name in tokens)))


def join(passes: Sequence[Tokens], samples: Samples | None, order: Sequence[str]) -> tuple[Tokens, Samples]:
    """One padded batch of all passes, modalities in ``order``, and the sample of each of its rows."""
    names = [name for name in order if any(name in tokens for tokens in passes)]
    joined = {name: _join([tokens[name] for tokens in passes if name in tokens]) for name in names}
    joined_samples: dict[str, list[int]] = {name: [] for name in names}
    base = 0
    for tokens in passes:
        for name, padded in tokens.items():
            own = range(len(padded.lengths)) if samples is None else samples[name]
            joined_samples[name] += [base + sample for sample in own]
        base += sample_count(tokens, samples)
    return joined, joined_samples


def _join(each: Sequence[PaddedTokens]) -> PaddedTokens:
    length = max(padded.valid.shape[1] for padded in each)

    def rows(tensors: Sequence[Tensor], trailing: int = 0) -> Tensor:
        padding = [0, 0] * trailing
        return torch.cat([F.pad(tensor, [*padding, 0, length - tensor.shape[1]]) for tensor in tensors])

    ids = None
    if any(padded.ids is not None for padded in each):
        places = torch.arange(length, device=each[0].valid.device)
        ids = rows([places[: p.valid.shape[1]].expand(p.valid.shape) if p.ids is None else p.ids for p in each])
    x = rows([padded.x for padded in each], trailing=1)
    lengths = [count for padded in each for count in padded.lengths]
    return PaddedTokens(x, rows([padded.valid for padded in each]), lengths, ids, max(padded.width for padded in each))


def split(packed: Tensor, plan: RoutePlan, passes: Sequence[Tokens], samples: Samples | None) -> list[Encoded]:
    """Take the packed rows [C, dim] of joined passes apart; the inverse of ``join``."""
    starts = [*accumulate((sample_count(tokens, samples) for tokens in passes), initial=0)]
    results: list[dict[str, PackedRows]] = [{} for _ in passes]
    pieces = [
        (index, name, i)
        for index, name in enumerate(plan.modalities)
        for i, tokens in enumerate(passes)
        if name in tokens
    ]
    counts = [sum(passes[i][name].lengths) for _, name, i in pieces]
    first_row = first_place = 0
    for (index, name, i), x in zip(pieces, packed.split(counts), strict=True):
        (count, length), joint_length = passes[i][name].valid.shape, plan.padded_shapes[index][1]
        rows = slice(first_row, first_row + x.shape[0])
        ends = plan.cu_seqlens[index, starts[i] + 1 : starts[i + 1] + 1]
        results[i][name] = PackedRows(
            x=x,
            source=plan.source[rows] - first_place if first_place else plan.source[rows],
            joint_length=joint_length,
            ids=plan.position[rows],
            ends=ends - first_row if first_row else ends,
            shape=(count, length),
        )
        first_row, first_place = rows.stop, first_place + count * joint_length
    return [Encoded(packed=result) for result in results]
