"""The gradients of W2 and of Sub-LayerNorm's weight g and bias b, from Ghat = dy^T hhat of the normalised rows.

    dW2 = Ghat g + db2 (x) b,  dg = colsum(W2 * Ghat),  db = W2^T db2

Where Ghat is a product of the vendor's, one pass over it does the rest, and dW2 takes its place. The sums over tiles of
W2's rows are added up in a fixed order, also those that ``grouped_gradients.py`` leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import cdiv, launch
from onepeace_fast.kernels.partial_sums import (
    BLOCK_COLUMNS,
    BLOCK_PROGRAMS,
    column_sums,
    store_of_modality,
    with_unused,
)
from onepeace_fast.structures import FeedForwardWeights

BLOCK_ROWS, NUM_WARPS = 32, 4


@triton.jit
def routed_ffn_norm_gradient_kernel(
    ghat,  # [width, hidden]
    dw2,  # [width, hidden], ghat itself
    w2,  # [width, hidden]
    norm_weight,  # [hidden]
    norm_bias,  # [hidden]
    db2,  # [width]
    dweight,  # [row tiles, hidden]
    dbias,  # [row tiles, hidden]
    width, hidden,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < hidden
    mask = (row < width)[:, None] & inside[None, :]
    cell = row.to(tl.int64)[:, None] * hidden + column[None, :]
    row_sum = tl.load(db2 + row, mask=row < width, other=0)[:, None]
    gradient = tl.load(ghat + cell, mask=mask, other=0).to(tl.float32)
    w = tl.load(w2 + cell, mask=mask, other=0).to(tl.float32)
    scale = tl.load(norm_weight + column, mask=inside, other=0).to(tl.float32)[None, :]
    shift = tl.load(norm_bias + column, mask=inside, other=0).to(tl.float32)[None, :]
    tl.store(dw2 + cell, (gradient * scale + row_sum * shift).to(dw2.dtype.element_ty), mask=mask)
    partial = tile.to(tl.int64) * hidden + column
    tl.store(dweight + partial, tl.sum(w * gradient, 0), mask=inside)
    tl.store(dbias + partial, tl.sum(w * row_sum, 0), mask=inside)


@triton.jit
def routed_ffn_sum_norm_tiles_kernel(
    dweight,  # [modalities * row_tiles, width]
    dbias,  # [modalities * row_tiles, width]
    weight_gradients,  # of each modality [width]
    bias_gradients,  # of each modality [width]
    row_tiles, width,
    BLOCK_TILES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    modality = tl.program_id(1)
    first = modality * row_tiles
    last = first + row_tiles
    if tl.program_id(2) == 0:
        total = column_sums(dweight, first, last, width, column, BLOCK_TILES, BLOCK_COLUMNS)
        store_of_modality(weight_gradients, modality, column, total, column < width)
    else:
        total = column_sums(dbias, first, last, width, column, BLOCK_TILES, BLOCK_COLUMNS)
        store_of_modality(bias_gradients, modality, column, total, column < width)


def any_given(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one of them is not None."""
    return any([tensor is not None for tensor in tensors])


def norm_gradients(
    ghat: Sequence[Tensor | None], weights: FeedForwardWeights, db2: Tensor, gradients: FeedForwardWeights
) -> None:
    """Turn each modality's ghat [width, hidden] into its dW2; store dg and db where ``gradients`` has room for them.

    ``db2`` is float32 [modalities, width]. A modality that needs none of these gradients has no ghat.
    """
    width, hidden = weights.w2[0].shape
    row_tiles, modalities = cdiv(width, BLOCK_ROWS), len(weights.w2)
    sums = torch.empty((2, modalities, row_tiles, hidden), dtype=torch.float32, device=db2.device)
    for m, mine in enumerate(ghat):
        if mine is not None:
            arguments = {
                "ghat": mine, "dw2": mine, "w2": weights.w2[m].contiguous(),
                "norm_weight": weights.norm_weight[m].contiguous(), "norm_bias": weights.norm_bias[m].contiguous(),
                "db2": db2[m], "dweight": sums[0, m], "dbias": sums[1, m], "width": width, "hidden": hidden,
            }  # fmt: skip
            constants = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
            grid = (cdiv(hidden, BLOCK_COLUMNS), row_tiles)
            launch(routed_ffn_norm_gradient_kernel, grid, arguments, constants, NUM_WARPS)
    sum_norm_tiles(*sums.flatten(1, 2).unbind(), gradients, weights)


def sum_norm_tiles(dweight: Tensor, dbias: Tensor, gradients: FeedForwardWeights, weights: FeedForwardWeights) -> None:
    """Store the sums over each modality's row tiles, [modalities * row tiles, hidden], where they are needed."""
    if not (any_given(gradients.norm_weight) or any_given(gradients.norm_bias)):
        return
    hidden, modalities = dweight.shape[1], len(weights.norm_weight)
    arguments = {
        "dweight": dweight, "dbias": dbias, "row_tiles": dweight.shape[0] // modalities, "width": hidden,
        "weight_gradients": with_unused(gradients.norm_weight, hidden, weights.norm_weight[0]),
        "bias_gradients": with_unused(gradients.norm_bias, hidden, weights.norm_bias[0]),
    }  # fmt: skip
    constants = {"BLOCK_TILES": BLOCK_PROGRAMS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    grid = (cdiv(hidden, BLOCK_COLUMNS), modalities, 2)
    launch(routed_ffn_sum_norm_tiles_kernel, grid, arguments, constants, num_warps=4)
