"""LayerNorm of packed rows, forward and backward: the formulas stand in ``onepeace_fast/ops/layer_norm.py``.

A row is in registers as a whole, so it is read once and written once; statistics are float32. A program keeps the
parameters of a modality in registers while it walks over its rows of it, and its sums over them for their gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import (
    Configuration,
    compact,
    launch,
    parameters_for,
    recording,
    unit_columns,
    width_classes,
)
from onepeace_fast.kernels.partial_sums import add_in_memory, new_partials, sum_partials
from onepeace_fast.kernels.rows import (
    group_rows,
    row_extent,
    row_places,
    rows_per_program,
    store_zeros,
    store_zeros_unplaced,
)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, y, mean, rstd, weight, bias, scale, index, offsets, rows, width, x_stride, groups, step, head_dim, eps,
    IN_MEMORY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    extent = row_extent(offsets, groups * step, rows)
    share = rows_per_program(extent, tl.num_programs(0), BLOCK_ROWS)
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, extent)
    if scale is not None and not IN_MEMORY:
        c = tl.load(scale + column // head_dim, mask=inside, other=0).to(tl.float32)
    group = 0
    while group < groups:
        tile, stop = group_rows(offsets, group, step, first, last)
        if tile < stop:
            if weight is not None and not IN_MEMORY:
                w = tl.load(weight + group * width + column, mask=inside, other=0).to(tl.float32)
            if bias is not None and not IN_MEMORY:
                b = tl.load(bias + group * width + column, mask=inside, other=0).to(tl.float32)
            while tile < stop:
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                source = row
                if index is not None:
                    source = tl.load(index + row, mask=live, other=0)
                mask = live[:, None] & inside[None, :]
                cell = source.to(tl.int64)[:, None] * x_stride + column[None, :]
                value = tl.load(x + cell, mask=mask, other=0).to(tl.float32)
                if scale is not None:
                    if IN_MEMORY:
                        c = tl.load(scale + column // head_dim, mask=inside, other=0).to(tl.float32)
                    value = value * c[None, :]
                mu = tl.sum(value, 1) / width
                centred = tl.where(inside[None, :], value - mu[:, None], 0)
                r = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
                result = centred * r[:, None]
                if weight is not None:
                    if IN_MEMORY:
                        w = tl.load(weight + group * width + column, mask=inside, other=0).to(tl.float32)
                    result = result * w[None, :]
                if bias is not None:
                    if IN_MEMORY:
                        b = tl.load(bias + group * width + column, mask=inside, other=0).to(tl.float32)
                    result = result + b[None, :]
                cell = row.to(tl.int64)[:, None] * width + column[None, :]
                tl.store(y + cell, result.to(y.dtype.element_ty), mask=mask)
                tl.store(mean + row, mu, mask=live)
                tl.store(rstd + row, r, mask=live)
                tile += BLOCK_ROWS
        group += 1
    if offsets is not None:
        store_zeros(y, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
        store_zeros(mean, extent, rows, 1, BLOCK_ROWS, 1)
        store_zeros(rstd, extent, rows, 1, BLOCK_ROWS, 1)


@triton.jit(do_not_specialize=["rows", "x_rows"])
def _backward(
    grad, x, dx, mean, rstd, weight, scale, dweight, dbias, dscale, index, place, offsets, rows, x_rows, width,
    grad_stride, x_stride, groups, step, head_dim,
    IN_MEMORY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    program = tl.program_id(0)
    extent = row_extent(offsets, groups * step, rows)
    share = rows_per_program(extent, tl.num_programs(0), BLOCK_ROWS)
    first = program * share
    last = tl.minimum(first + share, extent)
    scale_sum = dscale + program.to(tl.int64) * width + column if dscale is not None else column
    if scale is not None and not IN_MEMORY:
        c = tl.load(scale + column // head_dim, mask=inside, other=0).to(tl.float32)
    if dscale is not None and not IN_MEMORY:
        c_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    group = 0
    while group < groups:
        start, stop = group_rows(offsets, group, step, first, last)
        if start < stop:
            partial = (group * tl.num_programs(0) + program).to(tl.int64) * width + column
            if weight is not None and not IN_MEMORY:
                w = tl.load(weight + group * width + column, mask=inside, other=0).to(tl.float32)
            if not IN_MEMORY:
                w_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                b_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
            tile = start
            while tile < stop:
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                source = row
                if index is not None:
                    source = tl.load(index + row, mask=live, other=0)
                mask = live[:, None] & inside[None, :]
                cell = row.to(tl.int64)[:, None] * grad_stride + column[None, :]
                dy = tl.load(grad + cell, mask=mask, other=0).to(tl.float32)
                cell = source.to(tl.int64)[:, None] * x_stride + column[None, :]
                value = tl.load(x + cell, mask=mask, other=0).to(tl.float32)
                mu = tl.load(mean + row, mask=live, other=0)[:, None]
                r = tl.load(rstd + row, mask=live, other=0)[:, None]
                scaled = value
                if scale is not None:
                    if IN_MEMORY:
                        c = tl.load(scale + column // head_dim, mask=inside, other=0).to(tl.float32)
                    scaled = value * c[None, :]
                xhat = tl.where(inside[None, :], (scaled - mu) * r, 0)
                g = dy
                if weight is not None:
                    if IN_MEMORY:
                        w = tl.load(weight + group * width + column, mask=inside, other=0).to(tl.float32)
                    g = dy * w[None, :]
                g_mean = (tl.sum(g, 1) / width)[:, None]
                g_xhat_mean = (tl.sum(g * xhat, 1) / width)[:, None]
                result = (g - g_mean - xhat * g_xhat_mean) * r
                if dweight is not None:
                    if IN_MEMORY:
                        add_in_memory(dweight + partial, tl.sum(dy * xhat, 0), inside)
                    else:
                        w_total += dy * xhat
                if dbias is not None:
                    if IN_MEMORY:
                        add_in_memory(dbias + partial, tl.sum(dy, 0), inside)
                    else:
                        b_total += dy
                if dscale is not None:
                    if IN_MEMORY:
                        add_in_memory(scale_sum, tl.sum(result * value, 0), inside)
                    else:
                        c_total += result * value
                if scale is not None:
                    result = result * c[None, :]
                cell = source.to(tl.int64)[:, None] * width + column[None, :]
                tl.store(dx + cell, result.to(dx.dtype.element_ty), mask=mask)
                if IN_MEMORY:
                    tl.debug_barrier()
                tile += BLOCK_ROWS
            if not IN_MEMORY:
                if dweight is not None:
                    tl.store(dweight + partial, tl.sum(w_total, 0), mask=inside)
                if dbias is not None:
                    tl.store(dbias + partial, tl.sum(b_total, 0), mask=inside)
        group += 1
    if dscale is not None and not IN_MEMORY:
        tl.store(scale_sum, tl.sum(c_total, 0), mask=inside)
    if place is not None:
        store_zeros_unplaced(dx, place, x_rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    elif offsets is not None:
        store_zeros(dx, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)


def stacked(vectors: Sequence[Tensor]) -> Tensor | None:
    """The vectors of all groups one after another in memory, None without any."""
    return torch.stack(list(vectors)) if len(vectors) > 1 else compact(vectors[0]) if vectors else None


def layer_norm(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], head_scale: Tensor | None, rows: Tensor | None,
    offsets: Tensor | None, row_counts: Sequence[int], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch ``_forward``: what ``layer_norm_specification`` returns."""
    x, rows, offsets = unit_columns(x), compact(rows), compact(offsets)
    width, count = x.shape[1], x.shape[0] if rows is None else rows.shape[0]
    groups = max(len(weights), len(biases), 1)
    y = torch.empty((count, width), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((count, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    parameters, programs = parameters_for(_table_name("layer_norm", head_scale), x, count)
    arguments = {
        "x": x, "y": y, "mean": mean, "rstd": rstd, "weight": stacked(weights), "bias": stacked(biases),
        "scale": compact(head_scale), "index": rows, "offsets": offsets, "rows": count, "width": width,
        "x_stride": x.stride(0), "groups": groups, "step": _step(offsets, groups),
        "head_dim": _head_dim(width, head_scale), "eps": eps,
    }  # fmt: skip
    constants = {
        "IN_MEMORY": parameters.held_in == "memory", "BLOCK_ROWS": parameters.block_rows,
        "BLOCK_WIDTH": parameters.block_width,
    }  # fmt: skip
    launch(_forward, (programs,), arguments, constants, parameters.num_warps)
    return y, mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor],
    head_scale: Tensor | None, rows: Tensor | None, offsets: Tensor | None, row_counts: Sequence[int],
    weight_needs: Sequence[bool], bias_needs: Sequence[bool], head_scale_needed: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """Launch ``_backward``, and a sum for each group that needs one: what the specification returns."""
    grad, x, rows, offsets = unit_columns(grad), unit_columns(x), compact(rows), compact(offsets)
    width, count = x.shape[1], grad.shape[0]
    groups = max(len(weights), len(biases), 1)
    parameters, programs = parameters_for(_table_name("layer_norm_backward", head_scale), x, count)

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = new_partials(groups, programs, x, parameters) if any(weight_needs) else None
    dbias = new_partials(groups, programs, x, parameters) if any(bias_needs) else None
    dscale = new_partials(1, programs, x, parameters) if head_scale_needed else None
    arguments = {
        "grad": grad, "x": x, "dx": dx, "mean": mean, "rstd": rstd, "weight": stacked(weights),
        "scale": compact(head_scale), "dweight": dweight, "dbias": dbias, "dscale": dscale, "index": rows,
        "place": None if rows is None else row_places(rows, offsets, x.shape[0]), "offsets": offsets, "rows": count,
        "x_rows": x.shape[0], "width": width, "grad_stride": grad.stride(0), "x_stride": x.stride(0),
        "groups": groups, "step": _step(offsets, groups), "head_dim": _head_dim(width, head_scale),
    }  # fmt: skip
    constants = {
        "IN_MEMORY": parameters.held_in == "memory", "BLOCK_ROWS": parameters.block_rows,
        "BLOCK_WIDTH": parameters.block_width,
    }  # fmt: skip
    launch(_backward, (programs,), arguments, constants, parameters.num_warps)
    dweights = [w.new_empty(width if need else 0) for w, need in zip(weights, weight_needs, strict=True)]
    dbiases = [b.new_empty(width if need else 0) for b, need in zip(biases, bias_needs, strict=True)]
    for group in range(groups):
        sums = [(dweight, dweights[group])] if weights and weight_needs[group] else []
        sums += [(dbias, dbiases[group])] if biases and bias_needs[group] else []
        if sums:
            sum_partials(sums, offsets, count, group, groups, parameters)
    if not head_scale_needed:
        return dx, dweights, dbiases, x.new_empty(0)
    by_column = torch.empty(width, dtype=torch.float32, device=x.device)
    sum_partials([(dscale, by_column)], offsets, count, 0, 1, parameters)
    return dx, dweights, dbiases, by_column.view(head_scale.shape[0], -1).sum(1).to(head_scale.dtype)


def _table_name(name: str, head_scale: Tensor | None) -> str:
    return name if head_scale is None else f"{name}_head_scale"


def _step(offsets: Tensor | None, groups: int) -> int:
    """Modalities of a group that shares its parameters."""
    return 0 if offsets is None else (offsets.shape[0] - 1) // groups


def _head_dim(width: int, head_scale: Tensor | None) -> int:
    return 1 if head_scale is None else width // head_scale.shape[0]


def configurations(architecture: str) -> list[Configuration]:
    """What is launched for every width class of the table: with all parameters, with a row index, with a head scale."""
    with recording(architecture) as launches:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for width in width_classes("layer_norm", architecture, dtype):
                new = functools.partial(torch.empty, device="meta")
                x, y, statistics = new(4096, width, dtype=dtype), new(2048, width, dtype=dtype), new(2048, 1)
                vectors, index, offsets = [new(width)] * 3, new(2048, dtype=torch.int32), new(4, dtype=torch.int32)
                for scale, rows, grad in ((None, None, x), (None, index, y), (new(width // 64), index, y)):
                    where = (vectors, vectors, scale, rows, offsets, ())
                    layer_norm(x, *where, 1e-5)
                    needs = ([True] * 3, [True] * 3, scale is not None)
                    layer_norm_backward(grad, x, statistics, statistics, *where, *needs)
    return launches
