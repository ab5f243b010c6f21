"""The tiles of matrix products, by what a GPU multiplies with and how much shared memory a program may have.

They are for half precision, in which the tensor cores multiply. `make kernels` compiles all of them for every kind of
GPU and refuses spills, more shared memory than there is, and a product without the GPU's own instructions for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

MAX_MODALITIES = 64  # of a launch of products
OLDEST = 80  # the first architecture with bfloat16 in its tensor cores and copies that do not pass through registers


class TileParameters(NamedTuple):
    """A program computes tiles of ``block_rows`` x ``block_columns`` of a product.

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


# mma.sync keeps the accumulators in registers, which 128 x 128 by 8 warps leave half of to the rest; 64 columns where
# there are two of them. Four stages of 32 hide the latency of copies in at most 64 KiB, which cards with 99 KiB hold.
# The epilogue of h's gradient reads two tensors and writes three: by quarters it spills in float16 with silu.
_SQUARE = TileParameters(128, 128, 32, row_tiles_at_once=8, num_warps=8, num_stages=4, programs_per_multiprocessor=1)
_MMA = {
    "routed_ffn_hidden": _SQUARE._replace(block_columns=64, pieces=4),
    "routed_ffn_output": _SQUARE._replace(pieces=4),
    "routed_ffn_hidden_gradient": _SQUARE._replace(pieces=8),
    "gradients": _SQUARE._replace(pieces=4),
    "routed_linear": _SQUARE,
}
# From sm_120 on descriptors copy, but mma.sync still multiplies, from 99 KiB. The product with two accumulators copies
# rows of 128 bytes, which compiles without a spill where those of 64 do not; that with the longest epilogue is half as
# wide, so that two programs take turns at it.
_MMA_DESCRIPTORS = _MMA | {
    "routed_ffn_hidden": _MMA["routed_ffn_hidden"]._replace(block_inner=64, num_stages=3),
    "routed_ffn_output": _MMA["routed_ffn_output"]._replace(block_columns=64, programs_per_multiprocessor=2),
}
# wgmma reads both operands from shared memory: a tile of 128 x 256 reads less for each product than a square one, and
# three stages of 64 fill 144 of 227 KiB. Where an epilogue holds more a tile is smaller; that of h's gradient waits for
# memory longest, so that two programs take turns at it; by eighths it spills in float16 with silu, and where it sums
# for the norm too. All products of the gradients are one launch with one last wave: in three, the tiles of dW2, of dW0
# and dW1, and of dz filled 76, 89 and 84% of the waves of 132 multiprocessors, at the rows of tools/products.py; in one
# they fill 96%. Squares would fill 97% for dz, but by the model take longer.
_WIDE = TileParameters(128, 256, 64, row_tiles_at_once=8, num_warps=8, num_stages=3, programs_per_multiprocessor=1)
_WGMMA = {
    "routed_ffn_hidden": _WIDE._replace(block_columns=128, pieces=4),
    "routed_ffn_output": _WIDE._replace(block_columns=128, num_stages=4, pieces=4),
    "routed_ffn_hidden_gradient": _WIDE._replace(
        block_columns=128, num_warps=4, programs_per_multiprocessor=2, pieces=16
    ),
    "gradients": _WIDE._replace(pieces=8),
    "routed_linear": _WIDE,
}
# tcgen05 keeps the accumulators in a memory of its own and has as much shared memory. Sums over the rows of pieces that
# come from there do not compile with Triton 3.9; a whole tile does, without a spill.
_TCGEN05 = _WGMMA | {"routed_ffn_hidden": _WGMMA["routed_ffn_hidden"]._replace(pieces=1)}
KERNELS = tuple(_MMA)
_used_instead: Mapping[str, TileParameters] | None = None


def refusal(architecture: str) -> str | None:
    """Why there are no tiles for an architecture, in one line; None where there are."""
    if _number(architecture) >= OLDEST:
        return None
    return f"expected a GPU of compute capability {OLDEST / 10} or later, got {_number(architecture) / 10}"


def norm_is_folded(dtype: torch.dtype) -> bool:
    """Whether a norm goes into the products: in float16 what they store before it may pass the largest number."""
    return dtype != torch.float16


def tiles_of(kernel: str, architecture: str) -> TileParameters:
    """The tiles of a kernel on an architecture; raise ValueError in one line where there are none."""
    if _used_instead is not None:
        return _used_instead[kernel]
    try:
        return _kind(architecture)[kernel]
    except ValueError as error:
        raise ValueError(f"{kernel}: {error}") from None


@functools.cache
def _kind(architecture: str) -> Mapping[str, TileParameters]:
    if (reason := refusal(architecture)) is not None:
        raise ValueError(reason)
    number = _number(architecture)
    if number < 90:
        return _MMA
    if number < 100:
        return _WGMMA
    if number < 120:
        return _TCGEN05
    return _MMA_DESCRIPTORS  # also for one that is newer than this table: what fits into 99 KiB fits everywhere


def _number(architecture: str) -> int:
    digits = architecture.removeprefix("sm_")
    if not digits.isdigit():
        raise ValueError(f"expected an architecture like sm_90, got {architecture!r}")
    return int(digits)


@contextlib.contextmanager
def use_tiles(tiles: Mapping[str, TileParameters]) -> Iterator[None]:
    """Launch with other tiles inside, given by kernel, on every architecture."""
    global _used_instead
    before, _used_instead = _used_instead, tiles
    try:
        yield
    finally:
        _used_instead = before
