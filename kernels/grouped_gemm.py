"""Matrix products of every modality's rows with its own weight, in one persistent launch.

A launch has a fixed number of programs. The tiles of all modalities stand in one order, modalities with most rows
first, and program p computes tiles p, p + programs, ...; no tile straddles two modalities, and one without rows costs
nothing. Offsets are read on the device. Descriptors (TMA from sm_90 on) end at a modality's last row, as loads and as
stores and along a reduction over rows: nothing of a neighbour is read, not even to be masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import architecture_and_multiprocessors, cdiv, compact, launch
from onepeace_fast.kernels.rows import row_extent, store_zeros
from onepeace_fast.kernels.tile_table import MAX_MODALITIES, TileParameters, tiles_of

SLOTS = tl.constexpr(MAX_MODALITIES)
DESCRIPTOR_ALIGNMENT = 16  # bytes, of a matrix's first element and of the distance of its rows


@triton.jit
def modality_keys(
    offsets,  # [MODALITIES + 1]
    rows, needed, MODALITIES: tl.constexpr,
):  # fmt: skip
    """A number for each modality, larger where it has more rows, -1 where it is not ``needed``; and one above all.

    Of ``needed`` each modality has a bit: freezing one changes no constant, and compiles nothing. None: all are.
    """
    modality = tl.arange(0, SLOTS)
    inside = modality < MODALITIES
    start = tl.minimum(tl.load(offsets + modality, mask=inside, other=0), rows)
    stop = tl.minimum(tl.load(offsets + modality + 1, mask=inside, other=0), rows)
    key = tl.maximum(stop - start, 0).to(tl.int64) * MODALITIES + (MODALITIES - 1 - modality)
    if needed is not None:
        inside = inside & ((needed.to(tl.int64) >> modality.to(tl.int64)) & 1 != 0)
    keys = tl.where(inside, key, -1)
    return keys, tl.max(keys, 0) + 1


@triton.jit
def next_modality(
    keys, previous,
    offsets,  # [MODALITIES + 1]
    MODALITIES: tl.constexpr,
):  # fmt: skip
    """The modality with most rows among those whose key is below ``previous``: its key, number, first and last row.

    After the last one that is needed the key is -1, and there are no rows.
    """
    key = tl.max(tl.where(keys < previous, keys, -1), 0)
    known = tl.maximum(key, 0)
    modality = (MODALITIES - 1 - known % MODALITIES).to(tl.int32)
    start = tl.load(offsets + modality)
    return key, modality, start, start + (known // MODALITIES).to(tl.int32)


@triton.jit
def tile_place(tile, row_tiles, column_tiles, ROW_TILES_AT_ONCE: tl.constexpr):
    """Row and column of a tile, by tiles: bands of ROW_TILES_AT_ONCE rows, each walked column by column."""
    band = tile // (ROW_TILES_AT_ONCE * column_tiles)
    first = band * ROW_TILES_AT_ONCE
    height = tl.minimum(row_tiles - first, ROW_TILES_AT_ONCE)
    within = tile - first * column_tiles
    return first + within % height, within // height


@triton.jit
def of_modality(tensors, modality):
    """The pointer of a modality out of a tuple: no table of pointers is copied to the device."""
    pointer = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        pointer = tl.where(modality == i, tensors[i], pointer)
    return pointer


@triton.jit
def _halves(x):
    """Left and right columns of a tile."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def column_pieces(x, PIECES: tl.constexpr):
    """A power of two of pieces of a tile's columns, from left to right, as a tuple."""
    pieces = (x,)
    for _halving in tl.static_range(PIECES):
        if len(pieces) < PIECES:
            halved = ()
            for i in tl.static_range(len(pieces)):
                halved += _halves(pieces[i])
            pieces = halved
    return pieces


@triton.jit
def matrix(
    pointer,  # [rows, columns]
    rows, columns, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The descriptor of a matrix whose columns lie side by side; past its last row and column are zeros.

    A modality that nothing stands before has no row at all if it is empty: what a descriptor of no rows does is not
    specified, so it has one, which nobody loads or stores.
    """
    return tl.make_tensor_descriptor(pointer, [tl.maximum(rows, 1), columns], [stride, 1], [BLOCK_ROWS, BLOCK_COLUMNS])


@triton.jit
def add_x_wt(accumulator, x, w, row, column, inner, BLOCK_INNER: tl.constexpr):
    """accumulator + x W^T for a tile; descriptors of x [rows, inner] and W [columns, inner]."""
    for k in range(0, inner, BLOCK_INNER):
        accumulator = tl.dot(x.load([row, k]), w.load([column, k]).T, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def add_x_w(accumulator, x, w, row, column, inner, BLOCK_INNER: tl.constexpr):
    """accumulator + x W for a tile; descriptors of x [rows, inner] and W [inner, columns]."""
    for k in range(0, inner, BLOCK_INNER):
        accumulator = tl.dot(x.load([row, k]), w.load([k, column]), accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def add_xt_y(accumulator, x, y, row, column, start, stop, BLOCK_INNER: tl.constexpr):
    """accumulator + x^T y over the rows from ``start`` to ``stop``, in this order; descriptors that end at ``stop``."""
    for k in range(start, stop, BLOCK_INNER):
        accumulator = tl.dot(x.load([k, row]).T, y.load([k, column]), accumulator, input_precision="ieee")
    return accumulator


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def grouped_gemm_input_gradient_kernel(
    x_0,  # [rows, inner]
    x_1,  # [rows, inner] or None
    weights_0,  # of each modality [inner, columns]
    weights_1,  # of each modality [inner, columns], or None
    out,  # [rows, columns]
    offsets,  # [MODALITIES + 1]
    rows, inner, columns, x_0_stride, x_1_stride,
    MODALITIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ROW_TILES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    keys, previous = modality_keys(offsets, rows, None, MODALITIES)
    tile = tl.program_id(0)
    before = 0
    for _rank in range(MODALITIES):
        previous, modality, start, stop = next_modality(keys, previous, offsets, MODALITIES)
        row_tiles = tl.cdiv(stop - start, BLOCK_ROWS)
        end = before + row_tiles * column_tiles
        if tile < end:
            x_rows = matrix(x_0, stop, inner, x_0_stride, BLOCK_ROWS, BLOCK_INNER)
            weight = matrix(of_modality(weights_0, modality), inner, columns, columns, BLOCK_INNER, BLOCK_COLUMNS)
            if x_1 is not None:
                x_1_rows = matrix(x_1, stop, inner, x_1_stride, BLOCK_ROWS, BLOCK_INNER)
                weight_1 = matrix(of_modality(weights_1, modality), inner, columns, columns, BLOCK_INNER, BLOCK_COLUMNS)
            out_rows = matrix(out, stop, columns, columns, BLOCK_ROWS, BLOCK_COLUMNS)
            while tile < end:
                row_tile, column_tile = tile_place(tile - before, row_tiles, column_tiles, ROW_TILES_AT_ONCE)
                row, column = start + row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
                total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
                total = add_x_w(total, x_rows, weight, row, column, inner, BLOCK_INNER)
                if x_1 is not None:
                    total = add_x_w(total, x_1_rows, weight_1, row, column, inner, BLOCK_INNER)
                out_rows.store([row, column], total.to(out.dtype.element_ty))
                tile += tl.num_programs(0)
        before = end
    store_zeros(out, None, row_extent(offsets, MODALITIES, rows), rows, columns, 32, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=["rows", "needed"], do_not_specialize_on_alignment=["offsets"])
def grouped_gemm_weight_gradient_kernel(
    xs,  # one or two [rows, x_columns]
    y,  # [rows, y_columns]
    outs,  # of each x, of each modality [x_columns, y_columns]
    offsets,  # [MODALITIES + 1]
    rows, needed, x_columns, y_columns, x_stride, y_stride,
    MODALITIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ROW_TILES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(x_columns, BLOCK_ROWS)
    column_tiles = tl.cdiv(y_columns, BLOCK_COLUMNS)
    keys, previous = modality_keys(offsets, rows, needed, MODALITIES)
    tile = tl.program_id(0)
    before = 0
    for _rank in range(MODALITIES):
        previous, modality, start, stop = next_modality(keys, previous, offsets, MODALITIES)
        for which in range(len(xs)):
            end = before + tl.where(previous >= 0, row_tiles * column_tiles, 0)
            if tile < end:
                # Out here: Triton 3.6 compiles no descriptor that is made within a ``while``.
                x_rows = matrix(of_modality(xs, which), stop, x_columns, x_stride, BLOCK_INNER, BLOCK_ROWS)
                y_rows = matrix(y, stop, y_columns, y_stride, BLOCK_INNER, BLOCK_COLUMNS)
                mine = of_modality(outs, which * MODALITIES + modality)
                out = matrix(mine, x_columns, y_columns, y_columns, BLOCK_ROWS, BLOCK_COLUMNS)
                while tile < end:
                    row_tile, column_tile = tile_place(tile - before, row_tiles, column_tiles, ROW_TILES_AT_ONCE)
                    row, column = row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
                    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
                    total = add_xt_y(total, x_rows, y_rows, row, column, start, stop, BLOCK_INNER)
                    out.store([row, column], total.to(outs[0].dtype.element_ty))
                    tile += tl.num_programs(0)
            before = end


def launch_tiles(
    kernel: Any, entry: str, rows: int, columns: int, modalities: int, arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> None:  # fmt: skip
    """Launch a kernel of products with the tiles of its entry in the table.

    ``rows`` and ``columns`` are those of all results together, in so many modalities that begin a tile each.
    """
    parameters, multiprocessors = tiles_for(entry, arguments["offsets"])
    tiles = (rows // parameters.block_rows + modalities) * cdiv(columns, parameters.block_columns)
    programs = max(1, min(tiles, multiprocessors * parameters.programs_per_multiprocessor))
    launch(
        kernel, (programs,), arguments, {**constants, **parameters.constants}, parameters.num_warps,
        num_stages=parameters.num_stages,
    )  # fmt: skip


def tiles_for(entry: str, like: Tensor) -> tuple[TileParameters, int]:
    """The tiles of an entry on the tensor's device, and how many multiprocessors that has."""
    architecture, multiprocessors = architecture_and_multiprocessors(like.device)
    return tiles_of(entry, architecture), multiprocessors


def for_descriptors(x: Tensor) -> Tensor:
    """``x`` itself where a descriptor can take it as it lies, else a copy that it can.

    The widths are checked by the op: the rows of the copy lie 16 bytes apart, or a multiple of that.
    """
    stride = row_stride(x)
    # An expanded row, at a distance of 0, is no matrix to a descriptor.
    lies_well = x.stride(1) == 1 and stride >= x.shape[1] and stride * x.element_size() % DESCRIPTOR_ALIGNMENT == 0
    if lies_well and x.data_ptr() % DESCRIPTOR_ALIGNMENT == 0:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def row_stride(x: Tensor) -> int:
    """The distance of a matrix's rows; that of a single row is anything in PyTorch."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def contiguous_for_descriptors(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The weights of all modalities, each with its rows side by side; a copy of those that are not."""
    return tuple([
        w if w.is_contiguous() and not w.data_ptr() % DESCRIPTOR_ALIGNMENT else for_descriptors(w.contiguous())
        for w in weights
    ])  # fmt: skip


def vectors(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Vectors of all modalities, of one dtype and compact; None where there are none."""
    if not tensors:
        return None
    first = tensors[0].dtype
    same = all([tensor.dtype == first for tensor in tensors])
    return tuple([(tensor if same else tensor.float()).contiguous() for tensor in tensors])


def input_gradient(pairs: Sequence[tuple[Tensor, Sequence[Tensor]]], offsets: Tensor) -> Tensor:
    """The sum of x W over one or two pairs of x [rows, K] and weights [K, N], one of each modality: [rows, N].

    Rows past the last offset are zero.
    """
    xs = [for_descriptors(x) for x, _ in pairs]
    weights = [contiguous_for_descriptors(w) for _, w in pairs]
    rows, (inner, columns), modalities = xs[0].shape[0], weights[0][0].shape, len(weights[0])
    out = torch.empty((rows, columns), dtype=xs[0].dtype, device=xs[0].device)
    both = len(pairs) > 1
    arguments = {
        "x_0": xs[0], "x_1": xs[1] if both else None,
        "weights_0": weights[0], "weights_1": weights[1] if both else None,
        "out": out, "offsets": compact(offsets), "rows": rows, "inner": inner, "columns": columns,
        "x_0_stride": row_stride(xs[0]), "x_1_stride": row_stride(xs[-1]),
    }  # fmt: skip
    launch_tiles(
        grouped_gemm_input_gradient_kernel, "input_gradient", rows, columns, modalities, arguments,
        {"MODALITIES": modalities},
    )  # fmt: skip
    return out


def weight_gradient(xs: Sequence[Tensor], y: Tensor, offsets: Tensor, outs: Sequence[Sequence[Tensor | None]]) -> None:
    """Store x^T y over each modality's rows, each x [rows, N] and y [rows, K], into its tensor [N, K] of x's ``outs``.

    All x lie alike. A modality for which no x has a tensor is left out; one without rows gets zeros.
    """
    modalities = len(outs[0])
    needed = [modality for modality in range(modalities) if any([mine[modality] is not None for mine in outs])]
    if not needed:
        return
    xs, y = tuple([for_descriptors(x) for x in xs]), for_descriptors(y)
    flat = [out for mine in outs for out in mine]
    shape = (xs[0].shape[1], y.shape[1])
    unused = None if all([mine[modality] is not None for mine in outs for modality in needed]) else y.new_empty(shape)
    some = next(out for out in (unused, *flat) if out is not None)
    arguments = {
        "xs": xs, "y": y, "outs": tuple([some if out is None else out for out in flat]), "offsets": compact(offsets),
        "rows": y.shape[0], "needed": bit_mask(needed), "x_columns": shape[0], "y_columns": shape[1],
        "x_stride": row_stride(xs[0]), "y_stride": row_stride(y),
    }  # fmt: skip
    problems, constants = len(xs) * len(needed), {"MODALITIES": modalities}
    launch_tiles(
        grouped_gemm_weight_gradient_kernel, "weight_gradient", problems * shape[0], shape[1], problems, arguments,
        constants,
    )  # fmt: skip


def bit_mask(needed: Sequence[int]) -> int:
    """The bits of these modalities."""
    return sum(1 << modality for modality in needed)
