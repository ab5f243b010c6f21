"""LayerNorm of packed rows, forward: the formulas stand in ``onepeace_fast/ops/layer_norm.py``.

A row is in registers as a whole, so it is read once and written once; statistics are float32. A program keeps the
parameters of a modality in registers while it walks over its rows of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import launch, parameters_for, unit_columns
from onepeace_fast.kernels.rows import group_rows, row_extent, rows_per_program, store_zeros


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, y, mean, rstd, weight, bias, offsets, rows, width, x_stride, groups, step, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    extent = row_extent(offsets, groups * step, rows)
    share = rows_per_program(extent, tl.num_programs(0), BLOCK_ROWS)
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, extent)
    group = 0
    while group < groups:
        tile, stop = group_rows(offsets, group, step, first, last)
        if tile < stop:
            if weight is not None:
                w = tl.load(weight + group * width + column, mask=inside, other=0).to(tl.float32)
            if bias is not None:
                b = tl.load(bias + group * width + column, mask=inside, other=0).to(tl.float32)
            while tile < stop:
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                mask = live[:, None] & inside[None, :]
                row64 = row.to(tl.int64)[:, None]
                value = tl.load(x + row64 * x_stride + column[None, :], mask=mask, other=0).to(tl.float32)
                mu = tl.sum(value, 1) / width
                centred = tl.where(inside[None, :], value - mu[:, None], 0)
                r = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
                result = centred * r[:, None]
                if weight is not None:
                    result = result * w[None, :]
                if bias is not None:
                    result = result + b[None, :]
                tl.store(y + row64 * width + column[None, :], result.to(y.dtype.element_ty), mask=mask)
                tl.store(mean + row, mu, mask=live)
                tl.store(rstd + row, r, mask=live)
                tile += BLOCK_ROWS
        group += 1
    if offsets is not None:
        store_zeros(y, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
        store_zeros(mean, extent, rows, 1, BLOCK_ROWS, 1)
        store_zeros(rstd, extent, rows, 1, BLOCK_ROWS, 1)


def stacked(vectors: Sequence[Tensor]) -> Tensor | None:
    """One contiguous [groups, width] tensor of the vectors of all modalities, None without any."""
    if not vectors:
        return None
    return vectors[0].contiguous()[None] if len(vectors) == 1 else torch.stack(list(vectors))


def layer_norm(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], offsets: Tensor | None, row_counts: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch ``_forward``: what ``layer_norm_specification`` returns."""
    x = unit_columns(x)
    rows, width = x.shape
    groups = max(len(weights), len(biases), 1)
    step = 1 if offsets is None else (offsets.shape[0] - 1) // groups
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((rows, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    parameters, programs = parameters_for("layer_norm", x, rows)
    arguments = {
        "x": x, "y": y, "mean": mean, "rstd": rstd, "weight": stacked(weights), "bias": stacked(biases),
        "offsets": offsets, "rows": rows, "width": width, "x_stride": x.stride(0), "groups": groups, "step": step,
        "eps": eps,
    }  # fmt: skip
    constants = {"BLOCK_ROWS": parameters.block_rows, "BLOCK_WIDTH": parameters.block_width}
    launch(_forward, programs, arguments, constants, parameters.num_warps)
    return y, mean, rstd
