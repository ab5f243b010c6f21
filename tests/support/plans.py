"""Ragged batches, and the layout of their packed rows built token by token in plain Python."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    """A real token: modality, sample, position id and code, and its row and column in the padded input."""

    modality: int
    sample: int
    position: int
    code: int
    row: int
    column: int
    order: int

    @property
    def is_cls(self) -> bool:
        return self.column == 0


@dataclass(frozen=True)
class Layout:
    """Tokens in packed order, and the tensors that the ops take, all derived from the list of tokens."""

    tokens: tuple[Token, ...]
    modalities: int
    samples: int
    capacity: int

    def column(self, name: str, inert: int = 0) -> Tensor:
        """An attribute of every row, ``inert`` past the last token: int32 [capacity]."""
        values = [int(getattr(token, name)) for token in self.tokens]
        return torch.tensor(values + [inert] * (self.capacity - len(values)), dtype=torch.int32)

    @property
    def row_counts(self) -> list[int]:
        return [sum(token.modality == m for token in self.tokens) for m in range(self.modalities)]

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([sum(self.row_counts[:m]) for m in range(self.modalities + 1)], dtype=torch.int32)

    @property
    def cu_seqlens(self) -> Tensor:
        def first(m: int, s: int) -> int:
            return sum((token.modality, token.sample) < (m, s) for token in self.tokens)

        table = [[first(m, s) for s in range(self.samples)] + [first(m + 1, 0)] for m in range(self.modalities)]
        return torch.tensor(table, dtype=torch.int32).view(self.modalities, self.samples + 1)

    @property
    def max_length(self) -> int:
        return max((len(self.rows_of(sample)) for sample in range(self.samples)), default=0)

    def rows_of(self, sample: int, modality: int | None = None) -> list[int]:
        """Packed rows of a sample, or of its segment of one modality."""
        return [
            i for i, t in enumerate(self.tokens) if t.sample == sample and modality in (None, t.modality)
        ]  # fmt: skip

    @property
    def modality_slices(self) -> list[slice]:
        bounds = self.offsets.tolist()
        return [slice(a, b) for a, b in pairwise(bounds)]

    def attention_arguments(self) -> dict[str, object]:
        """What ``relative_bias_attention`` takes of a plan."""
        return {
            "cu_seqlens": self.cu_seqlens,
            "modality": self.column("modality", self.modalities),
            "code": self.column("code"),
            "is_cls": self.column("is_cls").bool(),
            "max_length": self.max_length,
        }


def naive_layout(
    kept: Mapping[str, Sequence[Sequence[int]]],
    samples: Mapping[str, Sequence[int]] | None = None,
    positions: Mapping[str, Sequence[Sequence[int]]] | None = None,
    codes: Mapping[str, Sequence[int]] | None = None,
    capacity: int | None = None,
) -> Layout:
    """Lay tokens out one after another: modality, sample, then the columns kept in a row, CLS (column 0) last."""
    samples = samples or {name: list(range(len(rows))) for name, rows in kept.items()}
    count = len({sample for values in samples.values() for sample in values})
    tokens, seen = [], [0] * count
    for m, (name, rows) in enumerate(kept.items()):
        for sample in range(count):
            for row, columns in enumerate(rows):
                if samples[name][row] != sample:
                    continue
                for column in [c for c in columns if c] + [c for c in columns if not c]:
                    position = positions[name][row][column] if positions and name in positions else column
                    code = codes[name][position] if codes and name in codes else position
                    tokens.append(Token(m, sample, position, code, row, column, seen[sample]))
                    seen[sample] += 1
    return Layout(tuple(tokens), len(kept), count, len(tokens) if capacity is None else capacity)


def whole_rows(lengths: Mapping[str, Sequence[int]]) -> dict[str, list[list[int]]]:
    """Every column up to each row's length."""
    return {name: [list(range(length)) for length in values] for name, values in lengths.items()}


def kept_positions(rows: Sequence[int], limit: int, seed: int) -> list[list[int]]:
    """Random position ids in [1, limit], growing, for rows of these lengths; CLS at 0 comes first."""
    generator = random.Random(seed)
    return [[0, *sorted(generator.sample(range(1, limit + 1), length - 1))] for length in rows]


def ragged_offsets(counts: Sequence[int]) -> Tensor:
    """int32 offsets of groups of rows."""
    return torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)
