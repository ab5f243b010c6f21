"""Tiles so small that few rows fill several: for the tests of the kernels of products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from onepeace_fast.kernels import tile_table
from support.kernels import INTERPRETED

SMALL = tile_table.TileParameters(
    32, 64, 32, row_tiles_at_once=2, num_warps=4, num_stages=2, programs_per_multiprocessor=1, pieces=4
)


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Launch with small tiles inside, where the interpreter runs; a GPU runs the shipped ones."""
    small = tile_table.use_tiles(dict.fromkeys(tile_table.KERNELS, SMALL))
    with small if INTERPRETED else contextlib.nullcontext():
        yield
