"""The tiles of matrix products: the table shipped beside this file, by kernel and GPU architecture.

An architecture without an entry takes the nearest older one, else the oldest. The entries are for half precision, in
which the tensor cores multiply; float32, which only the interpreter multiplies in tiles, takes the same.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from onepeace_fast.kernels.launch_table import nearest

SHIPPED_PATH = Path(__file__).with_name("tile_parameters.json")

TileTable = dict[str, dict[str, dict[str, Any]]]


class TileParameters(NamedTuple):
    """An entry of the table: a program computes tiles of ``block_rows`` x ``block_columns`` of a product.

    It sums over ``block_inner`` at a time, with loads ``num_stages`` deep. Tiles of ``row_tiles_at_once`` tiles of rows
    are computed column by column, so that what they share stays in the L2 cache. A launch has
    ``programs_per_multiprocessor`` programs for each multiprocessor, and each walks over its share of the tiles.
    An epilogue treats ``pieces`` of a tile's columns one after another, so that registers hold what it needs.
    """

    block_rows: int
    block_columns: int
    block_inner: int
    row_tiles_at_once: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int
    pieces: int = 1

    @property
    def constants(self) -> dict[str, int]:
        """Those that every kernel of products is compiled with."""
        return {
            "BLOCK_ROWS": self.block_rows, "BLOCK_COLUMNS": self.block_columns, "BLOCK_INNER": self.block_inner,
            "ROW_TILES_AT_ONCE": self.row_tiles_at_once,
        }  # fmt: skip


SHIPPED: TileTable = json.loads(SHIPPED_PATH.read_text(encoding="utf-8"))
_used_instead: TileTable | None = None


@contextlib.contextmanager
def use_tiles(table: TileTable) -> Iterator[None]:
    """Launch by another table inside."""
    global _used_instead
    before, _used_instead = _used_instead, table
    tiles_of.cache_clear()
    try:
        yield
    finally:
        _used_instead = before
        tiles_of.cache_clear()


@functools.cache
def tiles_of(kernel: str, architecture: str) -> TileParameters:
    """The tiles of a kernel on an architecture."""
    return TileParameters(**nearest((_used_instead or SHIPPED)[kernel], architecture))
