"""Several passes of one step as one packed batch: what goes in is joined, what comes out is taken apart.

A pass is a set of sequences, such as all texts alone, or all pairs with the tokens that a mask leaves visible. Each
sample of each pass becomes a sample of the joint batch, so that a step costs one call of the stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.route_plan import RoutePlan

Samples = Mapping[str, Sequence[int]]


class PaddedTokens(NamedTuple):
    """One modality's tokens in one pass, padded, CLS first, and what is known of them.

    ``x`` [rows, length, dim] holds their embeddings. ``valid`` bool [rows, length] marks real tokens, ``lengths``
    counts them in each row; ``ids`` int64 [rows, length] are position ids where they are a kept subset, else None;
    ``width`` is the number of positions before any was hidden.
    """

    x: Tensor
    valid: Tensor
    lengths: list[int]
    ids: Tensor | None
    width: int


Part = Mapping[str, PaddedTokens]


class PackedRows(NamedTuple):
    """One modality's packed rows in one pass.

    ``x`` [n, dim]; ``row`` and ``position`` int64 [n], the padded row and the position id of each; ``place`` int64 [n],
    its flat index in [rows, length] of ``shape``; ``cls`` int64 [samples], the entry of each sample's CLS.
    """

    x: Tensor
    row: Tensor
    position: Tensor
    place: Tensor
    cls: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """What a stack makes of one pass: padded {modality: [rows, length, dim]}, or packed rows."""

    padded: dict[str, Tensor] | None = None
    packed: dict[str, PackedRows] | None = None

    def through(self, modules: Mapping[str, nn.Module]) -> Encoded:
        """What each modality's module makes of its rows."""
        if self.padded is not None:
            return Encoded(padded={name: modules[name](x) for name, x in self.padded.items()})
        return Encoded(packed={name: rows._replace(x=modules[name](rows.x)) for name, rows in self.packed.items()})

    def visible(self, name: str, seen: PaddedTokens) -> tuple[Tensor, Tensor]:
        """The real rows [n, dim] of a modality, and the place of each among all positions: int64 [n]."""
        if self.packed is not None:
            rows = self.packed[name]
            return rows.x, rows.row * seen.width + rows.position
        real = seen.valid.flatten().nonzero().squeeze(1)
        starts = torch.arange(seen.valid.shape[0], device=real.device)[:, None] * seen.width
        return self.padded[name].flatten(0, 1)[real], (seen.ids + starts).flatten()[real]

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

    def tensors(self) -> list[Tensor]:
        """Every modality's output as it is, padded or packed."""
        return list(self.padded.values()) if self.packed is None else [rows.x for rows in self.packed.values()]

    def cls(self) -> tuple[str, Tensor]:
        """The only modality and its CLS rows, [rows, dim]."""
        if self.padded is not None:
            ((name, x),) = self.padded.items()
            return name, x[:, 0]
        ((name, rows),) = self.packed.items()
        return name, rows.x[rows.cls]


def sample_count(part: Part, samples: Samples | None) -> int:
    """Samples that a pass has."""
    if samples is None:
        return len(next(iter(part.values())).lengths)
    return len(set().union(*(samples[name] for name in part)))


def join(parts: Sequence[Part], samples: Samples | None, order: Sequence[str]) -> tuple[Part, Samples | None]:
    """One padded batch of all passes, modalities in ``order``, and the sample of each of its rows."""
    if len(parts) == 1:
        return parts[0], samples
    names = [name for name in order if any(name in part for part in parts)]
    joined = {name: _join([part[name] for part in parts if name in part]) for name in names}
    sample_of: dict[str, list[int]] = {name: [] for name in names}
    base = 0
    for part in parts:
        for name, tokens in part.items():
            own = range(len(tokens.lengths)) if samples is None else samples[name]
            sample_of[name] += [base + sample for sample in own]
        base += sample_count(part, samples)
    return joined, sample_of


def _join(parts: Sequence[PaddedTokens]) -> PaddedTokens:
    length = max(part.valid.shape[1] for part in parts)

    def rows(tensors: Sequence[Tensor], trailing: int = 0) -> Tensor:
        padding = [0, 0] * trailing
        return torch.cat([F.pad(tensor, [*padding, 0, length - tensor.shape[1]]) for tensor in tensors])

    ids = None
    if any(part.ids is not None for part in parts):
        ids = rows([_position_ids(part) for part in parts])
    x = rows([part.x for part in parts], trailing=1)
    lengths = [count for part in parts for count in part.lengths]
    return PaddedTokens(x, rows([part.valid for part in parts]), lengths, ids, parts[0].width)


def _position_ids(part: PaddedTokens) -> Tensor:
    if part.ids is not None:
        return part.ids
    return torch.arange(part.valid.shape[1], device=part.valid.device).expand(part.valid.shape)


def split(packed: Tensor, plan: RoutePlan, parts: Sequence[Part], samples: Samples | None) -> list[Encoded]:
    """Take the packed rows [C, dim] of joined passes apart; the inverse of ``join``."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + sample_count(part, samples))
    results: list[dict[str, PackedRows]] = [{} for _ in parts]
    pieces = [
        (group, name, i) for group, name in enumerate(plan.modalities) for i in range(len(parts)) if name in parts[i]
    ]
    counts = [sum(parts[i][name].lengths) for _, name, i in pieces]
    own = (packed.split(counts), plan.source.split(counts), plan.position.split(counts))
    first_row = first_place = 0
    for (group, name, i), x, source, position in zip(pieces, *own, strict=True):
        rows, length = parts[i][name].valid.shape
        joint_length = plan.padded_shapes[group][1]
        row = (source - first_place).div(joint_length, rounding_mode="floor")
        results[i][name] = PackedRows(
            x=x,
            row=row,
            position=position.long(),
            place=source - first_place + row * (length - joint_length),
            cls=plan.cu_seqlens[group, starts[i] + 1 : starts[i + 1] + 1].long() - 1 - first_row,
            shape=(rows, length),
        )
        first_row, first_place = first_row + x.shape[0], first_place + rows * joint_length
    return [Encoded(packed=result) for result in results]
