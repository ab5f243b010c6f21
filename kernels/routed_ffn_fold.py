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
FOLD_ROWS, FOLD_COLUMNS = 4, 512  # of W2, in registers at a time


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def routed_ffn_statistics_kernel(
    tile_mean,  # [column tiles, rows]
    tile_squares,  # [column tiles, rows]
    mean,  # [rows, 1]
    rstd,  # [rows, 1]
    offsets,  # [MODALITIES + 1]
    rows, eps,
    HIDDEN: tl.constexpr,  # so that the tiles' numbers of columns are constants, which take no registers
    MODALITIES: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge tiles' means and sums of squares (Chan, Golub and LeVeque, 1979); inert rows get zeros."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.arange(0, TILES)
    live = row < row_extent(offsets, MODALITIES, rows)
    count = tl.minimum(tl.maximum(HIDDEN - tile * TILE_COLUMNS, 0), TILE_COLUMNS).to(tl.float32)[:, None]
    cell = tile.to(tl.int64)[:, None] * rows + row[None, :]
    mask = (count > 0) & live[None, :]
    means = tl.load(tile_mean + cell, mask=mask, other=0)
    total = tl.sum(means * count, 0) / HIDDEN
    apart = means - total[None, :]
    squares = tl.sum(tl.load(tile_squares + cell, mask=mask, other=0) + count * apart * apart, 0)
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
    offsets,  # [modalities + 1]
    rows, width, hidden,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """c = W2 g and e = W2 b + b2 of every modality that has rows."""
    modality = tl.program_id(1)
    start = tl.load(offsets + modality)
    if start < tl.minimum(tl.load(offsets + modality + 1), rows):
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = row < width
        weight = of_modality(w2, modality)
        gain, shift = of_modality(norm_weight, modality), of_modality(norm_bias, modality)
        c_parts = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        e_parts = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for first in range(0, hidden, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            inside = column < hidden
            cell = row.to(tl.int64)[:, None] * hidden + column[None, :]
            part = tl.load(weight + cell, mask=live[:, None] & inside[None, :], other=0).to(tl.float32)
            c_parts += part * tl.load(gain + column, mask=inside, other=0).to(tl.float32)[None, :]
            e_parts += part * tl.load(shift + column, mask=inside, other=0).to(tl.float32)[None, :]
        total = tl.sum(e_parts, 1)
        if b2 is not None:
            total += tl.load(of_modality(b2, modality) + row, mask=live, other=0).to(tl.float32)
        tl.store(c + modality * width + row, tl.sum(c_parts, 1), mask=live)
        tl.store(e + modality * width + row, total, mask=live)


def merge_statistics(
    tile_mean: Tensor, tile_squares: Tensor, mean: Tensor, rstd: Tensor, offsets: Tensor, eps: float, hidden: int,
    tile_columns: int,
) -> None:  # fmt: skip
    """Launch ``routed_ffn_statistics_kernel``: store mean and rstd, [rows, 1], of [column tiles, rows]."""
    (tiles, rows), modalities = tile_mean.shape, offsets.shape[0] - 1
    arguments = {
        "tile_mean": tile_mean, "tile_squares": tile_squares, "mean": mean, "rstd": rstd, "offsets": offsets,
        "rows": rows, "eps": eps,
    }  # fmt: skip
    constants = {
        "HIDDEN": hidden, "MODALITIES": modalities, "TILE_COLUMNS": tile_columns,
        "TILES": 1 << (tiles - 1).bit_length(), "BLOCK_ROWS": STATISTICS_ROWS,
    }  # fmt: skip
    grid = (max(1, cdiv(rows, STATISTICS_ROWS)),)
    launch(routed_ffn_statistics_kernel, grid, arguments, constants, num_warps=4)


def fold(weights: FeedForwardWeights, offsets: Tensor, rows: int) -> Tensor:
    """Launch ``routed_ffn_fold_kernel``: c and e, float32 [2, modalities, width], zero for modalities without rows."""
    w2 = weights.w2
    (width, hidden_columns), modalities = w2[0].shape, len(w2)
    folded = torch.zeros((2, modalities, width), dtype=torch.float32, device=w2[0].device)
    c, e = folded.unbind()
    arguments = {
        "w2": contiguous_for_descriptors(w2), "norm_weight": vectors(weights.norm_weight),
        "norm_bias": vectors(weights.norm_bias), "b2": vectors(weights.b2), "c": c, "e": e,
        "offsets": compact(offsets), "rows": rows, "width": width, "hidden": hidden_columns,
    }  # fmt: skip
    constants = {"BLOCK_ROWS": FOLD_ROWS, "BLOCK_COLUMNS": FOLD_COLUMNS}
    launch(routed_ffn_fold_kernel, (cdiv(width, FOLD_ROWS), modalities), arguments, constants, num_warps=4)
    return folded
