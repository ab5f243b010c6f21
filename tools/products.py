"""What the routed FFN's matrix products come to at a batch of image and text pairs, by their tiles alone: arithmetic.

A wave is one tile for each program of a launch. The efficiency is the work that a product needs over what its programs
could do until the last of them is done. A tile reads its operands through the L2 cache; the minimum is the operands
of each product once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

from tools.cubin import CHIPS

COUNTS = (1264, 8224)  # rows of 32 captions of 7 to 72 tokens, and of 32 images of 256 patches and CLS
WIDTH, HIDDEN = 1536, 6144
ELEMENT = 2  # bytes
HEADINGS = ("product", "GPU", "tile", "tiles", "waves", "efficiency", "GFLOP", "minimum", "MB read", "minimum",
            "MB beside")  # fmt: skip


class Product(NamedTuple):
    """One launch: results of some rows by some columns, each summed over an inner dimension, in their tiles' order.

    ``weights`` are how many right operands a left one is multiplied by in one pass; ``beside`` are the matrices of a
    result's shape that the epilogue reads and writes, in bytes of an element each; ``loops`` say which of the kernel's
    loops over tiles a result is of, where it has several.
    """

    name: str
    entry: str
    rows: Sequence[int]
    columns: Sequence[int]
    inner: Sequence[int]
    beside: Sequence[int]
    weights: int = 1
    loops: Sequence[int] = ()

    @property
    def flop(self) -> int:
        """That its results need."""
        shapes = zip(self.rows, self.columns, self.inner, strict=True)
        return sum(2 * rows * columns * inner * self.weights for rows, columns, inner in shapes)


class Figures(NamedTuple):
    """Of one product on one chip."""

    tiles: int
    waves: float
    efficiency: float
    operations: int
    least_operations: int
    read: int
    least_read: int
    beside: int


def products(counts: Sequence[int] = COUNTS, width: int = WIDTH, hidden: int = HIDDEN) -> list[Product]:
    """Those of a forward and a backward pass, with gate, Sub-LayerNorm, LayerScale and a float32 residual."""
    counts, every = sorted(counts, reverse=True), len(counts)
    # Of each modality dW0, dW1 and dW2: in one launch with dz they have one wave that is not full, and not three.
    gradients = {
        "rows": [*counts, *[hidden, hidden, width] * every],
        "columns": [width] * every + [width, width, hidden] * every,
        "inner": [2 * hidden] * every + [rows for rows in counts for _weight in range(3)],
        "beside": [ELEMENT] * every + [ELEMENT, ELEMENT, 2 * ELEMENT] * every,
        "loops": [0] * every + [1, 1, 2] * every,
    }  # fmt: skip
    return [
        Product("u, v", "routed_ffn_hidden", counts, [hidden] * every, [width] * every, [3 * ELEMENT] * every, 2),
        Product("y", "routed_ffn_output", counts, [width] * every, [hidden] * every, [ELEMENT + 4 + 4] * every),
        Product("dh", "routed_ffn_hidden_gradient", counts, [hidden] * every, [width] * every, [5 * ELEMENT] * every),
        Product("dz, dW", "gradients", **gradients),
    ]


def figures(product: Product, architecture: str) -> Figures:
    """Tiles, waves, and the work and the reads that they imply, beside what the product needs."""
    from onepeace_fast.kernels.tile_table import tiles_of

    tile = tiles_of(product.entry, architecture)
    programs = CHIPS[architecture].multiprocessors * tile.programs_per_multiprocessor
    counts = [
        ceil(rows / tile.block_rows) * ceil(columns / tile.block_columns)
        for rows, columns in zip(product.rows, product.columns, strict=True)
    ]
    steps = [ceil(inner / tile.block_inner) * tile.block_inner for inner in product.inner]
    # A program takes every ``programs``-th tile.
    lengths = [length for length, count in zip(steps, counts, strict=True) for _tile in range(count)]
    longest = max(sum(lengths[program::programs]) for program in range(min(programs, len(lengths))))
    of_step = 2 * tile.block_rows * tile.block_columns * product.weights
    operands = tile.block_rows + product.weights * tile.block_columns
    shapes = list(zip(product.rows, product.columns, product.inner, strict=True))
    return Figures(
        tiles=sum(counts),
        waves=sum(counts) / programs,
        efficiency=product.flop / (programs * longest * of_step),
        operations=of_step * sum(lengths),
        least_operations=product.flop,
        read=ELEMENT * operands * sum(lengths),
        least_read=ELEMENT * sum(inner * (rows + product.weights * columns) for rows, columns, inner in shapes if rows),
        beside=sum(
            rows * columns * bytes_each for (rows, columns, _), bytes_each in zip(shapes, product.beside, strict=True)
        ),
    )


def rows(architectures: Sequence[str] = tuple(CHIPS)) -> Iterator[tuple[str, ...]]:
    """The table's rows, the heading first."""
    from onepeace_fast.kernels.tile_table import tiles_of

    yield HEADINGS
    for architecture in architectures:
        for product in products():
            tile, found = tiles_of(product.entry, architecture), figures(product, architecture)
            work = (f"{value / 1e9:.0f}" for value in (found.operations, found.least_operations))
            moved = (f"{value / 1e6:.0f}" for value in (found.read, found.least_read, found.beside))
            yield (
                product.name, architecture, f"{tile.block_rows}x{tile.block_columns}x{tile.block_inner}",
                str(found.tiles), f"{found.waves:.2f}", f"{found.efficiency:.0%}", *work, *moved,
            )  # fmt: skip
