"""The forward pass of the routed FFN by grouped products: the formulas stand in ``onepeace_fast/ops/routed_ffn.py``.

With h = activation(z W0^T) * (z W1^T) and Sub-LayerNorm's weight g and bias b, the norm is folded into the products:

    LayerNorm(h) W2^T + b2 = r (a W2^T + (m - mu) C^T) + e,    a = (h - m) * g,  e = W2 b + b2

(mu, r) are a row's mean and reciprocal deviation, m the means of its part in each tile, C the sums of W2 g over each
tile's columns. So a is no larger than what h deviates by, however far its mean is from zero. The first product stores
a, m and each part's sum of squares about m; the second takes m - mu as more columns of a, and r, e, LayerScale,
DropPath and the residual into its epilogue.

In float16 u v may pass the largest number before it is normalised: there the norm is a kernel of its own between the
products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.activation import activation_and_slope
from onepeace_fast.kernels.gated_sub_ln import gated_sub_ln_forward
from onepeace_fast.kernels.grouped_gemm import (
    add_x_wt,
    column_pieces,
    contiguous_for_descriptors,
    for_descriptors,
    launch_tiles,
    matrix,
    of_modality,
    row_stride,
    tiles_for,
    vectors,
    walk_rows,
)
from onepeace_fast.kernels.launch import cdiv, compact, unit_columns
from onepeace_fast.kernels.routed_ffn_fold import fold, merge_statistics
from onepeace_fast.kernels.rows import row_extent, row_places, store_zeros
from onepeace_fast.kernels.tile_table import norm_is_folded
from onepeace_fast.structures import (
    FeedForwardSettings,
    FeedForwardWeights,
    GatedSubLNInputs,
    RoutedFFNInputs,
    RoutedFFNOutputs,
)


@triton.jit
def _add_both(u, v, x, w0, w1, row, column, inner, GATE: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """u + x W0^T and v + x W1^T for a tile, by one pass over x."""
    for k in range(0, inner, BLOCK_INNER):
        part = x.load([row, k])
        u = tl.dot(part, w0.load([column, k]).T, u, input_precision="ieee")
        if GATE:
            v = tl.dot(part, w1.load([column, k]).T, v, input_precision="ieee")
    return u, v


@triton.jit
def _hidden_tensors(
    given, modality, stop, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    """Descriptors of a modality's rows and weights; that of x stands for those of tensors which are not given."""
    x, w0, w1, u, v, a, _norm_weight, _tile_mean, _tile_squares, _rows, hidden, x_stride = given[0]
    WIDTH: tl.constexpr = given[1]
    PIECE_COLUMNS: tl.constexpr = BLOCK_COLUMNS // given[3]
    x_rows = matrix(x, stop, WIDTH, x_stride, BLOCK_ROWS, BLOCK_INNER)
    gate = matrix(of_modality(w0, modality), hidden, WIDTH, WIDTH, BLOCK_COLUMNS, BLOCK_INNER)
    value = gate
    if w1 is not None:
        value = matrix(of_modality(w1, modality), hidden, WIDTH, WIDTH, BLOCK_COLUMNS, BLOCK_INNER)
    u_rows = x_rows
    v_rows = x_rows
    if u is not None:
        u_rows = matrix(u, stop, hidden, hidden, BLOCK_ROWS, PIECE_COLUMNS)
        if w1 is not None:
            v_rows = matrix(v, stop, hidden, hidden, BLOCK_ROWS, PIECE_COLUMNS)
    a_rows = x_rows
    if a is not None:
        a_rows = matrix(a, stop, hidden, hidden, BLOCK_ROWS, PIECE_COLUMNS)
    return modality, stop, x_rows, gate, value, u_rows, v_rows, a_rows


@triton.jit
def _hidden_tile(
    given, tensors, row, column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    x, _w0, w1, u, _v, a, norm_weight, tile_mean, tile_squares, rows, hidden, _x_stride = given[0]
    modality, stop, x_rows, gate, value, u_rows, v_rows, a_rows = tensors
    GATE: tl.constexpr = w1 is not None
    WIDTH: tl.constexpr = given[1]
    ACTIVATION: tl.constexpr = given[2]
    PIECES: tl.constexpr = given[3]
    PIECE_COLUMNS: tl.constexpr = BLOCK_COLUMNS // PIECES
    u_total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    v_total = u_total
    u_total, v_total = _add_both(u_total, v_total, x_rows, gate, value, row, column, WIDTH, GATE, BLOCK_INNER)
    u_pieces = column_pieces(u_total, PIECES)
    v_pieces = column_pieces(v_total, PIECES)
    h_pieces = ()
    total = tl.zeros((BLOCK_ROWS, PIECE_COLUMNS), dtype=tl.float32)
    for piece in tl.static_range(PIECES):
        # The backward pass computes h from u and v as they are stored: so does this one.
        u_part = u_pieces[piece].to(x.dtype.element_ty)
        v_part = v_pieces[piece].to(x.dtype.element_ty)
        first = column + piece * PIECE_COLUMNS
        if u is not None:
            u_rows.store([row, first], u_part)
            if GATE:
                v_rows.store([row, first], v_part)
        if a is not None:
            h, _ = activation_and_slope(u_part, ACTIVATION)
            if GATE:
                h = h * v_part.to(tl.float32)
            if norm_weight is not None:
                total += h  # past the last column u, v and so h are zero
                h_pieces += (h,)
            else:
                a_rows.store([row, first], h.to(a.dtype.element_ty))
    if norm_weight is not None:
        mean = tl.sum(total, 1) / tl.minimum(hidden - column, BLOCK_COLUMNS).to(tl.float32)
        squares = tl.zeros((BLOCK_ROWS, PIECE_COLUMNS), dtype=tl.float32)
        for piece in tl.static_range(PIECES):
            first = column + piece * PIECE_COLUMNS
            columns = first + tl.arange(0, PIECE_COLUMNS)
            inside = columns < hidden
            centred = tl.where(inside[None, :], h_pieces[piece] - mean[:, None], 0)
            squares += centred * centred
            weight = tl.load(of_modality(norm_weight, modality) + columns, mask=inside, other=0)
            a_rows.store([row, first], (centred * weight.to(tl.float32)[None, :]).to(a.dtype.element_ty))
        tile_rows = row + tl.arange(0, BLOCK_ROWS)
        cell = (column // BLOCK_COLUMNS).to(tl.int64) * rows + tile_rows
        tl.store(tile_mean + cell, mean, mask=tile_rows < stop)
        tl.store(tile_squares + cell, tl.sum(squares, 1), mask=tile_rows < stop)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def routed_ffn_hidden_kernel(
    x,  # [rows, WIDTH]
    w0,  # of each modality [hidden, WIDTH]
    w1,  # of each modality [hidden, WIDTH], or None
    u,  # [rows, hidden] or None
    v,  # [rows, hidden] or None
    a,  # [rows, hidden] or None
    norm_weight,  # of each modality [hidden], or None
    tile_mean,  # [column tiles, rows]
    tile_squares,  # [column tiles, rows]
    offsets,  # [MODALITIES + 1]
    rows, hidden, x_stride,
    WIDTH: tl.constexpr,  # a width that is no constant takes the last of sm_90's registers
    MODALITIES: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, ROW_TILES_AT_ONCE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    walk_rows(
        offsets, rows, hidden,
        ((x, w0, w1, u, v, a, norm_weight, tile_mean, tile_squares, rows, hidden, x_stride), WIDTH, ACTIVATION, PIECES),
        _hidden_tensors, _hidden_tile, MODALITIES, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, ROW_TILES_AT_ONCE,
    )  # fmt: skip


@triton.jit
def _copy_others(
    residual,  # [rows, width]
    out,  # [rows, width]
    place,  # [rows] or None
    extent, rows, width, residual_stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of the stream that the branch does not come back to: out = residual, by all programs together."""
    tile = tl.program_id(0) * BLOCK_ROWS
    while tile < rows:
        row = tile + tl.arange(0, BLOCK_ROWS)
        other = (row >= extent) & (row < rows)
        if place is not None:
            other = tl.load(place + row, mask=row < rows, other=0) < 0
        first = 0
        while first < width:
            column = first + tl.arange(0, BLOCK_COLUMNS)
            mask = other[:, None] & (column < width)[None, :]
            cell = row.to(tl.int64)[:, None] * residual_stride + column[None, :]
            value = tl.load(residual + cell, mask=mask, other=0)
            tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], value, mask=mask)
            first += BLOCK_COLUMNS
        tile += tl.num_programs(0) * BLOCK_ROWS


@triton.jit
def _output_tensors(
    given, modality, stop, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    """Descriptors of a modality's rows and weights; that of ``a`` stands for those of tensors which are not given."""
    a, w2, apart, tile_sums, width, hidden, a_tiles, a_stride, apart_stride = given[0]
    y = given[1][0]
    a_rows = matrix(a, stop, hidden, a_stride, BLOCK_ROWS, BLOCK_INNER)
    weight = matrix(of_modality(w2, modality), width, hidden, hidden, BLOCK_COLUMNS, BLOCK_INNER)
    apart_rows = a_rows
    sums = a_rows
    if apart is not None:
        apart_rows = matrix(apart, stop, a_tiles, apart_stride, BLOCK_ROWS, BLOCK_INNER)
        mine = tile_sums + modality.to(tl.int64) * width * apart_stride
        sums = matrix(mine, width, a_tiles, apart_stride, BLOCK_COLUMNS, BLOCK_INNER)
    y_rows = a_rows
    if y is not None:
        y_rows = matrix(y, stop, width, width, BLOCK_ROWS, BLOCK_COLUMNS // given[2])
    return modality, stop, a_rows, weight, apart_rows, sums, y_rows


@triton.jit
def _output_tile(
    given, tensors, row, column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    _a, _w2, apart, _tile_sums, width, hidden, a_tiles, _a_stride, _apart_stride = given[0]
    y, rstd, e, b2, out, residual, gamma, drop_path, sample, row_index, residual_stride = given[1]
    modality, stop, a_rows, weight, apart_rows, sums, y_rows = tensors
    PIECES: tl.constexpr = given[2]
    PIECE_COLUMNS: tl.constexpr = BLOCK_COLUMNS // PIECES
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    if apart is not None:
        total = add_x_wt(total, apart_rows, sums, row, column, a_tiles, BLOCK_INNER)
    total = add_x_wt(total, a_rows, weight, row, column, hidden, BLOCK_INNER)
    rows_here = row + tl.arange(0, BLOCK_ROWS)
    live = rows_here < stop
    target = rows_here
    if row_index is not None:
        target = tl.load(row_index + rows_here, mask=live, other=0)
    if drop_path is not None:
        entry = tl.load(sample + target, mask=live, other=0)
        factor = tl.load(drop_path + entry, mask=live, other=0).to(tl.float32)
    if apart is not None:
        r = tl.load(rstd + rows_here, mask=live, other=0)
    parts = column_pieces(total, PIECES)
    for piece in tl.static_range(PIECES):
        value = parts[piece]
        first = column + piece * PIECE_COLUMNS
        columns = first + tl.arange(0, PIECE_COLUMNS)
        inside = columns < width
        if apart is not None:
            bias = tl.load(e + modality * width + columns, mask=inside, other=0)
            value = r[:, None] * value + bias[None, :]
        elif b2 is not None:
            bias = tl.load(of_modality(b2, modality) + columns, mask=inside, other=0).to(tl.float32)
            value = value + bias[None, :]
        if y is not None:
            y_rows.store([row, first], value.to(y.dtype.element_ty))
        if out is not None:
            if drop_path is not None:
                value = value * factor[:, None]
            if gamma is not None:
                value = value * tl.load(gamma + columns, mask=inside, other=0).to(tl.float32)[None, :]
            mask = live[:, None] & inside[None, :]
            cell = target.to(tl.int64)[:, None] * residual_stride + columns[None, :]
            value += tl.load(residual + cell, mask=mask, other=0).to(tl.float32)
            cell = target.to(tl.int64)[:, None] * width + columns[None, :]
            tl.store(out + cell, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "stream_rows", "a_tiles"],
    do_not_specialize_on_alignment=["drop_path", "sample", "row_index", "offsets"],
)
def routed_ffn_output_kernel(
    a,  # [rows, hidden]
    w2,  # of each modality [width, hidden]
    apart,  # [rows, column tiles of a] or None
    tile_sums,  # [MODALITIES, width, column tiles of a] or None
    rstd,  # [rows, 1] or None
    e,  # [MODALITIES, width] or None
    b2,  # of each modality [width], or None
    y,  # [rows, width] or None
    out,  # [stream_rows, width] or None
    residual,  # [stream_rows, width] or None
    gamma,  # [width] or None
    drop_path,  # [samples] or None
    sample,  # [stream_rows] or None
    row_index,  # [rows] or None
    place,  # [stream_rows] or None
    offsets,  # [MODALITIES + 1]
    rows, stream_rows, width, hidden, a_tiles, a_stride, apart_stride, residual_stride,
    MODALITIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ROW_TILES_AT_ONCE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    walk_rows(
        offsets, rows, width,
        ((a, w2, apart, tile_sums, width, hidden, a_tiles, a_stride, apart_stride),
         (y, rstd, e, b2, out, residual, gamma, drop_path, sample, row_index, residual_stride), PIECES),
        _output_tensors, _output_tile, MODALITIES, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, ROW_TILES_AT_ONCE,
    )  # fmt: skip
    extent = row_extent(offsets, MODALITIES, rows)
    if out is not None:
        _copy_others(residual, out, place, extent, stream_rows, width, residual_stride, 32, BLOCK_COLUMNS)
    else:
        store_zeros(y, None, extent, rows, width, 32, BLOCK_COLUMNS)


class HiddenRows(NamedTuple):
    """What is stored of h, where it is kept or normed."""

    u: Tensor | None  # [rows, hidden]
    v: Tensor | None  # [rows, hidden]
    a: Tensor | None  # [rows, hidden]
    mean: Tensor | None  # [rows, 1]
    rstd: Tensor | None  # [rows, 1]
    apart: Tensor | None  # the mean of each tile's part above the row's [rows, column tiles]


def hidden(
    z: Tensor, weights: FeedForwardWeights, offsets: Tensor, settings: FeedForwardSettings, *, normed: bool,
    keep_products: bool, keep_a: bool,
) -> HiddenRows:  # fmt: skip
    """Launch ``routed_ffn_hidden_kernel``: u, v and a where they are kept, and what a norm takes where it is normed."""
    z, offsets, (w0, w1, *_) = for_descriptors(z), compact(offsets), weights
    rows, (columns, inner), modalities = z.shape[0], w0[0].shape, len(w0)
    shape = (rows, columns)
    u = z.new_empty(shape) if keep_products else None
    v = z.new_empty(shape) if keep_products and w1 else None
    a = z.new_empty(shape) if keep_a else None
    parameters, _ = tiles_for("routed_ffn_hidden", z)
    tile_mean = tile_squares = None
    if normed:
        tile_mean = z.new_empty((cdiv(columns, parameters.block_columns), rows), dtype=torch.float32)
        tile_squares = torch.empty_like(tile_mean)
    arguments = {
        "x": z, "w0": contiguous_for_descriptors(w0), "w1": contiguous_for_descriptors(w1) or None, "u": u, "v": v,
        "a": a, "norm_weight": vectors(weights.norm_weight) if normed else None, "tile_mean": tile_mean,
        "tile_squares": tile_squares, "offsets": offsets, "rows": rows, "hidden": columns, "x_stride": row_stride(z),
    }  # fmt: skip
    constants = {
        "WIDTH": inner, "MODALITIES": modalities, "ACTIVATION": settings.activation, "PIECES": parameters.pieces,
    }  # fmt: skip
    launch_tiles(routed_ffn_hidden_kernel, "routed_ffn_hidden", rows, columns, modalities, arguments, constants)
    if tile_mean is None or tile_squares is None:
        return HiddenRows(u, v, a, None, None, None)
    tile_columns = parameters.block_columns
    merged = merge_statistics(tile_mean, tile_squares, offsets, settings.eps, columns, tile_columns, z.dtype)
    return HiddenRows(u, v, a, *merged)


def output(
    a: Tensor, given: RoutedFFNInputs, h: HiddenRows, folded: Tensor | None, tile_sums: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Launch ``routed_ffn_output_kernel``: out, and y where it is kept and is not out itself.

    With ``tile_sums`` the norm is folded, else ``a`` is what it gave.
    """
    a, residual, w2 = for_descriptors(a), given.residual, given.weights.w2
    offsets, row_index = compact(given.routing.offsets), compact(given.routing.row_index)
    rows, (columns, inner), modalities = a.shape[0], w2[0].shape, len(w2)
    y = out = place = None
    if residual is None or given.settings.keep_y:
        y = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    if residual is not None:
        residual = unit_columns(residual)
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        place = None if row_index is None else row_places(row_index, offsets, residual.shape[0])
    apart, rstd, e, b2 = None, None, None, vectors(given.weights.b2)
    if tile_sums is not None:
        apart, rstd, (_, e), b2 = h.apart, h.rstd, folded.unbind(), None
    arguments = {
        "a": a, "w2": contiguous_for_descriptors(w2), "apart": apart, "tile_sums": tile_sums, "rstd": rstd, "e": e,
        "b2": b2, "y": y, "out": out, "residual": residual, "gamma": compact(given.gamma),
        "drop_path": compact(given.drop_path.scale),
        "sample": compact(given.drop_path.sample), "row_index": row_index, "place": place, "offsets": offsets,
        "rows": rows, "stream_rows": rows if residual is None else residual.shape[0],
        "width": columns, "hidden": inner, "a_tiles": 0 if apart is None else apart.shape[1],
        "a_stride": row_stride(a), "apart_stride": 0 if apart is None else apart.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
    }  # fmt: skip
    constants = {"MODALITIES": modalities, "PIECES": tiles_for("routed_ffn_output", a)[0].pieces}
    launch_tiles(routed_ffn_output_kernel, "routed_ffn_output", rows, columns, modalities, arguments, constants)
    return (y, None) if out is None else (out, y)


def routed_ffn_forward(given: RoutedFFNInputs) -> RoutedFFNOutputs:
    """The forward pass by grouped products; u and v also where the norm made them and they are not to be kept."""
    z, weights, routing, settings = given.z, given.weights, given.routing, given.settings
    normed = bool(weights.norm_weight)
    folds = normed and norm_is_folded(z.dtype)
    h = hidden(
        z, weights, routing.offsets, settings, normed=folds,
        keep_products=settings.keep_products or folds != normed, keep_a=folds == normed,
    )  # fmt: skip
    a, mean, rstd = h.a, h.mean, h.rstd
    if folds != normed:
        a, mean, rstd = gated_sub_ln_forward(
            GatedSubLNInputs(
                h.u, h.v, weights.norm_weight, weights.norm_bias, routing, settings.activation, settings.eps
            )
        )
    folded = tile_sums = None
    if normed:
        tile_columns = tiles_for("routed_ffn_hidden", z)[0].block_columns if folds else None
        folded, tile_sums = fold(weights, routing.offsets, z.shape[0], tile_columns)
    out, y = output(a, given, h, folded, tile_sums)
    return RoutedFFNOutputs(out, h.u, h.v, y, mean, rstd, folded)
