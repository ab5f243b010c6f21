"""How the rows of a matrix are shared out among programs: device functions of every kernel that walks over rows.

Program p takes the rows [p * share, (p + 1) * share) of those below the extent, modality by modality. Its order of
summation depends on the rows alone, so sums over rows are repeatable bit by bit.
"""

import triton
import triton.language as tl


@triton.jit
def row_extent(offsets, groups, rows):
    """Rows that are not inert: the plan's last offset, read on the device, all rows without a plan."""
    extent = rows
    if offsets is not None:
        extent = tl.minimum(tl.load(offsets + groups), rows)
    return extent


@triton.jit
def rows_per_program(extent, programs, BLOCK_ROWS: tl.constexpr):
    """Each program's share: whole blocks of rows."""
    return tl.maximum(tl.cdiv(tl.cdiv(extent, programs), BLOCK_ROWS), 1) * BLOCK_ROWS


@triton.jit
def group_rows(offsets, group, step, first, last):
    """The rows of a group of modalities between ``first`` and ``last``.

    A group is ``step`` modalities: one where each has its own parameters, all of them where they share them.
    """
    start = first
    stop = last
    if offsets is not None:
        start = tl.maximum(tl.load(offsets + group * step), first)
        stop = tl.minimum(tl.load(offsets + group * step + step), last)
    return start, stop


@triton.jit
def store_zeros(out, first, last, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Zeros into this program's share of the rows from ``first`` to ``last`` of a contiguous matrix."""
    column = tl.arange(0, BLOCK_WIDTH)
    zeros = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=out.dtype.element_ty)
    tile = first + tl.program_id(0) * BLOCK_ROWS
    while tile < last:
        row = tile + tl.arange(0, BLOCK_ROWS)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(out + place, zeros, mask=(row < last)[:, None] & (column < width)[None, :])
        tile += tl.num_programs(0) * BLOCK_ROWS
