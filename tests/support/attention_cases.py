"""Batches for attention: a layout, the bias tables' rows by the textbook formula, and the same in code form."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from onepeace_fast import relative_bias_attention
from onepeace_fast.relative_position import (
    grid_code_offset,
    grid_codes,
    grid_table_rows,
    series_index,
    series_table_rows,
    series_vector_index,
)
from support import naive
from support.contract import normal
from support.plans import Layout, Token, kept_positions, naive_layout, whole_rows


@dataclass(frozen=True)
class Table:
    """The bias table of one modality: rows of it for a pair of tokens, and the entries of its vector in code form."""

    rows: int
    row: Callable[[Token, Token], int]
    entries: Tensor
    offset: int


def series(buckets: int, width: int) -> Table:
    """A 1-D table for positions below ``width``."""
    entries = series_vector_index(series_index(buckets), buckets, width)
    return Table(series_table_rows(buckets), naive.series_row(buckets), entries, width - 1)


def grid(table_grid: int, side: int) -> Table:
    """The table of a square grid, used by an image of ``side`` x ``side`` patches."""
    rows = grid_table_rows(table_grid)
    return Table(rows, naive.grid_row(table_grid, side), torch.arange(rows), grid_code_offset(table_grid))


@dataclass(frozen=True)
class Batch:
    """A layout and its tables; ``call`` runs the op on tables, ``plain`` the naive attention."""

    layout: Layout
    tables: tuple[Table, ...]
    scale: float | None = None

    @cached_property
    def arguments(self) -> dict[str, object]:
        return self.layout.attention_arguments()

    def leaves(
        self, heads: int = 2, dim: int = 4, bias: bool = True, head_scale: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Inputs of unlike sizes: scores spread enough that a softmax is far from uniform."""
        leaves = {"qkv": 1.5 * normal(self.layout.capacity, 3, heads, dim, seed=1)}
        if bias:
            for m, table in enumerate(self.tables):
                leaves[f"table{m}"] = normal(table.rows, heads, seed=10 + m)
        leaves |= {"head_scale": 1 + 0.5 * normal(heads, seed=2)} if head_scale else {}
        return {name: leaf.to(dtype) for name, leaf in leaves.items()}

    def given(self, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the op and the kernels take beside qkv, with vectors expanded from the tables."""
        bias = [leaves[f"table{m}"][table.entries].t() for m, table in enumerate(self.tables) if "table0" in leaves]
        return {
            "bias": bias, "code_offsets": [table.offset for table in self.tables] if bias else [],
            "head_scale": leaves.get("head_scale"), "scale": self.scale, **self.arguments,
        }  # fmt: skip

    def call(self, qkv: Tensor, **leaves: Tensor) -> Tensor:
        """The op on vectors expanded from the tables."""
        return relative_bias_attention(qkv, **self.given(leaves))

    def plain(self, qkv: Tensor, head_scale: Tensor | None = None, **tables: Tensor) -> Tensor:
        """The naive attention on dense biases."""
        return naive.attention(qkv, self.layout, *self._dense(tables), head_scale, self.scale)

    def log_sum_exp(self, qkv: Tensor, head_scale: Tensor | None = None, **tables: Tensor) -> Tensor:
        """log(sum(exp(score))) of every query and head, by PyTorch."""
        total = torch.zeros_like(qkv[:, 0, :, 0])
        for rows, head, score in naive.scores(qkv, self.layout, *self._dense(tables), self.scale):
            total[rows, head] = torch.logsumexp(score, -1)
        return total

    def _dense(self, tables: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Callable[[Token, Token], int]]]:
        dense = [tables[f"table{m}"] for m in range(len(self.tables)) if tables]
        return dense, [table.row for table in self.tables][: len(dense)]

    def slices(self, heads: int = 2) -> dict[str, list[object]]:
        """Every modality's rows of every head; every head of the tables, their CLS rows apart."""
        parts = self.layout.modality_slices
        each = range(heads)
        result = {"out0": [(p, h) for p in parts for h in each]}
        result["qkv"] = [(p, i, h) for p in parts for i in range(3) for h in each]
        for m in range(len(self.tables)):
            result[f"table{m}"] = [(part, h) for h in each for part in (slice(None, -3), slice(-3, None))]
        return result


def text_only() -> Batch:
    """Lengths 5, 1 and 7 and a table of few buckets, so that some distances are logarithmic."""
    return Batch(naive_layout(whole_rows({"text": [5, 1, 7]})), (series(4, 7),))


def kept_text() -> Batch:
    """Kept subsets whose position ids reach 1023."""
    positions = kept_positions([5, 9], 1023, seed=1)
    positions[1][-1] = 1023
    kept = whole_rows({"text": [5, 9]})
    return Batch(naive_layout(kept, positions={"text": positions}), (series(8, 1024),))


def kept_grid(side: int = 3, table_grid: int = 3) -> Batch:
    """Images of which some patches are kept, one with all of them; inert rows at the end."""
    total = side * side + 1
    positions = {"image": [list(range(total)), *kept_positions([4, 2], total - 1, seed=2)]}
    kept = whole_rows({"image": [total, 4, 2]})
    codes = {"image": grid_codes(side, table_grid).tolist()}
    count = total + 6
    layout = naive_layout(kept, positions=positions, codes=codes, capacity=count + 2)
    return Batch(layout, (grid(table_grid, side),))


def mixed(long: bool = False) -> Batch:
    """Three modalities that samples have some of, in any order, with kept subsets; one modality is empty."""
    lengths = {"text": [4, 6, 1], "image": [5, 10], "audio": [7, 3], "video": []}
    if long:
        lengths = {"text": [65, 7, 1], "image": [10, 10], "audio": [300, 64], "video": []}
    samples = {"text": [2, 0, 3], "image": [3, 1], "audio": [0, 1], "video": []}
    image = [*kept_positions(lengths["image"][:1], 9, seed=3), list(range(10))]
    positions = {"image": image, "audio": kept_positions(lengths["audio"], 400, seed=4)}
    layout = naive_layout(
        whole_rows(lengths), samples, positions, {"image": grid_codes(3, 3).tolist()},
        capacity=sum(map(sum, lengths.values())) + 3,
    )  # fmt: skip
    width = max(lengths["text"])
    return Batch(layout, (series(4, width), grid(3, 3), series(16, 401), series(4, 2)))


def long_range() -> Batch:
    """Two modalities whose vectors of 2047 distances do not fit into shared memory together."""
    kept = {"text": [9, 4], "audio": [12, 20]}
    positions = {name: kept_positions(rows, 1023, seed=5) for name, rows in kept.items()}
    return Batch(naive_layout(whole_rows(kept), positions=positions), (series(64, 1024), series(256, 1024)))


def lengths(counts: Sequence[int], modalities: int = 1) -> Batch:
    """Samples of these lengths in each of some modalities, the counts turned by one from a modality to the next."""
    turned = {f"modality{m}": [*counts[m:], *counts[:m]] for m in range(modalities)}
    tables = tuple(series(8 << m, max(counts)) for m in range(modalities))
    return Batch(naive_layout(whole_rows(turned), capacity=modalities * sum(counts) + 5), tables)


def _images(side: int, rows: Sequence[Sequence[int]], **texts: Sequence[int]) -> Layout:
    """Images of these patches of a grid in their order, each behind a CLS, and texts of these lengths."""
    kept = whole_rows({"image": [len(row) + 1 for row in rows], **texts})
    positions = {"image": [[0, *row] for row in rows]}
    return naive_layout(kept, positions=positions, codes={"image": grid_codes(side, side).tolist()})


def runs() -> Batch:
    """Rows of a grid of 16, of one image without CLS, of another half of them in random order; texts in order, but one
    whose last token is further on."""
    patches = list(range(1, 129))
    shuffled = patches[:64] + random.Random(16).sample(patches[64:], 64)
    kept = {
        "image": [patches[:112], [0, *shuffled]],
        "text": [list(range(1, 71)), list(range(20)), [*range(1, 16), 60]],
    }
    layout = naive_layout(kept, codes={"image": grid_codes(16, 16).tolist()})
    return Batch(layout, (grid(16, 16), series(64, 71)))


def shuffled_grid(side: int, kept: Sequence[int] = ()) -> Batch:
    """A whole image, and kept patches of others, in random order."""
    generator = random.Random(side)
    rows = [generator.sample(range(1, side * side + 1), count) for count in (side * side, *kept)]
    return Batch(_images(side, rows), (grid(side, side),))


def windowed_grid(side: int, where: str) -> Batch:
    """Patches of a large image, of its first "rows", of two "corners" or from "anywhere", and a text."""
    last = side * side
    patches = {
        "rows": [*range(1, 71)],
        "corners": [*range(1, 71), *range(last - 29, last + 1)],
        "anywhere": random.Random(0).sample(range(1, last + 1), 140),
    }[where]
    return Batch(_images(side, [patches], text=[20]), (grid(side, side), series(8, 20)))


def any_cls(counts: Sequence[Sequence[tuple[int, int]]]) -> Batch:
    """Segments of any number of body and CLS tokens, ``counts[modality][sample]``."""
    tokens = []
    seen = [0] * len(counts[0])
    for m, segments in enumerate(counts):
        for sample, (body, cls) in enumerate(segments):
            for i in range(body + cls):
                column = i + 1 if i < body else 0
                tokens.append(Token(m, sample, column, column, 0, column, seen[sample]))
                seen[sample] += 1
    widest = max(body for segments in counts for body, _ in segments) + 1
    layout = Layout(tuple(tokens), len(counts), len(counts[0]), len(tokens) + 1)
    return Batch(layout, tuple(series(4 << m, widest) for m in range(len(counts))))


def random_codes() -> Batch:
    """Codes that are no positions at all, and a vector in which more differences would find their entry."""
    layout = naive_layout(whole_rows({"text": [4, 1, 3]}), codes={"text": [0, 3, 1, 2]}, capacity=9)
    return Batch(layout, (Table(12, naive.vector_row(4, 12), torch.arange(12), 4),))


BATCHES = {
    "text": text_only,
    "kept text": kept_text,
    "kept grid": kept_grid,
    "small grid in a larger table": lambda: kept_grid(3, 5),
    "three of four modalities": mixed,
}
