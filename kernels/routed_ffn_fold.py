"""What the routed FFN's folded Sub-LayerNorm needs beside its products: the formulas stand in ``routed_ffn.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.grouped_gemm import contiguous_for_descriptors, of_modality, vectors
from onepeace_fast.kernels.launch import cdiv, compact, launch
from onepeace_fast.kernels.rows import row_extent
from onepeace_fast.structures import FeedForwardWeights

STATISTICS_ROWS = 32  # of one program that merges statistics
FOLD_ROWS, FOLD_COLUMNS = 4, 512  # of W2, in registers at a time: whole tiles of columns
ROW_MULTIPLE = 16  # of numbers of tiles: descriptors can read such rows, and any number of tiles compiles the same


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def routed_ffn_statistics_kernel(
    tile_mean,  # [column tiles, rows]
    tile_squares,  # [column tiles, rows]
    mean,  # [rows, 1]
    rstd,  # [rows, 1]
    apart,  # [rows, column tiles]
    offsets,  # [MODALITIES + 1]
    rows, eps, apart_stride,
    HIDDEN: tl.constexpr,  # so that the tiles' numbers of columns are constants, which take no registers
    MODALITIES: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge tiles' means and sums of squares (Chan, Golub and LeVeque, 1979); inert rows get zeros.

    How far each tile's mean is above the row's is what the output product takes beside a.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.arange(0, TILES)
    live = row < row_extent(offsets, MODALITIES, rows)
    count = tl.minimum(tl.maximum(HIDDEN - tile * TILE_COLUMNS, 0), TILE_COLUMNS).to(tl.float32)[:, None]
    cell = tile.to(tl.int64)[:, None] * rows + row[None, :]
    mask = (count > 0) & live[None, :]
    means = tl.load(tile_mean + cell, mask=mask, other=0)
    total = tl.sum(means * count, 0) / HIDDEN
    above = means - total[None, :]
    squares = tl.sum(tl.load(tile_squares + cell, mask=mask, other=0) + count * above * above, 0)
    column = row.to(tl.int64)[None, :] * apart_stride + tile[:, None]
    tl.store(apart + column, above.to(apart.dtype.element_ty), mask=mask)
    tl.store(mean + row, tl.where(live, total, 0), mask=row < rows)
    tl.store(rstd + row, tl.where(live, tl.rsqrt(squares / HIDDEN + eps), 0), mask=row < rows)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def routed_ffn_fold_kernel(
    w2,  # of each modality [width, hidden]
    norm_weight,  # of each modality [hidden]
    norm_bias,  # of each modality [hidden]
    b2,  # of each modality [width], or None
    c,  # [modalities, width]
    e,  # [modalities, width]
    tile_sums,  # [modalities, width, column tiles] or None
    offsets,  # [modalities + 1]
    rows, width, hidden, sums_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """c = W2 g, its sum over each tile of columns, and e = W2 b + b2 of every modality that has rows."""
    TILES: tl.constexpr = BLOCK_COLUMNS // TILE_COLUMNS
    modality = tl.program_id(1)
    start = tl.load(offsets + modality)
    if start < tl.minimum(tl.load(offsets + modality + 1), rows):
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = row < width
        weight = of_modality(w2, modality)
        gain, shift = of_modality(norm_weight, modality), of_modality(norm_bias, modality)
        c_total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        e_parts = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for first in range(0, hidden, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            inside = column < hidden
            cell = row.to(tl.int64)[:, None] * hidden + column[None, :]
            part = tl.load(weight + cell, mask=live[:, None] & inside[None, :], other=0).to(tl.float32)
            scaled = part * tl.load(gain + column, mask=inside, other=0).to(tl.float32)[None, :]
            sums = tl.sum(tl.reshape(scaled, (BLOCK_ROWS, TILES, TILE_COLUMNS)), 2)
            c_total += tl.sum(sums, 1)
            if tile_sums is not None:
                tile = first // TILE_COLUMNS + tl.arange(0, TILES)
                cell = (modality.to(tl.int64) * width + row)[:, None] * sums_stride + tile[None, :]
                mask = live[:, None] & (tile * TILE_COLUMNS < hidden)[None, :]
                tl.store(tile_sums + cell, sums.to(tile_sums.dtype.element_ty), mask=mask)
            e_parts += part * tl.load(shift + column, mask=inside, other=0).to(tl.float32)[None, :]
        total = tl.sum(e_parts, 1)
        if b2 is not None:
            total += tl.load(of_modality(b2, modality) + row, mask=live, other=0).to(tl.float32)
        tl.store(c + modality * width + row, c_total, mask=live)
        tl.store(e + modality * width + row, total, mask=live)


def merge_statistics(
    tile_mean: Tensor, tile_squares: Tensor, offsets: Tensor, eps: float, hidden: int, tile_columns: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch ``routed_ffn_statistics_kernel`` on [column tiles, rows]: mean and rstd [rows, 1], apart [rows, tiles]."""
    (tiles, rows), modalities = tile_mean.shape, offsets.shape[0] - 1
    mean, rstd = (tile_mean.new_empty((rows, 1)) for _ in range(2))
    apart = _for_tiles((rows, tiles), dtype, tile_mean.device)
    arguments = {
        "tile_mean": tile_mean, "tile_squares": tile_squares, "mean": mean, "rstd": rstd, "apart": apart,
        "offsets": offsets, "rows": rows, "eps": eps, "apart_stride": apart.stride(0),
    }  # fmt: skip
    constants = {
        "HIDDEN": hidden, "MODALITIES": modalities, "TILE_COLUMNS": tile_columns,
        "TILES": 1 << (tiles - 1).bit_length(), "BLOCK_ROWS": STATISTICS_ROWS,
    }  # fmt: skip
    grid = (max(1, cdiv(rows, STATISTICS_ROWS)),)
    launch(routed_ffn_statistics_kernel, grid, arguments, constants, num_warps=4)
    return mean, rstd, apart


def _for_tiles(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for a number for each tile of columns."""
    *others, tiles = shape
    return torch.empty((*others, cdiv(tiles, ROW_MULTIPLE) * ROW_MULTIPLE), dtype=dtype, device=device)[..., :tiles]


def fold(
    weights: FeedForwardWeights, offsets: Tensor, rows: int, tile_columns: int | None
) -> tuple[Tensor, Tensor | None]:
    """Launch ``routed_ffn_fold_kernel``: c and e, float32 [2, modalities, width], zero for modalities without rows.

    With the columns of a tile also each tile's sums, [modalities, width, column tiles] like W2.
    """
    w2 = weights.w2
    (width, hidden_columns), modalities = w2[0].shape, len(w2)
    folded = torch.zeros((2, modalities, width), dtype=torch.float32, device=w2[0].device)
    c, e = folded.unbind()
    tile_sums = None
    if tile_columns is not None:
        tile_sums = _for_tiles((modalities, width, cdiv(hidden_columns, tile_columns)), w2[0].dtype, w2[0].device)
    arguments = {
        "w2": contiguous_for_descriptors(w2), "norm_weight": vectors(weights.norm_weight),
        "norm_bias": vectors(weights.norm_bias), "b2": vectors(weights.b2), "c": c, "e": e, "tile_sums": tile_sums,
        "offsets": compact(offsets), "rows": rows, "width": width, "hidden": hidden_columns,
        "sums_stride": 0 if tile_sums is None else tile_sums.stride(1),
    }  # fmt: skip
    constants = {
        "BLOCK_ROWS": FOLD_ROWS, "BLOCK_COLUMNS": FOLD_COLUMNS, "TILE_COLUMNS": tile_columns or FOLD_COLUMNS,
    }  # fmt: skip
    launch(routed_ffn_fold_kernel, (cdiv(width, FOLD_ROWS), modalities), arguments, constants, num_warps=4)
    return folded, tile_sums
