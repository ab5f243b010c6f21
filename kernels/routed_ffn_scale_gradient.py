"""The gradient that comes into the routed FFN, scaled for its products, and the sums over its rows.

One kernel stores dy, each row's m1 and m2 for its norm, and each tile's part of db2 and dgamma; another adds these up.
The formulas stand in ``routed_ffn_backward.py``. The rows of a tile belong to one modality.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import cdiv, compact, launch, unit_columns
from onepeace_fast.kernels.partial_sums import (
    BLOCK_COLUMNS,
    BLOCK_PROGRAMS,
    column_sums,
    store_of_modality,
    with_unused,
)
from onepeace_fast.structures import RoutedFFNSaved

BLOCK_ROWS, NUM_WARPS = 32, 8


@triton.jit
def _row_tile(
    offsets,  # [modalities + 1]
    tile, modalities, rows, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Modality, first row and end of a tile of rows that does not straddle modalities; no rows past the last tile."""
    modality = -1
    start = 0
    stop = 0
    while (modality < modalities - 1) & (start >= stop):
        modality += 1
        first = tl.load(offsets + modality)
        stop = tl.minimum(tl.load(offsets + modality + 1), rows)
        start = first + tile * BLOCK_ROWS
        tile -= tl.cdiv(stop - first, BLOCK_ROWS)
    return modality, start, stop


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["drop_path", "sample", "row_index", "offsets"])
def routed_ffn_scale_gradient_kernel(
    grad,  # [rows of the stream, width]
    y,  # [rows, width] or None
    dy,  # [rows, width] or None
    m1,  # [rows] or None
    m2,  # [rows] or None
    db2,  # [row tiles, width] or None
    dgamma,  # [row tiles, width] or None
    gamma,  # [width] or None
    drop_path,  # [samples] or None
    sample,  # [rows of the stream] or None
    row_index,  # [rows] or None
    c,  # [modalities, width] or None
    e,  # [modalities, width] or None
    offsets,  # [modalities + 1]
    rows, width, hidden, grad_stride, y_stride, modalities,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    modality, start, stop = _row_tile(offsets, tile, modalities, rows, BLOCK_ROWS)
    if start < stop:
        row = start + tl.arange(0, BLOCK_ROWS)
        live = row < stop
        stream_row = row
        if row_index is not None:
            stream_row = tl.load(row_index + row, mask=live, other=0)
        factor = tl.where(live, 1.0, 0.0)
        if drop_path is not None:
            entry = tl.load(sample + stream_row, mask=live, other=0)
            factor = tl.load(drop_path + entry, mask=live, other=0).to(tl.float32)
        c_total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        y_total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        vector = modality.to(tl.int64) * width
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
def routed_ffn_sum_row_tiles_kernel(
    db2,  # [row tiles, width] or None
    dgamma,  # [row tiles, width] or None
    totals,  # [MODALITIES, width] or None
    b2_gradients,  # of each modality [width], or empty
    gamma_gradient,  # [width] or None
    offsets,  # [MODALITIES + 1]
    rows, width,
    MODALITIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < width
    mine = tl.program_id(1)
    first = 0
    last = 0
    modality = 0
    while (modality < MODALITIES) & (modality <= mine):
        start = tl.load(offsets + modality)
        stop = tl.minimum(tl.load(offsets + modality + 1), rows)
        first = last
        last += tl.cdiv(tl.maximum(stop - start, 0), BLOCK_ROWS)
        modality += 1
    if mine < MODALITIES:
        if db2 is not None:
            total = column_sums(db2, first, last, width, column, BLOCK_TILES, BLOCK_COLUMNS)
            tl.store(totals + mine * width + column, total, mask=inside)
            store_of_modality(b2_gradients, mine, column, total, inside)
    else:
        if dgamma is not None:
            total = column_sums(dgamma, 0, last, width, column, BLOCK_TILES, BLOCK_COLUMNS)
            tl.store(gamma_gradient + column, total.to(gamma_gradient.dtype.element_ty), mask=inside)


def scaled_gradient(
    saved: RoutedFFNSaved, sums_needed: bool, b2_gradients: Sequence[Tensor | None], gamma_gradient: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dy [rows, width] like z, m1 and m2 [rows] where a norm is folded, and db2 float32 [modalities, width].

    Stores db2 and dgamma into what is given for them. A gradient that nothing scales is dy itself.
    """
    like, offsets, row_index = saved.z, compact(saved.routing.offsets), saved.routing.row_index
    (rows, width), modalities = like.shape, offsets.shape[0] - 1
    grad, gamma, (drop_path, sample) = unit_columns(saved.grad_out), saved.gamma, saved.drop_path
    c, e = (None, None) if saved.folded is None else saved.folded.unbind()
    scaled = gamma is not None or drop_path is not None or row_index is not None or grad.dtype != like.dtype
    dy = torch.empty((rows, width), dtype=like.dtype, device=like.device) if scaled else None
    m1 = m2 = None
    if c is not None:
        m1, m2 = like.new_empty(rows, dtype=torch.float32), like.new_empty(rows, dtype=torch.float32)
    totals = like.new_empty((modalities, width), dtype=torch.float32) if sums_needed else None
    tiles = rows // BLOCK_ROWS + modalities
    db2 = like.new_empty((tiles, width), dtype=torch.float32) if sums_needed else None
    dgamma = None if gamma_gradient is None else like.new_empty((tiles, width), dtype=torch.float32)
    shared = {"db2": db2, "dgamma": dgamma, "offsets": offsets, "rows": rows, "width": width}
    if scaled or c is not None or sums_needed:
        y = unit_columns(saved.y) if c is not None or dgamma is not None else None
        arguments = {
            "grad": grad, "y": y, "dy": dy, "m1": m1, "m2": m2, "gamma": compact(gamma),
            "drop_path": compact(drop_path), "sample": compact(sample), "row_index": compact(row_index), "c": c,
            "e": e, "hidden": saved.weights.w2[0].shape[1], "grad_stride": grad.stride(0),
            "y_stride": 0 if y is None else y.stride(0), "modalities": modalities, **shared,
        }  # fmt: skip
        constants = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
        launch(routed_ffn_scale_gradient_kernel, (tiles,), arguments, constants, NUM_WARPS)
    if db2 is not None or dgamma is not None:
        arguments = {
            **shared, "totals": totals, "b2_gradients": with_unused(b2_gradients, width, like),
            "gamma_gradient": gamma_gradient,
        }  # fmt: skip
        constants = {
            "MODALITIES": modalities, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_TILES": BLOCK_PROGRAMS,
            "BLOCK_COLUMNS": BLOCK_COLUMNS,
        }  # fmt: skip
        grid = (cdiv(width, BLOCK_COLUMNS), modalities + 1)
        launch(routed_ffn_sum_row_tiles_kernel, grid, arguments, constants, num_warps=4)
    return grad if dy is None else dy, m1, m2, totals


def modality_sums(dy: Tensor, offsets: Tensor, sums: Sequence[Tensor | None]) -> None:
    """Store the sum of each modality's rows of dy [rows, width] into its vector [width], where there is one."""
    dy, offsets = unit_columns(dy), compact(offsets)
    (rows, width), modalities = dy.shape, offsets.shape[0] - 1
    tiles = rows // BLOCK_ROWS + modalities
    partial = dy.new_empty((tiles, width), dtype=torch.float32)
    unused = dict.fromkeys(("y", "dy", "m1", "m2", "dgamma", "gamma", "drop_path", "sample", "row_index", "c", "e"))
    arguments = {
        "grad": dy, **unused, "db2": partial, "offsets": offsets, "rows": rows, "width": width, "hidden": 1,
        "grad_stride": dy.stride(0), "y_stride": 0, "modalities": modalities,
    }  # fmt: skip
    constants = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    launch(routed_ffn_scale_gradient_kernel, (tiles,), arguments, constants, NUM_WARPS)
    arguments = {
        "db2": partial, "dgamma": None, "totals": dy.new_empty((modalities, width), dtype=torch.float32),
        "b2_gradients": with_unused(sums, width, dy), "gamma_gradient": None, "offsets": offsets, "rows": rows,
        "width": width,
    }  # fmt: skip
    constants = {
        "MODALITIES": modalities, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_TILES": BLOCK_PROGRAMS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }  # fmt: skip
    launch(routed_ffn_sum_row_tiles_kernel, (cdiv(width, BLOCK_COLUMNS), modalities), arguments, constants, num_warps=4)
