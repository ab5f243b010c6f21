"""The bias of upstream's adapters: a vector and a code per token, and all pairs only where someone reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.dense_bias import dense_vector, is_relative
from onepeace_fast.fusion.family import Refusal, is_exported
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.layers.plain import has_plain_tensors
from onepeace_fast.relative_position import CLS_ENTRIES, dense_index, grid_code_offset, grid_codes

TABLE_SETTINGS = ("padding_idx", "max_norm", "sparse", "scale_grad_by_freq")  # of an Embedding that a vector lacks


class PositionBias(Sequence[Tensor]):
    """What an adapter hands on as its list of biases; each is [batch, heads, length, length] where it is indexed.

    Attributes:
        vectors: of each table, [heads, entries].
        code_offset: the entry of equal codes.
        codes: of each position, None where it is the position itself.
        length: tokens of a sample.
        positions: int64 [batch, length], position ids where only some tokens are visible.
    """

    def __init__(
        self, vectors: list[Tensor], code_offset: int, codes: Tensor | None, length: int, positions: Tensor | None,
        make: Callable[[], Sequence[Tensor]],
    ) -> None:  # fmt: skip
        self.vectors, self.code_offset, self.codes = vectors, code_offset, codes
        self.length, self.positions = length, positions
        self._make = make
        self._dense: Sequence[Tensor] | None = None

    @property
    def dense(self) -> Sequence[Tensor]:
        """The adapter's own list."""
        if self._dense is None:
            self._dense = self._make()
        return self._dense

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: Any) -> Any:
        return self.dense[index]

    def of_positions(self, positions: Tensor, make: Callable[[], Sequence[Tensor]]) -> PositionBias:
        """The bias of these positions alone."""
        return PositionBias(self.vectors, self.code_offset, self.codes, positions.shape[1], positions, make)


class AdapterBias:
    """Reads an adapter's tables by its ``rp_bucket``, the table row of each pair of positions.

    Args:
        path: of the adapter, for messages.
        adapter: the module.
        is_grid: whether positions are those of a square image; otherwise of a series. A CLS stands before them.
        heads, layers: of the encoder.

    Raises:
        Refusal: buckets or tables that are not upstream's.
    """

    def __init__(self, path: str, adapter: nn.Module, is_grid: bool, heads: int, layers: int) -> None:
        self.path, self.adapter, self.is_grid = path, adapter, is_grid
        self._buckets: Tensor | None = None
        self._version = 0
        self._rows: Tensor | None = None
        tables = _tables(path, adapter)
        if tables is None:
            return
        if len(tables) not in {1, layers}:
            raise Refusal(f"{path}.rel_pos_table_list: expected 1 table or {layers}, as layers, got {len(tables)}")
        buckets: Any = getattr(adapter, "rp_bucket", None)
        square = isinstance(buckets, Tensor) and buckets.dim() == 2 and buckets.shape[0] == buckets.shape[1]
        if (
            not square
            or buckets.shape[0] < 2
            or (is_grid and math.isqrt(buckets.shape[0] - 1) ** 2 != len(buckets) - 1)
        ):
            pairs = "a square image's pairs of patches" if is_grid else "all pairs of a series"
            raise Refusal(f"{path}.rp_bucket: expected the buckets of {pairs} with CLS first")
        if self.rows() is None:
            raise Refusal(f"{path}.rp_bucket: expected buckets by the distance of two tokens, got others")
        most = int(buckets.max())
        for number, table in enumerate(tables):
            name = f"{path}.rel_pos_table_list.{number}"
            if type(table) is not nn.Embedding or table.embedding_dim != heads or table.num_embeddings <= most:
                raise Refusal(f"{name}: expected an Embedding of {most + 1} rows and {heads} heads, got {table}")
            if any([getattr(table, setting) not in (None, False) for setting in TABLE_SETTINGS]):
                raise Refusal(f"{name}: expected an Embedding without further settings, got {table}")

    @property
    def has_bias(self) -> bool:
        """Whether the adapter gives a bias."""
        return getattr(self.adapter, "rel_pos_table_list", None) is not None

    def rows(self) -> Tensor | None:
        """Table row of each entry of the vector of all positions: int64; None where buckets are not by distance.

        Read from the adapter's buffer as it is now: another one, or other numbers in it, are read again.
        """
        buckets: Any = self.adapter.rp_bucket
        version = 0 if buckets.is_inference() else buckets._version
        if buckets is not self._buckets or version != self._version:
            window = self._window(buckets)
            with torch.inference_mode(False):  # it is kept for what has gradients, too
                by_distance = bool(is_relative(buckets[None], window, with_cls=True))
                self._rows = dense_vector(buckets[None], window, with_cls=True)[0] if by_distance else None
            self._buckets, self._version = buckets, version
        return self._rows

    def _window(self, buckets: Tensor) -> tuple[int, ...]:
        tokens = buckets.shape[0] - 1
        return (math.isqrt(tokens),) * 2 if self.is_grid else (tokens,)

    def bias(self, replacement: Replacement, batch: int, length: int | None = None) -> Sequence[Tensor]:
        """In the place of ``get_rel_pos_bias``: the adapter's list, whose pairs are made when they are read."""
        arguments = (batch,) if length is None else (batch, length)
        if is_exported():
            return replacement.original(*arguments)
        rows, positions = self.rows(), self._buckets
        assert positions is not None  # rows has read them
        width = positions.shape[0] if length is None else length
        tables: Any = self.adapter.rel_pos_table_list
        are_read = all([isinstance(table, nn.Embedding) for table in tables])
        if rows is None or width > positions.shape[0] or not are_read:
            return replacement.original(*arguments)
        codes, offset = None, 0
        if self.is_grid:
            side = math.isqrt(width - 1)
            codes, offset = grid_codes(side, side, rows.device), grid_code_offset(side)
        else:
            # Of the distances of a series those that its tokens have; CLS alone has none.
            equal, offset = (rows.shape[0] - CLS_ENTRIES) // 2, max(width - 2, 0)
            rows = torch.cat([rows[equal - offset : equal + offset + 1], rows[-CLS_ENTRIES:]])
        vectors = [F.embedding(rows, table.weight).t().contiguous() for table in tables]

        def make() -> Sequence[Tensor]:
            if all([has_plain_tensors(table) for table in tables]):
                return replacement.original(*arguments)
            # FSDP2 shards an adapter again behind its call.
            return _all_pairs(vectors, codes, offset, width, batch)

        return PositionBias(vectors, offset, codes, width, None, make)

    def gathered(self, replacement: Replacement, *arguments: Any) -> tuple[Any, ...]:
        """In the place of ``gather_features``, whose last arguments are the list of biases and the position ids."""
        *features, bias, positions = arguments
        if not isinstance(bias, PositionBias):
            return replacement.original(*arguments)
        *visible, _ = replacement.original(*features, None, positions)

        def make() -> Sequence[Tensor]:
            # The adapter's own gathering of pairs, with one column of the features, which it gathers beside.
            return replacement.original(*(x.detach()[..., :1] for x in features), bias.dense, positions)[-1]

        return (*visible, bias.of_positions(positions, make))


def _all_pairs(vectors: Sequence[Tensor], codes: Tensor | None, offset: int, width: int, batch: int) -> list[Tensor]:
    """[batch, heads, width, width] of each vector."""
    position = torch.arange(width, device=vectors[0].device)
    code = position if codes is None else codes
    index = dense_index(code, position == 0, offset, vectors[0].shape[1])
    return [F.embedding(index, vector.t()).permute(2, 0, 1).expand(batch, -1, -1, -1) for vector in vectors]


def _tables(path: str, adapter: nn.Module) -> nn.ModuleList | None:
    """An adapter's tables, None for an adapter without a bias."""
    for method in ("get_rel_pos_bias", "gather_features"):
        if not callable(getattr(type(adapter), method, None)):
            raise Refusal(f"{path}: expected upstream's adapter, got {type(adapter).__name__} without {method}")
    tables = getattr(adapter, "rel_pos_table_list", ())
    if tables is not None and not isinstance(tables, nn.ModuleList):
        raise Refusal(
            f"{path}.rel_pos_table_list: expected a ModuleList of tables or None, got {type(tables).__name__}"
        )
    return tables
