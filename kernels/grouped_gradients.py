"""The gradients of linear layers of each modality by products, all in one launch: dx = dy W and dW = dy^T x.

A launch ends with a wave of tiles that fills the GPU in part only. One launch for all these products has one such wave:
`make kernels` prints what that comes to. The longest tiles come first: those of dx, and of weights by their rows.

Behind a Sub-LayerNorm of weight g and bias b, with Ghat = dy^T hhat of the normalised rows:

    dW = Ghat g + db (x) b,  dg = colsum(W * Ghat),  db' = W^T db    (db' of the bias b; db = sum dy)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.grouped_gemm import (
    add_x_w,
    add_xt_y,
    bit_mask,
    column_pieces,
    contiguous_for_descriptors,
    for_descriptors,
    launch_tiles,
    matrix,
    modality_keys,
    next_modality,
    of_modality,
    row_stride,
    tiles_for,
    vectors,
    walk_rows,
    walk_tiles,
)
from onepeace_fast.kernels.launch import compact
from onepeace_fast.kernels.rows import row_extent, store_zeros


class NormedLayer(NamedTuple):
    """Of a layer behind a Sub-LayerNorm: its parameters, and room for the sums of dg and db' over each row of tiles."""

    weight: Sequence[Tensor]  # [M, N] of each modality
    norm_weight: Sequence[Tensor]  # [N]
    norm_bias: Sequence[Tensor]  # [N]
    bias_gradient: Tensor  # float32 [modalities, M]
    norm_weight_sums: Tensor  # float32 [modalities * row tiles, N]
    norm_bias_sums: Tensor  # float32 [modalities * row tiles, N]


class WeightGradient(NamedTuple):
    """dW = dy^T x of one layer over the rows of each modality, where it is not None."""

    dy: Tensor  # [rows, M]
    x: Tensor  # [rows, N]
    outs: Sequence[Tensor | None]  # [M, N] of each modality
    norm: NormedLayer | None = None


@triton.jit
def _dx_tensors(
    given, modality, stop, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    """Descriptors of a modality's rows of dx, of each dy, and of each weight."""
    dx, dys, weights, inner, columns, dy_stride, modalities = given
    tensors = (matrix(dx, stop, columns, columns, BLOCK_ROWS, BLOCK_COLUMNS),)
    for i in tl.static_range(len(dys)):
        weight = of_modality(weights, i * modalities + modality)
        tensors += (
            matrix(dys[i], stop, inner, dy_stride, BLOCK_ROWS, BLOCK_INNER),
            matrix(weight, inner, columns, columns, BLOCK_INNER, BLOCK_COLUMNS),
        )
    return tensors


@triton.jit
def _dx_tile(
    given, tensors, row, column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for i in tl.static_range(1, len(tensors), 2):
        total = add_x_w(total, tensors[i], tensors[i + 1], row, column, given[3], BLOCK_INNER)
    tensors[0].store([row, column], total.to(given[0].dtype.element_ty))


@triton.jit
def _dw_tile(
    given, tensors, row, column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    start, stop = given
    dy, x, out = tensors
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    total = add_xt_y(total, dy, x, row, column, start, stop, BLOCK_INNER)
    out.store([row, column], total.to(out.dtype))


@triton.jit
def _normed_dw_tile(
    given, tensors, row, column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    """Also what the tile adds to the gradients of the norm's weight and bias."""
    start, stop, modality, rows, columns, _pieces = given
    dy, x, out, weight, gain, offset, bias_gradient, gain_sums, offset_sums = tensors
    PIECES: tl.constexpr = given[5]
    PIECE_COLUMNS: tl.constexpr = BLOCK_COLUMNS // PIECES
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    total = add_xt_y(total, dy, x, row, column, start, stop, BLOCK_INNER)
    tile_rows = row + tl.arange(0, BLOCK_ROWS)
    row_sum = tl.load(bias_gradient + modality * rows + tile_rows, mask=tile_rows < rows, other=0)[:, None]
    pieces = column_pieces(total, PIECES)
    for piece in tl.static_range(PIECES):
        at = column + piece * PIECE_COLUMNS + tl.arange(0, PIECE_COLUMNS)
        inside = at < columns
        mask = (tile_rows < rows)[:, None] & inside[None, :]
        cell = tile_rows.to(tl.int64)[:, None] * columns + at[None, :]
        scale = tl.load(gain + at, mask=inside, other=0).to(tl.float32)[None, :]
        shift = tl.load(offset + at, mask=inside, other=0).to(tl.float32)[None, :]
        gradient = pieces[piece] * scale + row_sum * shift
        tl.store(out + cell, gradient.to(out.dtype.element_ty), mask=mask)
        w = tl.load(weight + cell, mask=mask, other=0).to(tl.float32)
        partial = (modality * tl.cdiv(rows, BLOCK_ROWS) + row // BLOCK_ROWS) * columns + at
        tl.store(gain_sums + partial, tl.sum(w * pieces[piece], 0), mask=inside)
        tl.store(offset_sums + partial, tl.sum(w * row_sum, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "needed", "output_needed"], do_not_specialize_on_alignment=["offsets"])
def grouped_gradients_kernel(
    dys,  # one or two [rows, inner]
    weights,  # of each dy, of each modality [inner, columns]
    dx,  # [rows, columns] or None
    x,  # [rows, columns]
    dweights,  # of each dy, of each modality [inner, columns]
    output_dy,  # [rows, columns] or None
    output_x,  # [rows, inner]
    output_dweights,  # of each modality [columns, inner]
    output_weights,  # of each modality [columns, inner]
    norm_weight,  # of each modality [inner], or None
    norm_bias,  # of each modality [inner]
    bias_gradient,  # [MODALITIES, columns]
    norm_weight_sums,  # [MODALITIES * row tiles, inner]
    norm_bias_sums,  # [MODALITIES * row tiles, inner]
    offsets,  # [MODALITIES + 1]
    rows, needed, output_needed, inner, columns, dy_stride, x_stride, output_dy_stride, output_x_stride,
    MODALITIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ROW_TILES_AT_ONCE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    before = 0
    if dx is not None:
        tile, before = walk_rows(
            offsets, rows, columns, (dx, dys, weights, inner, columns, dy_stride, MODALITIES), _dx_tensors, _dx_tile,
            MODALITIES, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, ROW_TILES_AT_ONCE,
        )  # fmt: skip
    keys, previous = modality_keys(offsets, rows, needed | output_needed, MODALITIES)
    for _rank in range(MODALITIES):
        previous, modality, start, stop = next_modality(keys, previous, offsets, MODALITIES)
        bit = tl.where(previous >= 0, tl.full((), 1, tl.int64) << modality.to(tl.int64), 0)
        row_tiles, column_tiles = tl.cdiv(inner, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
        for which in range(len(dys)):
            end = before + tl.where(needed & bit != 0, row_tiles * column_tiles, 0)
            if tile < end:
                tensors = (
                    matrix(of_modality(dys, which), stop, inner, dy_stride, BLOCK_INNER, BLOCK_ROWS),
                    matrix(x, stop, columns, x_stride, BLOCK_INNER, BLOCK_COLUMNS),
                    matrix(
                        of_modality(dweights, which * MODALITIES + modality), inner, columns, columns, BLOCK_ROWS,
                        BLOCK_COLUMNS,
                    ),
                )  # fmt: skip
                tile = walk_tiles(
                    tile, before, row_tiles, column_tiles, 0, (start, stop), tensors, _dw_tile, BLOCK_ROWS,
                    BLOCK_COLUMNS, BLOCK_INNER, ROW_TILES_AT_ONCE,
                )  # fmt: skip
            before = end
        if output_dy is not None:
            row_tiles, column_tiles = tl.cdiv(columns, BLOCK_ROWS), tl.cdiv(inner, BLOCK_COLUMNS)
            end = before + tl.where(output_needed & bit != 0, row_tiles * column_tiles, 0)
            if tile < end:
                left = matrix(output_dy, stop, columns, output_dy_stride, BLOCK_INNER, BLOCK_ROWS)
                right = matrix(output_x, stop, inner, output_x_stride, BLOCK_INNER, BLOCK_COLUMNS)
                out = of_modality(output_dweights, modality)
                if norm_weight is not None:
                    tile = walk_tiles(
                        tile, before, row_tiles, column_tiles, 0, (start, stop, modality, columns, inner, PIECES),
                        (left, right, out, of_modality(output_weights, modality), of_modality(norm_weight, modality),
                         of_modality(norm_bias, modality), bias_gradient, norm_weight_sums, norm_bias_sums),
                        _normed_dw_tile, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, ROW_TILES_AT_ONCE,
                    )  # fmt: skip
                else:
                    out_rows = matrix(out, columns, inner, inner, BLOCK_ROWS, BLOCK_COLUMNS)
                    tile = walk_tiles(
                        tile, before, row_tiles, column_tiles, 0, (start, stop), (left, right, out_rows), _dw_tile,
                        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, ROW_TILES_AT_ONCE,
                    )  # fmt: skip
            before = end
    if dx is not None:
        store_zeros(dx, None, row_extent(offsets, MODALITIES, rows), rows, columns, 32, BLOCK_COLUMNS)


def gradients(
    layers: Sequence[WeightGradient], weights: Sequence[Sequence[Tensor]] | None, output: WeightGradient | None,
    offsets: Tensor,
) -> Tensor | None:  # fmt: skip
    """Store dW of one or two layers of the same x, and of another behind them; return dx of the former.

    dx is the sum of dy W over ``layers``, zero past the last offset; None where there are no ``weights``, one of each
    layer and modality. The gradient of a weight without rows is zeros.
    """
    dys, x = tuple([for_descriptors(layer.dy) for layer in layers]), for_descriptors(layers[0].x)
    rows, inner, columns, modalities = x.shape[0], dys[0].shape[1], x.shape[1], len(layers[0].outs)
    needed, dweights = _stored([layer.outs for layer in layers], x, (inner, columns))
    output_needed, output_dweights = _stored([output.outs] if output else [], x, (columns, inner))
    if weights is None and not needed and not output_needed:
        return None
    dx = None if weights is None else torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    norm = output.norm if output else None
    output_dy, output_x = (for_descriptors(output.dy), for_descriptors(output.x)) if output else (None, None)
    arguments = {
        "dys": dys, "dx": dx, "x": x, "dweights": dweights, "output_dy": output_dy, "output_x": output_x,
        "weights": tuple([w for mine in weights or () for w in contiguous_for_descriptors(mine)]) or None,
        "output_dweights": output_dweights, "output_weights": norm and contiguous_for_descriptors(norm.weight),
        "norm_weight": norm and vectors(norm.norm_weight), "norm_bias": norm and vectors(norm.norm_bias),
        "bias_gradient": norm and norm.bias_gradient, "norm_weight_sums": norm and norm.norm_weight_sums,
        "norm_bias_sums": norm and norm.norm_bias_sums, "offsets": compact(offsets), "rows": rows,
        "needed": bit_mask(needed), "output_needed": bit_mask(output_needed), "inner": inner, "columns": columns,
        "dy_stride": row_stride(dys[0]), "x_stride": row_stride(x),
        "output_dy_stride": row_stride(output_dy) if output else 0,
        "output_x_stride": row_stride(output_x) if output else 0,
    }  # fmt: skip
    constants = {"MODALITIES": modalities, "PIECES": tiles_for("gradients", x)[0].pieces}
    problems = len(layers) * len(needed) + len(output_needed)
    launch_tiles(
        grouped_gradients_kernel, "gradients", rows + problems * inner, max(inner, columns), problems + modalities,
        arguments, constants,
    )  # fmt: skip
    return dx


def _stored(
    outs: Sequence[Sequence[Tensor | None]], like: Tensor, shape: tuple[int, int]
) -> tuple[list[int], tuple[Tensor, ...] | None]:
    """The modalities that need a gradient, and tensors for all; what nobody reads of theirs goes into a spare one."""
    flat = [out for mine in outs for out in mine]
    needed = [m for m in range(len(flat) // max(len(outs), 1)) if any([mine[m] is not None for mine in outs])]
    spare = None if all([mine[m] is not None for mine in outs for m in needed]) else like.new_empty(shape)
    some = next((out for out in (spare, *flat) if out is not None), like)
    return needed, tuple([some if out is None else out for out in flat]) or None
