"""Rows of a table: a token for each column, numeric or categorical; a missing cell has a learned token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real

import torch
from torch import Tensor, nn

from onepeace_fast.checks import describe, require, require_tensor
from onepeace_fast.config import TransformerConfig, is_number
from onepeace_fast.layers.adapters.adapter import Adapter, Fault, require_items
from onepeace_fast.layers.parameters import init_truncated_normal
from onepeace_fast.relative_position import (
    CLS_ENTRIES,
    distinct_difference_codes,
    pair_table_rows,
    pair_vector_index,
)

MOST_COLUMNS = 128  # the bias vector grows with the square of the columns
SHOWN = 8
LARGEST = torch.finfo(torch.float32).max


class TableAdapter(Adapter):
    """A token for each column of a row; each ordered pair of columns has a relative bias of its own.

    A number is standardised and times a learned vector of its column, a category has an embedding, a missing cell its
    column's vector for that; each token has the embedding of its column beside.

    Args:
        config: the model's ``config.encoder``.
        numeric: {column: (mean, standard deviation)} of the training data, in the column's unit.
        categorical: {column: names of its categories}.
    """

    column_codes: Tensor
    pair_index: Tensor
    first_category: Tensor
    category_counts: Tensor

    def __init__(
        self, config: TransformerConfig, numeric: Mapping[str, tuple[float, float]],
        categorical: Mapping[str, Sequence[str]],
    ) -> None:  # fmt: skip
        for name, given in (("numeric", numeric), ("categorical", categorical)):
            require(isinstance(given, Mapping), f"{name}: expected a mapping from columns, got {describe(given)}")
        columns = (*numeric, *categorical)
        require(
            0 < len(columns) <= MOST_COLUMNS and len(set(columns)) == len(columns),
            f"numeric, categorical: expected 1 to {MOST_COLUMNS} columns of unlike names, got {describe(columns)}",
        )
        for column, pair in numeric.items():
            fits = isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_number, pair)) and pair[1] > 0
            require(fits, f"numeric[{column!r}]: expected (mean, deviation above 0), got {describe(pair)}")
        for column, names in categorical.items():
            # No set, whose order, and so what a category's number is, another process would not have.
            fits = isinstance(names, Sequence) and not isinstance(names, str) and len(names) > 0
            fits = fits and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
            require(
                fits,
                f"categorical[{column!r}]: expected a list of its categories' names, each once, got {describe(names)}",
            )
        super().__init__(config.embed_dim, config.attention_heads, config.bias_tables, pair_table_rows(len(columns)))
        self.numeric, self.columns = dict(numeric), columns
        self.categories = {column: {name: i for i, name in enumerate(names)} for column, names in categorical.items()}
        counts = [len(names) for names in self.categories.values()]

        def drawn(rows: int) -> nn.Parameter:
            return nn.Parameter(init_truncated_normal(torch.empty(rows, config.embed_dim)))

        self.embed_numbers = drawn(len(numeric)) if numeric else None
        self.embed_categories = nn.Embedding(sum(counts), config.embed_dim) if counts else None
        if self.embed_categories is not None:
            init_truncated_normal(self.embed_categories.weight)
        self.embed_missing = drawn(len(columns))
        self.embed_positions = drawn(1 + len(columns))
        self.add_derived("column_codes", partial(_codes_behind_cls, len(columns)))
        self.add_derived("pair_index", partial(pair_vector_index, len(columns)))
        self.add_derived("category_counts", partial(torch.tensor, counts, dtype=torch.int64, device="cpu"))
        self.add_derived("first_category", lambda: torch.tensor([0, *counts], device="cpu").cumsum(0)[:-1])

    def batch(self, name: str, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Rows as the model takes them: {name: float32 [rows, columns]}, numbers standardised, categories by number.

        A cell that is absent, None or NaN is missing, and NaN in the tensor.

        Raises:
            ValueError: a column that the table lacks, an unknown category, a cell of another type; by row and column.
        """
        require_items(name, "rows", rows)
        table = []
        for place, row in enumerate(rows):
            where = f"{name}, row {place}"
            require(isinstance(row, Mapping), f"{where}: expected a mapping from column to cell, got {describe(row)}")
            unknown = [column for column in row if column not in self.columns]
            require(not unknown, f"{where}: expected columns {_some(self.columns)}, got {_some(unknown)}")
            cells = {column: row.get(column) for column in self.columns}
            table.append([self._number(f"{where}, column {column!r}", column, cell) for column, cell in cells.items()])
        return {name: torch.tensor(table, dtype=torch.float64, device="cpu").float()}

    def _number(self, where: str, column: str, cell: object) -> float:
        """What stands for a cell in the tensor."""
        is_real = isinstance(cell, Real) and not isinstance(cell, bool)
        if cell is None or (is_real and cell != cell):
            return math.nan
        if column in self.numeric:
            mean, deviation = self.numeric[column]
            try:
                number = (float(cell) - mean) / deviation if is_real else math.inf  # type: ignore[arg-type]
            except OverflowError:  # of an integer
                number = math.inf
            if abs(number) > LARGEST:
                raise ValueError(f"{where}: expected a number, finite in float32, got {describe(cell)}")
            return number
        known = self.categories[column]
        if not isinstance(cell, str) or cell not in known:
            raise ValueError(f"{where}: expected one of {_some(known)}, got {describe(cell)}")
        return known[cell]

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        columns = len(self.columns)
        # Half precision would round the numbers of categories.
        require_tensor(name, value, (torch.float32, torch.float64), f"[rows, {columns}]", 2)
        fits = value.shape[1] == columns
        require(fits, f"{name}: expected a number for each of {columns} columns, got {describe(value)}")
        return torch.ones(len(value), 1 + columns, dtype=torch.bool, device=value.device)

    def faults(self, name: str, value: Tensor, padding: Tensor | None) -> list[Fault]:
        (numbers, _), (_, ids) = self._split(value), self._split(value.nan_to_num())
        outside = (ids < 0) | (ids >= self.category_counts) | (ids != ids.floor())
        return [
            (numbers.isinf().sum(), lambda n: f"{name}: expected finite numbers, NaN where missing, got {n} others"),
            (outside.sum(), lambda n: f"{name}: expected categories by number as batch gives them, got {n} others"),
        ]

    def _split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value[:, : len(self.numeric)], value[:, len(self.numeric) :]

    def tokens(self, value: Tensor) -> Tensor:
        """Embed [rows, columns] to [rows, 1 + columns, embed_dim]."""
        numbers, ids = self._split(value.nan_to_num())
        present = []
        if self.embed_numbers is not None:
            present.append(numbers.to(self.embed_numbers.dtype)[..., None] * self.embed_numbers)
        if self.embed_categories is not None:
            present.append(self.embed_categories(ids.long() + self.first_category))
        cells = torch.where(value.isnan()[..., None], self.embed_missing, torch.cat(present, dim=1))
        return torch.cat([self.cls_embedding.expand(len(value), -1, -1), cells], dim=1)

    def position_table(self, width: int) -> Tensor:
        return self.embed_positions

    def vector_index(self, width: int) -> Tensor:
        return self.pair_index

    def codes(self, width: int) -> Tensor:
        return self.column_codes

    def code_offset(self, width: int) -> int:
        return (len(self.pair_index) - CLS_ENTRIES) // 2


def _codes_behind_cls(columns: int) -> Tensor:
    codes = distinct_difference_codes(columns).int()
    return torch.cat([codes.new_zeros(1), codes])  # CLS's is never used


def _some(names: Sequence[str] | Mapping[str, object]) -> str:
    """Names for a line, the first few of many."""
    shown = ", ".join(map(repr, [*names][:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
