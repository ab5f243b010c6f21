"""Gradients of vectors that all rows share: a program's sums over its rows, and their sum in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import Parameters, cdiv, launch
from onepeace_fast.kernels.rows import row_extent, rows_of_norm, rows_per_program

BLOCK_PROGRAMS, BLOCK_COLUMNS = 32, 128


@triton.jit
def zero_sums(PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Where a program adds up: a tuple of [BLOCK_ROWS, BLOCK_WIDTH], one for each part of the columns."""
    parts = ()
    for _part in tl.static_range(PARTS):
        parts += (tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32),)
    return parts


@triton.jit
def store_sums(
    sums,  # [width]
    parts, width, PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Store this program's sums over its rows, a tuple of [BLOCK_ROWS, BLOCK_WIDTH], each summed over the block."""
    for part in tl.static_range(PARTS):
        column = (part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH))[None, :]
        tl.store(sums + column, tl.sum(parts[part], 0, keep_dims=True), mask=column < width)


@triton.jit
def column_sums(
    partial,  # [rows, width]
    first, last, width, column, BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
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
def store_of_modality(
    outs,  # of each modality [width]
    modality, column, total, mask,
):  # fmt: skip
    """Into the vector of a modality out of a tuple, in its own dtype."""
    for i in tl.static_range(len(outs)):
        if modality == i:
            tl.store(outs[i] + column, total.to(outs[i].dtype.element_ty), mask=mask)


@triton.jit
def _sum_vector(
    partial,  # [programs, width]
    out,  # [width]
    first, last, width, BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = column_sums(partial, first, last, width, column, BLOCK_PROGRAMS, BLOCK_COLUMNS)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["rows", "norm", "programs"], do_not_specialize_on_alignment=["offsets"])
def partial_sums_kernel(
    partial_0,  # [norms, programs, width]
    partial_1,  # [norms, programs, width] or None
    partial_2,  # [norms, programs, width] or None
    out_0,  # [width]
    out_1,  # [width] or None
    out_2,  # [width] or None
    offsets,  # [norms * modalities_per_norm + 1] or None
    rows, width, norm, norms, modalities_per_norm, programs,
    BLOCK_ROWS: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    extent = row_extent(offsets, norms * modalities_per_norm, rows)
    share = rows_per_program(extent, programs, BLOCK_ROWS)
    start, stop = rows_of_norm(offsets, norm, modalities_per_norm, 0, extent)
    first = start // share
    last = tl.where(start < stop, tl.cdiv(stop, share), first)  # programs that had rows of the norm
    before = norm.to(tl.int64) * programs * width
    vector = tl.program_id(1)
    if vector == 0:
        _sum_vector(partial_0 + before, out_0, first, last, width, BLOCK_PROGRAMS, BLOCK_COLUMNS)
    if partial_1 is not None:  # noqa: SIM102, decided when compiled
        if vector == 1:
            _sum_vector(partial_1 + before, out_1, first, last, width, BLOCK_PROGRAMS, BLOCK_COLUMNS)
    if partial_2 is not None:  # noqa: SIM102, decided when compiled
        if vector == 2:
            _sum_vector(partial_2 + before, out_2, first, last, width, BLOCK_PROGRAMS, BLOCK_COLUMNS)


def new_partials(norms: int, programs: int, like: Tensor) -> Tensor:
    """float32 [norms, programs, width] for the sums of every program."""
    return torch.empty((norms, programs, like.shape[1]), dtype=torch.float32, device=like.device)


def sum_partials(
    sums: Sequence[tuple[Tensor, Tensor]],
    offsets: Tensor | None,
    rows: int,
    norm: int,
    norms: int,
    parameters: Parameters,
) -> None:
    """Sum up to three float32 [norms, programs, width] into vectors [width], those of one norm.

    ``sums`` are pairs of what is summed and where the result goes. ``parameters`` are those of the kernel that left the
    partial sums; a program that had no row of the norm has left none.
    """
    partials, outs = zip(*sums, strict=True)
    _, programs, width = partials[0].shape
    arguments = {
        **{f"partial_{i}": partials[i] if i < len(partials) else None for i in range(3)},
        **{f"out_{i}": outs[i] if i < len(outs) else None for i in range(3)},
        "offsets": offsets, "rows": rows, "width": width, "norm": norm, "norms": norms,
        "modalities_per_norm": 0 if offsets is None else (offsets.shape[0] - 1) // norms, "programs": programs,
    }  # fmt: skip
    constants = {
        "BLOCK_ROWS": parameters.block_rows, "BLOCK_PROGRAMS": BLOCK_PROGRAMS, "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }  # fmt: skip
    launch(partial_sums_kernel, (cdiv(width, BLOCK_COLUMNS), len(sums)), arguments, constants, num_warps=4)


def new_where_needed(vectors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradient of each vector that needs one."""
    return [vector.new_empty(vector.shape) if need else None for vector, need in zip(vectors, needs, strict=True)]


def sum_by_norm(
    partials: Sequence[Tensor | None], gradients: Sequence[Sequence[Tensor | None]], norms: int,
    offsets: Tensor | None, rows: int, parameters: Parameters,
) -> None:  # fmt: skip
    """Sum each of ``partials`` into its gradients, one for each norm that needs one."""
    for norm in range(norms):
        pairs = [(partial, mine[norm]) for partial, mine in zip(partials, gradients, strict=True) if mine]
        if wanted := [(partial, gradient) for partial, gradient in pairs if gradient is not None]:
            sum_partials(wanted, offsets, rows, norm, norms, parameters)


def with_unused(vectors: Sequence[Tensor | None], width: int, like: Tensor) -> tuple[Tensor, ...]:
    """The vectors, and for frozen ones a vector like them that nobody reads: freezing one compiles nothing."""
    unused = None if all([vector is not None for vector in vectors]) else like.new_empty(width)
    return tuple([unused if vector is None else vector for vector in vectors])
