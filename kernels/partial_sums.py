"""Gradients of vectors that all rows share: a program's sums over its rows, and their sum in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import Parameters, launch
from onepeace_fast.kernels.rows import group_rows, row_extent, rows_per_program

BLOCK_PROGRAMS, BLOCK_COLUMNS = 32, 128


@triton.jit
def store_sum(sums, value, width, part, BLOCK_WIDTH: tl.constexpr):
    """Store a part of this program's sums over its rows, ``value`` [BLOCK_ROWS, BLOCK_WIDTH] summed."""
    column = (part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH))[None, :]
    tl.store(sums + column, tl.sum(value, 0, keep_dims=True), mask=column < width)


@triton.jit
def add_in_memory(sums, value, width, part, BLOCK_WIDTH: tl.constexpr):
    """Add ``value`` [BLOCK_ROWS, BLOCK_WIDTH], summed, to a part of the sums that this program keeps in memory.

    A barrier must stand between two calls: other threads may read an element than wrote it.
    """
    column = (part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH))[None, :]
    before = tl.load(sums + column, mask=column < width, other=0)
    tl.store(sums + column, before + tl.sum(value, 0, keep_dims=True), mask=column < width)


@triton.jit
def column_sums(partial, first, last, width, column, BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The sum of the rows from ``first`` to ``last`` of a contiguous float32 matrix, in a fixed order."""
    total = tl.zeros((BLOCK_PROGRAMS, BLOCK_COLUMNS), dtype=tl.float32)
    tile = first
    while tile < last:
        program = tile + tl.arange(0, BLOCK_PROGRAMS)
        cell = program.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(partial + cell, mask=(program < last)[:, None] & (column < width)[None, :], other=0)
        tile += BLOCK_PROGRAMS
    return tl.sum(total, 0)


@triton.jit
def _sum_vector(
    partial, out, first, last, width, BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = column_sums(partial, first, last, width, column, BLOCK_PROGRAMS, BLOCK_COLUMNS)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["rows", "group", "programs"], do_not_specialize_on_alignment=["offsets"])
def _sum_partials(
    partial_0, partial_1, partial_2, out_0, out_1, out_2, offsets, rows, width, group, groups, step, programs,
    BLOCK_ROWS: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    extent = row_extent(offsets, groups * step, rows)
    share = rows_per_program(extent, programs, BLOCK_ROWS)
    start, stop = group_rows(offsets, group, step, 0, extent)
    first = start // share
    last = tl.where(start < stop, tl.cdiv(stop, share), first)  # programs that had rows of the group
    before = group.to(tl.int64) * programs * width
    vector = tl.program_id(1)
    if vector == 0:
        _sum_vector(partial_0 + before, out_0, first, last, width, BLOCK_PROGRAMS, BLOCK_COLUMNS)
    if partial_1 is not None:  # noqa: SIM102, decided when compiled
        if vector == 1:
            _sum_vector(partial_1 + before, out_1, first, last, width, BLOCK_PROGRAMS, BLOCK_COLUMNS)
    if partial_2 is not None:  # noqa: SIM102, decided when compiled
        if vector == 2:
            _sum_vector(partial_2 + before, out_2, first, last, width, BLOCK_PROGRAMS, BLOCK_COLUMNS)


def new_partials(groups: int, programs: int, like: Tensor, parameters: Parameters) -> Tensor:
    """float32 [groups, programs, width] for the sums of every program; those kept in memory start at zero."""
    new = torch.zeros if parameters.held_in == "memory" else torch.empty
    return new((groups, programs, like.shape[1]), dtype=torch.float32, device=like.device)


def sum_partials(
    sums: Sequence[tuple[Tensor, Tensor]],
    offsets: Tensor | None,
    rows: int,
    group: int,
    groups: int,
    parameters: Parameters,
) -> None:
    """Sum up to three float32 [groups, programs, width] into vectors [width], those of one group of modalities.

    ``sums`` are pairs of what is summed and where the result goes. ``parameters`` are those of the kernel that left the
    partial sums; a program that had no row of the group has left none.
    """
    partials, outs = zip(*sums, strict=True)
    _, programs, width = partials[0].shape
    arguments = {
        **{f"partial_{i}": partials[i] if i < len(partials) else None for i in range(3)},
        **{f"out_{i}": outs[i] if i < len(outs) else None for i in range(3)},
        "offsets": offsets, "rows": rows, "width": width, "group": group, "groups": groups,
        "step": 0 if offsets is None else (offsets.shape[0] - 1) // groups, "programs": programs,
    }  # fmt: skip
    constants = {
        "BLOCK_ROWS": parameters.block_rows, "BLOCK_PROGRAMS": BLOCK_PROGRAMS, "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }  # fmt: skip
    launch(_sum_partials, (triton.cdiv(width, BLOCK_COLUMNS), len(sums)), arguments, constants, num_warps=4)
