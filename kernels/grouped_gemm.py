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

from onepeace_fast.kernels.launch import architecture_and_multiprocessors, cdiv, launch
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


@triton.jit
def walk_tiles(
    tile, before, row_tiles, column_tiles, start, given, tensors, compute: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, ROW_TILES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Compute this program's tiles of a result that ``before`` tiles come before; returns its first one behind it.

    ``compute`` is a function of ``given``, ``tensors``, a tile's first row and column, and its sizes. The rows of the
    result begin at ``start``.
    """
    end = before + row_tiles * column_tiles
    # No ``tl.range(flatten=True)``, which would load a tile's first operands while the one before is stored: with two
    # accumulators, or several walks in a kernel, ptxas then waits for every wgmma, and sm_100 stores by two buffers.
    while tile < end:
        row_tile, column_tile = tile_place(tile - before, row_tiles, column_tiles, ROW_TILES_AT_ONCE)
        row, column = start + row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
        compute(given, tensors, row, column, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER)
        tile += tl.num_programs(0)
    return tile


@triton.jit
def walk_rows(
    offsets,  # [MODALITIES + 1]
    rows, columns, given, begin: tl.constexpr, compute: tl.constexpr, MODALITIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, ROW_TILES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Compute this program's tiles of a result [rows, columns], modality by modality.

    What ``begin`` returns for a modality, a function of ``given``, its number, the end of its rows and the sizes, are
    the ``tensors`` of its tiles, descriptors among them, which are made once for all. Constants and None are in
    ``given``, since Triton 3.6 returns neither from a function; a constant is read by its index, since unpacked it is
    a value. Returns the program's next tile and the number of all.
    """
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    keys, previous = modality_keys(offsets, rows, None, MODALITIES)
    tile = tl.program_id(0)
    before = 0
    for _rank in range(MODALITIES):
        previous, modality, start, stop = next_modality(keys, previous, offsets, MODALITIES)
        row_tiles = tl.cdiv(stop - start, BLOCK_ROWS)
        end = before + row_tiles * column_tiles
        if tile < end:
            tensors = begin(given, modality, stop, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER)
            tile = walk_tiles(
                tile, before, row_tiles, column_tiles, start, given, tensors, compute, BLOCK_ROWS, BLOCK_COLUMNS,
                BLOCK_INNER, ROW_TILES_AT_ONCE,
            )  # fmt: skip
        before = end
    return tile, before


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


def bit_mask(needed: Sequence[int]) -> int:
    """The bits of these modalities."""
    return sum(1 << modality for modality in needed)
