"""The backward pass of the routed feed-forward network on grouped products.

With dy = grad * keep * gamma, the folded Sub-LayerNorm's c = gl W2 and e = bl W2 + b2, and hhat = (h - mu) r:

    m1 = dy c / f,  m2 = dy (y - e) / f,  db2 = sum dy,  dgamma = sum grad * keep * y           rows of the stream, once
    dh = r (gl (dy W2) - m1 - hhat m2),  du = dh v act'(u),  dv = dh act(u),  and hhat itself   a product's epilogue
    Ghat = dy^T hhat:  dW2 = Ghat gl + db2 (x) bl,  dgl = colsum(W2 * Ghat),  dbl = W2^T db2    a product's epilogue
    dW0 = du^T z,  dW1 = dv^T z,  dz = du W0 + dv W1

Without Sub-LayerNorm dh = dy W2, and h takes hhat's place. No sum depends on which program comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.activation import activation_and_slope
from onepeace_fast.kernels.grouped_gemm import (
    add_x_w,
    add_xt_y,
    bit_mask,
    column_pieces,
    contiguous_for_descriptors,
    expert,
    for_descriptors,
    group_keys,
    input_gradient,
    launch_tiles,
    matrix,
    next_group,
    row_stride,
    tile_place,
    tiles_for,
    vectors,
    weight_gradient,
)
from onepeace_fast.kernels.launch import compact, launch, unit_columns
from onepeace_fast.kernels.partial_sums import BLOCK_COLUMNS, BLOCK_PROGRAMS, column_sums

BLOCK_ROWS, NUM_WARPS = 32, 8  # of the pass over rows


@triton.jit
def _store_own(outs, group, column, total, mask):
    """Into the vector of a modality out of a tuple, in its own dtype."""
    for g in tl.static_range(len(outs)):
        if group == g:
            tl.store(outs[g] + column, total.to(outs[g].dtype.element_ty), mask=mask)


@triton.jit
def _row_tile(offsets, tile, groups, rows, BLOCK_ROWS: tl.constexpr):
    """Modality, first row and end of a tile of rows that does not straddle modalities; no rows past the last tile."""
    group = -1
    start = 0
    stop = 0
    while (group < groups - 1) & (start >= stop):
        group += 1
        first = tl.load(offsets + group)
        stop = tl.minimum(tl.load(offsets + group + 1), rows)
        start = first + tile * BLOCK_ROWS
        tile -= tl.cdiv(stop - first, BLOCK_ROWS)
    return group, start, stop


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["keep", "sample", "index", "offsets"])
def _scale_gradient(
    grad, y, dy, m1, m2, db2, dgamma, gamma, keep, sample, index, c, e, offsets, rows, width, hidden, grad_stride,
    y_stride, groups,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    group, start, stop = _row_tile(offsets, tile, groups, rows, BLOCK_ROWS)
    if start < stop:
        row = start + tl.arange(0, BLOCK_ROWS)
        live = row < stop
        stream_row = row
        if index is not None:
            stream_row = tl.load(index + row, mask=live, other=0)
        factor = tl.where(live, 1.0, 0.0)
        if keep is not None:
            factor = tl.load(keep + tl.load(sample + stream_row, mask=live, other=0), mask=live, other=0).to(tl.float32)
        c_total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        y_total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        vector = group.to(tl.int64) * width
        partial = tile.to(tl.int64) * width
        first = 0
        while first < width:
            column = first + tl.arange(0, BLOCK_COLUMNS)
            inside = column < width
            mask = live[:, None] & inside[None, :]
            cell = stream_row.to(tl.int64)[:, None] * grad_stride + column[None, :]
            scaled = tl.load(grad + cell, mask=mask, other=0).to(tl.float32) * factor[:, None]
            if y is not None:
                cell = row.to(tl.int64)[:, None] * y_stride + column[None, :]
                value = tl.load(y + cell, mask=mask, other=0).to(tl.float32)
            if dgamma is not None:
                tl.store(dgamma + partial + column, tl.sum(scaled * value, 0), mask=inside)
            if gamma is not None:
                scaled = scaled * tl.load(gamma + column, mask=inside, other=0).to(tl.float32)[None, :]
            if dy is not None:
                rounded = scaled.to(dy.dtype.element_ty)
                cell = row.to(tl.int64)[:, None] * width + column[None, :]
                tl.store(dy + cell, rounded, mask=mask)
                scaled = rounded.to(tl.float32)  # what the products read
            if db2 is not None:
                tl.store(db2 + partial + column, tl.sum(scaled, 0), mask=inside)
            if m1 is not None:
                c_total += scaled * tl.load(c + vector + column, mask=inside, other=0)[None, :]
                y_total += scaled * (value - tl.load(e + vector + column, mask=inside, other=0)[None, :])
            first += BLOCK_COLUMNS
        if m1 is not None:
            tl.store(m1 + row, tl.sum(c_total, 1) / hidden, mask=live)
            tl.store(m2 + row, tl.sum(y_total, 1) / hidden, mask=live)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def _sum_row_tiles(
    db2, dgamma, totals, b2_gradients, gamma_gradient, offsets, rows, width,
    GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < width
    mine = tl.program_id(1)
    first = 0
    last = 0
    group = 0
    while (group < GROUPS) & (group <= mine):
        start = tl.load(offsets + group)
        stop = tl.minimum(tl.load(offsets + group + 1), rows)
        first = last
        last += tl.cdiv(tl.maximum(stop - start, 0), BLOCK_ROWS)
        group += 1
    if mine < GROUPS:
        if db2 is not None:
            total = column_sums(db2, first, last, width, column, BLOCK_TILES, BLOCK_COLUMNS)
            tl.store(totals + mine * width + column, total, mask=inside)
            _store_own(b2_gradients, mine, column, total, inside)
    else:
        if dgamma is not None:
            total = column_sums(dgamma, 0, last, width, column, BLOCK_TILES, BLOCK_COLUMNS)
            tl.store(gamma_gradient + column, total.to(gamma_gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def _hidden_gradient(
    dy, w2, u, v, du, dv, hhat, mean, rstd, m1, m2, norm_weight, offsets, rows, width, hidden, dy_stride,
    GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, ROW_TILES_AT_ONCE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    PIECE_COLUMNS: tl.constexpr = BLOCK_COLUMNS // PIECES
    column_tiles = tl.cdiv(hidden, BLOCK_COLUMNS)
    keys = group_keys(offsets, rows, None, GROUPS)
    previous = tl.max(keys, 0) + 1
    tile = tl.program_id(0)
    before = 0
    for _rank in range(GROUPS):
        previous, group, start, stop = next_group(keys, previous, offsets, GROUPS)
        row_tiles = tl.cdiv(stop - start, BLOCK_ROWS)
        end = before + row_tiles * column_tiles
        if tile < end:
            dy_rows = matrix(dy, stop, width, dy_stride, BLOCK_ROWS, BLOCK_INNER)
            weight = matrix(expert(w2, group), width, hidden, hidden, BLOCK_INNER, BLOCK_COLUMNS)
            while tile < end:
                row_tile, column_tile = tile_place(tile - before, row_tiles, column_tiles, ROW_TILES_AT_ONCE)
                first, column = start + row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
                total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
                total = add_x_w(total, dy_rows, weight, first, column, width, BLOCK_INNER)
                row = first + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                if mean is not None:
                    mu = tl.load(mean + row, mask=live, other=0)[:, None]
                    r = tl.load(rstd + row, mask=live, other=0)[:, None]
                    g_mean = tl.load(m1 + row, mask=live, other=0)[:, None]
                    g_hhat_mean = tl.load(m2 + row, mask=live, other=0)[:, None]
                pieces = column_pieces(total, PIECES)
                for piece in tl.static_range(PIECES):
                    dh = pieces[piece]
                    at = column + piece * PIECE_COLUMNS + tl.arange(0, PIECE_COLUMNS)
                    mask = live[:, None] & (at < hidden)[None, :]
                    cell = row.to(tl.int64)[:, None] * hidden + at[None, :]
                    h, slope = activation_and_slope(tl.load(u + cell, mask=mask, other=0).to(tl.float32), ACTIVATION)
                    activated = h
                    if v is not None:
                        value = tl.load(v + cell, mask=mask, other=0).to(tl.float32)
                        h = h * value
                        slope = slope * value
                    if mean is not None:
                        h = (h - mu) * r
                        scale = tl.load(expert(norm_weight, group) + at, mask=at < hidden, other=0).to(tl.float32)
                        dh = (dh * scale[None, :] - g_mean - h * g_hhat_mean) * r
                    if hhat is not None:
                        tl.store(hhat + cell, h.to(hhat.dtype.element_ty), mask=mask)
                    tl.store(du + cell, (dh * slope).to(du.dtype.element_ty), mask=mask)
                    if dv is not None:
                        tl.store(dv + cell, (dh * activated).to(dv.dtype.element_ty), mask=mask)
                tile += tl.num_programs(0)
        before = end


@triton.jit(do_not_specialize=["rows", "needed"], do_not_specialize_on_alignment=["offsets"])
def _output_weight_gradient(
    dy, hhat, outs, w2, norm_weight, norm_bias, db2, dweight, dbias, offsets, rows, needed, width, hidden,
    dy_stride,
    GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ROW_TILES_AT_ONCE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    PIECE_COLUMNS: tl.constexpr = BLOCK_COLUMNS // PIECES
    row_tiles = tl.cdiv(width, BLOCK_ROWS)
    column_tiles = tl.cdiv(hidden, BLOCK_COLUMNS)
    keys = group_keys(offsets, rows, needed, GROUPS)
    previous = tl.max(keys, 0) + 1
    tile = tl.program_id(0)
    before = 0
    for _rank in range(GROUPS):
        previous, group, start, stop = next_group(keys, previous, offsets, GROUPS)
        end = before + tl.where(previous >= 0, row_tiles * column_tiles, 0)
        if tile < end:
            dy_rows = matrix(dy, stop, width, dy_stride, BLOCK_INNER, BLOCK_ROWS)
            hhat_rows = matrix(hhat, stop, hidden, hidden, BLOCK_INNER, BLOCK_COLUMNS)
            out = expert(outs, group)
            weight, gain, offset = expert(w2, group), expert(norm_weight, group), expert(norm_bias, group)
            while tile < end:
                row_tile, column_tile = tile_place(tile - before, row_tiles, column_tiles, ROW_TILES_AT_ONCE)
                first, column = row_tile * BLOCK_ROWS, column_tile * BLOCK_COLUMNS
                total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
                total = add_xt_y(total, dy_rows, hhat_rows, first, column, start, stop, BLOCK_INNER)
                row = first + tl.arange(0, BLOCK_ROWS)
                row_sum = tl.load(db2 + group * width + row, mask=row < width, other=0)[:, None]
                pieces = column_pieces(total, PIECES)
                for piece in tl.static_range(PIECES):
                    at = column + piece * PIECE_COLUMNS + tl.arange(0, PIECE_COLUMNS)
                    inside = at < hidden
                    mask = (row < width)[:, None] & inside[None, :]
                    cell = row.to(tl.int64)[:, None] * hidden + at[None, :]
                    scale = tl.load(gain + at, mask=inside, other=0).to(tl.float32)[None, :]
                    shift = tl.load(offset + at, mask=inside, other=0).to(tl.float32)[None, :]
                    gradient = pieces[piece] * scale + row_sum * shift
                    tl.store(out + cell, gradient.to(outs[0].dtype.element_ty), mask=mask)
                    w = tl.load(weight + cell, mask=mask, other=0).to(tl.float32)
                    partial = (group * row_tiles + row_tile) * hidden + at
                    tl.store(dweight + partial, tl.sum(w * pieces[piece], 0), mask=inside)
                    tl.store(dbias + partial, tl.sum(w * row_sum, 0), mask=inside)
                tile += tl.num_programs(0)
        before = end


@triton.jit
def _sum_norm_tiles(
    dweight, dbias, weight_gradients, bias_gradients, row_tiles, width,
    BLOCK_TILES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    group = tl.program_id(1)
    first = group * row_tiles
    last = first + row_tiles
    if tl.program_id(2) == 0:
        total = column_sums(dweight, first, last, width, column, BLOCK_TILES, BLOCK_COLUMNS)
        _store_own(weight_gradients, group, column, total, column < width)
    else:
        total = column_sums(dbias, first, last, width, column, BLOCK_TILES, BLOCK_COLUMNS)
        _store_own(bias_gradients, group, column, total, column < width)


def scaled_gradient(
    grad: Tensor, y: Tensor, c: Tensor | None, e: Tensor | None, gamma: Tensor | None, keep: Tensor | None,
    sample: Tensor | None, index: Tensor | None, like: Tensor, hidden: int, offsets: Tensor, sums_needed: bool,
    b2_gradients: Sequence[Tensor | None], gamma_gradient: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dy [rows, width] like z, m1 and m2 [rows] for the rows' norm (where there is c), and db2 float32 [G, width].

    Stores db2 and dgamma into what is given for them. A gradient that nothing scales is dy itself.
    """
    (rows, width), groups = like.shape, offsets.shape[0] - 1
    grad = unit_columns(grad)
    scaled = gamma is not None or keep is not None or index is not None or grad.dtype != like.dtype
    dy = torch.empty((rows, width), dtype=like.dtype, device=like.device) if scaled else None
    m1, m2 = (None if c is None else torch.empty(rows, dtype=torch.float32, device=like.device) for _rank in range(2))
    totals = like.new_empty((groups, width), dtype=torch.float32) if sums_needed else None
    tiles = rows // BLOCK_ROWS + groups
    db2, dgamma = (
        like.new_empty((tiles, width), dtype=torch.float32) if needed else None
        for needed in (sums_needed, gamma_gradient is not None)
    )
    shared = {"db2": db2, "dgamma": dgamma, "offsets": compact(offsets), "rows": rows, "width": width}
    if scaled or c is not None or sums_needed:
        y = unit_columns(y) if c is not None or dgamma is not None else None
        arguments = {
            "grad": grad, "y": y, "dy": dy, "m1": m1, "m2": m2, "gamma": compact(gamma), "keep": compact(keep),
            "sample": compact(sample), "index": compact(index), "c": c, "e": e, "hidden": hidden,
            "grad_stride": grad.stride(0), "y_stride": 0 if y is None else y.stride(0), "groups": groups, **shared,
        }  # fmt: skip
        constants = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
        launch(_scale_gradient, (tiles,), arguments, constants, NUM_WARPS)
    if db2 is not None or dgamma is not None:
        arguments = {
            **shared, "totals": totals, "b2_gradients": _filled(b2_gradients, width, like),
            "gamma_gradient": gamma_gradient,
        }  # fmt: skip
        constants = {
            "GROUPS": groups, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_TILES": BLOCK_PROGRAMS, "BLOCK_COLUMNS": BLOCK_COLUMNS,
        }  # fmt: skip
        grid = (triton.cdiv(width, BLOCK_COLUMNS), groups + 1)
        launch(_sum_row_tiles, grid, arguments, constants, num_warps=4)
    return grad if dy is None else dy, m1, m2, totals


def hidden_gradient(
    dy: Tensor, w2: Sequence[Tensor], u: Tensor, v: Tensor | None, mean: Tensor, rstd: Tensor, m1: Tensor | None,
    m2: Tensor | None, norm_weight: Sequence[Tensor], offsets: Tensor, activation: str, hhat_needed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """du, dv and hhat (h without norm), [rows, hidden]; rows past the last offset are not written."""
    dy, w2, u, v = for_descriptors(dy), contiguous_for_descriptors(w2), u.contiguous(), compact(v)
    rows, (width, hidden) = dy.shape[0], w2[0].shape
    du, dv, hhat = (
        torch.empty((rows, hidden), dtype=u.dtype, device=u.device) if needed else None
        for needed in (True, v is not None, hhat_needed)
    )
    normed = bool(norm_weight)
    arguments = {
        "dy": dy, "w2": w2, "u": u, "v": v, "du": du, "dv": dv, "hhat": hhat, "mean": mean if normed else None,
        "rstd": rstd if normed else None, "m1": m1, "m2": m2, "norm_weight": vectors(norm_weight),
        "offsets": compact(offsets), "rows": rows, "width": width, "hidden": hidden, "dy_stride": row_stride(dy),
    }  # fmt: skip
    entry = "routed_ffn_hidden_gradient"
    constants = {"GROUPS": len(w2), "ACTIVATION": activation, "PIECES": tiles_for(entry, dy)[0].pieces}
    launch_tiles(_hidden_gradient, entry, rows, hidden, len(w2), arguments, constants)
    return du, dv, hhat


def output_weight_gradient(
    dy: Tensor, hhat: Tensor, w2: Sequence[Tensor], norm_weight: Sequence[Tensor], norm_bias: Sequence[Tensor],
    db2: Tensor, offsets: Tensor, outs: Sequence[Tensor | None], weight_gradients: Sequence[Tensor | None],
    bias_gradients: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Store dW2, dgl and dbl of every modality that needs one of them."""
    needed = [m for m, some in enumerate(zip(outs, weight_gradients, bias_gradients, strict=True)) if any_given(some)]
    if not needed:
        return
    dy, w2 = for_descriptors(dy), contiguous_for_descriptors(w2)
    (width, hidden), groups = w2[0].shape, len(w2)
    entry = "routed_ffn_output_gradient"
    tiles, _ = tiles_for(entry, dy)
    row_tiles = triton.cdiv(width, tiles.block_rows)
    dweight, dbias = (dy.new_empty((groups * row_tiles, hidden), dtype=torch.float32) for _rank in range(2))
    unused = None if all(out is not None for out in outs) else torch.empty_like(w2[0])
    arguments = {
        "dy": dy, "hhat": hhat, "outs": tuple(unused if out is None else out for out in outs), "w2": w2,
        "norm_weight": vectors(norm_weight), "norm_bias": vectors(norm_bias), "db2": db2, "dweight": dweight,
        "dbias": dbias, "offsets": compact(offsets), "rows": dy.shape[0], "needed": bit_mask(needed), "width": width,
        "hidden": hidden, "dy_stride": row_stride(dy),
    }  # fmt: skip
    constants = {"GROUPS": groups, "PIECES": tiles.pieces}
    launch_tiles(_output_weight_gradient, entry, len(needed) * width, hidden, len(needed), arguments, constants)
    if any_given(weight_gradients) or any_given(bias_gradients):
        arguments = {
            "dweight": dweight, "dbias": dbias, "weight_gradients": _filled(weight_gradients, hidden, norm_weight[0]),
            "bias_gradients": _filled(bias_gradients, hidden, norm_bias[0]), "row_tiles": row_tiles, "width": hidden,
        }  # fmt: skip
        constants = {"BLOCK_TILES": BLOCK_PROGRAMS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
        launch(_sum_norm_tiles, (triton.cdiv(hidden, BLOCK_COLUMNS), groups, 2), arguments, constants, num_warps=4)


def _filled(vectors: Sequence[Tensor | None], width: int, like: Tensor) -> tuple[Tensor, ...]:
    """The vectors, and for frozen ones a vector like them that nobody reads: freezing one compiles nothing."""
    unused = None if all(vector is not None for vector in vectors) else like.new_empty(width)
    return tuple(unused if vector is None else vector for vector in vectors)


def any_given(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one of them is not None."""
    return any(tensor is not None for tensor in tensors)


def routed_ffn_backward(
    grad: Tensor, z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor], w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor, gamma: Tensor | None,
    keep: Tensor | None, sample: Tensor | None, rows: Tensor | None, u: Tensor, v: Tensor | None, y: Tensor,
    mean: Tensor, rstd: Tensor, folded: Tensor, activation: str, needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """What ``routed_ffn_backward_specification`` returns, by grouped products."""
    lists = (w0, w1, norm_weight, norm_bias, w2, b2)
    flags = iter(needs)
    gradients = [[torch.empty_like(p, memory_format=torch.contiguous_format) if next(flags) else None for p in group]
                 for group in lists]  # fmt: skip
    dw0, dw1, dnorm_weight, dnorm_bias, dw2, db2 = gradients
    dgamma = torch.empty_like(gamma, memory_format=torch.contiguous_format) if next(flags) else None
    hidden, normed = w2[0].shape[1], bool(norm_weight)
    c, e = folded if normed else (None, None)
    hhat_needed = any_given((*dw2, *dnorm_weight, *dnorm_bias))
    sums_needed = any_given(db2) or (normed and hhat_needed)
    dy, m1, m2, row_sums = scaled_gradient(
        grad, y, c, e, gamma, keep, sample, rows, z, hidden, offsets, sums_needed, db2, dgamma
    )
    du, dv, hhat = hidden_gradient(
        dy, w2, u, v, mean, rstd, m1, m2, norm_weight, offsets, activation, hhat_needed
    )  # fmt: skip
    if normed:
        output_weight_gradient(
            dy, hhat, w2, norm_weight, norm_bias, row_sums, offsets, dw2, dnorm_weight, dnorm_bias
        )  # fmt: skip
    elif hhat_needed:
        weight_gradient([dy], hhat, offsets, [dw2])
    both = [(du, w0, dw0)] if dv is None else [(du, w0, dw0), (dv, w1, dw1)]
    weight_gradient([x for x, _, _ in both], z, offsets, [out for _, _, out in both])
    dz = input_gradient([(x, w) for x, w, _ in both], offsets)
    nothing = z.new_empty(0)
    flat = [nothing if gradient is None else gradient for group in gradients for gradient in group]
    return dz, flat, nothing if dgamma is None else dgamma
