"""How the rows of a matrix are shared out among programs: device functions of every kernel that walks over rows.

Program p takes the rows [p * share, (p + 1) * share) of those below the extent, modality by modality. Its order of
summation depends on the numbers of rows alone, so sums over rows are repeatable bit by bit. A row is held as a tuple of
parts, each a power of two of columns, so that 6144 columns take no more registers than they need.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import cdiv, launch

BLOCK_INDEX = 256


@triton.jit
def row_extent(
    offsets,  # [modalities + 1] or None
    modalities, rows,
):  # fmt: skip
    """Rows that are not inert: the plan's last offset, read on the device, or all rows without a plan."""
    extent = rows
    if offsets is not None:
        extent = tl.minimum(tl.load(offsets + modalities), rows)
    return extent


@triton.jit
def rows_per_program(extent, programs, BLOCK_ROWS: tl.constexpr):
    """Each program's share: whole blocks of rows."""
    return tl.maximum(tl.cdiv(tl.cdiv(extent, programs), BLOCK_ROWS), 1) * BLOCK_ROWS


@triton.jit
def share_of_rows(extent, BLOCK_ROWS: tl.constexpr):
    """First row and end of this program's share."""
    share = rows_per_program(extent, tl.num_programs(0), BLOCK_ROWS)
    first = tl.program_id(0) * share
    return first, tl.minimum(first + share, extent)


@triton.jit
def rows_of_norm(
    offsets,  # [norms * modalities_per_norm + 1] or None
    norm, modalities_per_norm, first, last,
):  # fmt: skip
    """The rows between ``first`` and ``last`` that a norm's parameters belong to: one modality's, or those of all."""
    start = first
    stop = last
    if offsets is not None:
        modality = norm * modalities_per_norm
        start = tl.maximum(tl.load(offsets + modality), first)
        stop = tl.minimum(tl.load(offsets + modality + modalities_per_norm), last)
    return start, stop


@triton.jit
def load_rows(
    matrix,  # [rows, width]
    stride, row, live, width, part, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A part of the columns of some rows, [BLOCK_ROWS, BLOCK_WIDTH]; zero past the width and where not ``live``."""
    column = part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    cell = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(matrix + cell, mask=live[:, None] & (column < width)[None, :], other=0)


@triton.jit
def store_rows(
    matrix,  # [rows, width]
    row, live, width, value, part, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a part of the columns of some rows of a contiguous matrix."""
    column = part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    cell = row.to(tl.int64)[:, None] * width + column[None, :]
    mask = live[:, None] & (column < width)[None, :]
    tl.store(matrix + cell, value.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(
    vector,  # [width // columns_each]
    width, PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, columns_each=1,
):  # fmt: skip
    """A vector over the columns as a tuple of parts: float32 [1, BLOCK_WIDTH], which lie as rows do."""
    parts = ()
    for part in tl.static_range(PARTS):
        column = (part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH))[None, :]
        parts += (tl.load(vector + column // columns_each, mask=column < width, other=0).to(tl.float32),)
    return parts


@triton.jit
def store_zeros(
    out,  # [rows, width]
    place,  # [rows] or None
    first, last, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    instead=None,  # [rows, width] or None
    instead_stride=0,
):  # fmt: skip
    """Zeros into this program's share of the rows from ``first`` to ``last`` of a contiguous matrix.

    With places only into rows that have none. Instead of zeros there may be the rows of another matrix.
    """
    zeros = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=out.dtype.element_ty)
    tile = first + tl.program_id(0) * BLOCK_ROWS
    while tile < last:
        row = tile + tl.arange(0, BLOCK_ROWS)
        idle = row < last
        if place is not None:
            idle = tl.load(place + row, mask=idle, other=0) < 0
        part = 0
        while part * BLOCK_WIDTH < width:
            value = zeros
            if instead is not None:
                value = load_rows(instead, instead_stride, row, idle, width, part, BLOCK_WIDTH)
            store_rows(out, row, idle, width, value, part, BLOCK_WIDTH)
            part += 1
        tile += tl.num_programs(0) * BLOCK_ROWS


@triton.jit(do_not_specialize=["entries"], do_not_specialize_on_alignment=["row_index", "offsets"])
def row_places_kernel(
    row_index,  # [entries]
    place,  # [rows]
    offsets,  # [modalities + 1] or None
    modalities, entries, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = entry < row_extent(offsets, modalities, entries)
    tl.store(place + tl.load(row_index + entry, mask=live, other=0), entry, mask=live)


def row_places(row_index: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    """The inverse of a row index: each of so many rows' place in it, -1 for those that it leaves out; int32 [rows].

    Entries past the last of ``offsets`` do not count.
    """
    place = torch.full((rows,), -1, dtype=torch.int32, device=row_index.device)
    entries = row_index.shape[0]
    modalities = 0 if offsets is None else offsets.shape[0] - 1
    arguments = {
        "row_index": row_index, "place": place, "offsets": offsets, "modalities": modalities, "entries": entries,
    }  # fmt: skip
    if entries:
        launch(row_places_kernel, (cdiv(entries, BLOCK_INDEX),), arguments, {"BLOCK": BLOCK_INDEX}, num_warps=4)
    return place
