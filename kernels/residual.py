"""The residual connection, alone or with the LayerNorm behind it: the formulas stand in ``ops/residual.py``.

A program holds gamma and the norm's parameters in registers while it walks over its rows. With a row index a walk over
all rows of the stream looks up each row's place among the branch's rows, so that every row is read and written once.
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
from onepeace_fast.kernels.rows import row_extent, row_places, rows_per_program, store_zeros


@triton.jit
def _row_factor(keep, sample, seed, row, live, column, width, drop_below, kept_factor):
    """keep * dropout's factor for rows of the stream: [BLOCK_ROWS, 1], or [BLOCK_ROWS, BLOCK_WIDTH] with dropout."""
    factor = tl.where(live, 1.0, 0.0)[:, None]
    if keep is not None:
        entry = tl.load(sample + row, mask=live, other=0)
        factor = tl.load(keep + entry, mask=live, other=0).to(tl.float32)[:, None]
    if seed is not None:
        counter = row.to(tl.int64)[:, None] * width + column[None, :]
        low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        zero = tl.zeros_like(low)
        word, _, _, _ = tl.philox(tl.load(seed), low, high, zero, zero, 10)
        factor = factor * tl.where(word.to(tl.int64) >= drop_below, kept_factor, 0.0)
    return factor


@triton.jit(do_not_specialize=["rows", "drop_below"])
def _forward(
    x, y, out, normed, mean, rstd, gamma, keep, sample, seed, place, offsets, norm_weight, norm_bias, rows, width,
    x_stride, y_stride, modalities, drop_below, kept_factor, eps,
    IN_MEMORY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    share = rows_per_program(rows, tl.num_programs(0), BLOCK_ROWS)
    tile = tl.program_id(0) * share
    stop = tl.minimum(tile + share, rows)
    branch_extent = row_extent(offsets, modalities, rows)
    if tile < stop:
        if gamma is not None and not IN_MEMORY:
            scale = tl.load(gamma + column, mask=inside, other=0).to(tl.float32)
        if norm_weight is not None and not IN_MEMORY:
            weight = tl.load(norm_weight + column, mask=inside, other=0).to(tl.float32)
        if norm_bias is not None and not IN_MEMORY:
            bias = tl.load(norm_bias + column, mask=inside, other=0).to(tl.float32)
        while tile < stop:
            row = tile + tl.arange(0, BLOCK_ROWS)
            live = row < stop
            mask = live[:, None] & inside[None, :]
            cell = row.to(tl.int64)[:, None] * x_stride + column[None, :]
            stream = tl.load(x + cell, mask=mask, other=0).to(tl.float32)
            source = row
            placed = row < tl.minimum(stop, branch_extent)
            if place is not None:
                source = tl.load(place + row, mask=live, other=-1)
                placed = source >= 0
            cell = source.to(tl.int64)[:, None] * y_stride + column[None, :]
            branch = tl.load(y + cell, mask=placed[:, None] & inside[None, :], other=0).to(tl.float32)
            factor = _row_factor(keep, sample, seed, row, placed, column, width, drop_below, kept_factor)
            if gamma is not None:
                if IN_MEMORY:
                    scale = tl.load(gamma + column, mask=inside, other=0).to(tl.float32)
                factor = factor * scale[None, :]
            total = tl.where(placed[:, None], stream + branch * factor, stream).to(out.dtype.element_ty)
            cell = row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(out + cell, total, mask=mask)
            if normed is not None:
                value = total.to(tl.float32)
                mu = tl.sum(value, 1) / width
                centred = tl.where(inside[None, :], value - mu[:, None], 0)
                r = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
                if IN_MEMORY:
                    weight = tl.load(norm_weight + column, mask=inside, other=0).to(tl.float32)
                result = centred * r[:, None] * weight[None, :]
                if norm_bias is not None:
                    if IN_MEMORY:
                        bias = tl.load(norm_bias + column, mask=inside, other=0).to(tl.float32)
                    result = result + bias[None, :]
                tl.store(normed + cell, result.to(normed.dtype.element_ty), mask=mask)
                tl.store(mean + row, mu, mask=live)
                tl.store(rstd + row, r, mask=live)
            tile += BLOCK_ROWS


@triton.jit(do_not_specialize=["rows", "branch_rows", "drop_below"])
def _backward(
    grad, grad_normed, y, out, dx, dy, mean, rstd, gamma, keep, sample, seed, norm_weight, dgamma, dweight, dbias,
    index, place, offsets, branch_offsets, rows, branch_rows, width, grad_stride, grad_normed_stride, y_stride,
    out_stride, modalities, drop_below, kept_factor,
    IN_MEMORY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    program = tl.program_id(0)
    extent = row_extent(offsets, modalities, rows)
    share = rows_per_program(extent, tl.num_programs(0), BLOCK_ROWS)
    start = program * share
    stop = tl.minimum(start + share, extent)
    branch_extent = row_extent(branch_offsets, modalities, branch_rows)
    if start < stop:
        partial = program.to(tl.int64) * width + column
        if gamma is not None and not IN_MEMORY:
            scale = tl.load(gamma + column, mask=inside, other=0).to(tl.float32)
        if grad_normed is not None and not IN_MEMORY:
            weight = tl.load(norm_weight + column, mask=inside, other=0).to(tl.float32)
        if not IN_MEMORY:
            gamma_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
            weight_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
            bias_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
        tile = start
        while tile < stop:
            row = tile + tl.arange(0, BLOCK_ROWS)
            live = row < stop
            stream_row = row
            branch_row = row
            placed = row < tl.minimum(stop, branch_extent)
            if index is not None:  # a walk over the branch's rows
                stream_row = tl.load(index + row, mask=live, other=0)
            if place is not None:  # a walk over the stream's rows
                branch_row = tl.load(place + row, mask=live, other=-1)
                placed = branch_row >= 0
            mask = live[:, None] & inside[None, :]
            placed_mask = placed[:, None] & inside[None, :]
            total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
            if grad is not None:
                cell = stream_row.to(tl.int64)[:, None] * grad_stride + column[None, :]
                total = tl.load(grad + cell, mask=mask, other=0).to(tl.float32)
            if grad_normed is not None:
                cell = row.to(tl.int64)[:, None] * grad_normed_stride + column[None, :]
                dn = tl.load(grad_normed + cell, mask=mask, other=0).to(tl.float32)
                cell = row.to(tl.int64)[:, None] * out_stride + column[None, :]
                value = tl.load(out + cell, mask=mask, other=0).to(tl.float32)
                mu = tl.load(mean + row, mask=live, other=0)[:, None]
                r = tl.load(rstd + row, mask=live, other=0)[:, None]
                xhat = tl.where(inside[None, :], (value - mu) * r, 0)
                if IN_MEMORY:
                    weight = tl.load(norm_weight + column, mask=inside, other=0).to(tl.float32)
                g = dn * weight[None, :]
                g_mean = (tl.sum(g, 1) / width)[:, None]
                g_xhat_mean = (tl.sum(g * xhat, 1) / width)[:, None]
                total += (g - g_mean - xhat * g_xhat_mean) * r
                if dweight is not None:
                    if IN_MEMORY:
                        add_in_memory(dweight + partial, tl.sum(dn * xhat, 0), inside)
                    else:
                        weight_total += dn * xhat
                if dbias is not None:
                    if IN_MEMORY:
                        add_in_memory(dbias + partial, tl.sum(dn, 0), inside)
                    else:
                        bias_total += dn
            if dx is not None:
                cell = row.to(tl.int64)[:, None] * width + column[None, :]
                tl.store(dx + cell, total.to(dx.dtype.element_ty), mask=mask)
            scaled = total * _row_factor(keep, sample, seed, stream_row, placed, column, width, drop_below, kept_factor)
            if dgamma is not None:
                cell = branch_row.to(tl.int64)[:, None] * y_stride + column[None, :]
                product = scaled * tl.load(y + cell, mask=placed_mask, other=0).to(tl.float32)
                product = tl.where(placed[:, None], product, 0)
                if IN_MEMORY:
                    add_in_memory(dgamma + partial, tl.sum(product, 0), inside)
                else:
                    gamma_total += product
            if gamma is not None:
                if IN_MEMORY:
                    scale = tl.load(gamma + column, mask=inside, other=0).to(tl.float32)
                scaled = scaled * scale[None, :]
            cell = branch_row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(dy + cell, scaled.to(dy.dtype.element_ty), mask=placed_mask)
            if IN_MEMORY:
                tl.debug_barrier()
            tile += BLOCK_ROWS
        if not IN_MEMORY:
            if dgamma is not None:
                tl.store(dgamma + partial, tl.sum(gamma_total, 0), mask=inside)
            if dweight is not None:
                tl.store(dweight + partial, tl.sum(weight_total, 0), mask=inside)
            if dbias is not None:
                tl.store(dbias + partial, tl.sum(bias_total, 0), mask=inside)
    if branch_offsets is not None:
        store_zeros(dy, branch_extent, branch_rows, width, BLOCK_ROWS, BLOCK_WIDTH)


def _dropout_arguments(dropout: float, seed: Tensor | None) -> dict[str, Tensor | int | float | None]:
    if not dropout:
        return {"seed": None, "drop_below": 0, "kept_factor": 1.0}
    return {"seed": seed, "drop_below": int(dropout * 2**32), "kept_factor": 1 / (1 - dropout)}


def residual(
    x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, sample: Tensor | None, dropout: float,
    seed: Tensor | None, rows: Tensor | None, offsets: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch ``_forward``: what ``residual_specification`` returns."""
    x, y, rows, offsets = unit_columns(x), unit_columns(y), compact(rows), compact(offsets)
    count, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = mean = rstd = None
    if norm_weight is not None:
        normed = torch.empty(x.shape, dtype=y.dtype, device=x.device)
        mean, rstd = (torch.empty((count, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    parameters, programs = parameters_for("residual" if normed is None else "residual_layer_norm", x, count)
    arguments = {
        "x": x, "y": y, "out": out, "normed": normed, "mean": mean, "rstd": rstd, "gamma": compact(gamma),
        "keep": compact(keep), "sample": compact(sample),
        "place": None if rows is None else row_places(rows, offsets, count),
        "offsets": offsets if rows is None else None, "norm_weight": compact(norm_weight),
        "norm_bias": compact(norm_bias), "rows": count, "width": width, "x_stride": x.stride(0),
        "y_stride": y.stride(0), "modalities": _modalities(offsets), "eps": eps, **_dropout_arguments(dropout, seed),
    }  # fmt: skip
    constants = {
        "IN_MEMORY": parameters.held_in == "memory", "BLOCK_ROWS": parameters.block_rows,
        "BLOCK_WIDTH": parameters.block_width,
    }  # fmt: skip
    launch(_forward, (programs,), arguments, constants, parameters.num_warps)
    return out, *(x.new_empty(0) if result is None else result for result in (normed, mean, rstd))


def residual_backward(
    grad: Tensor | None, grad_normed: Tensor | None, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None,
    sample: Tensor | None, dropout: float, seed: Tensor | None, rows: Tensor | None, offsets: Tensor | None,
    out: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor | None,
    rstd: Tensor | None, y_dtype: torch.dtype, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch ``_backward`` and the sum for the parameters: what ``residual_backward_specification`` returns.

    Without a norm's gradient the walk is over the branch's rows, otherwise over the stream's.
    """
    grad, grad_normed, y = (None if value is None else unit_columns(value) for value in (grad, grad_normed, y))
    rows, offsets = compact(rows), compact(offsets)
    normed = grad_normed is not None
    like = out if normed else grad
    stream_rows, width = like.shape
    branch_rows = stream_rows if rows is None else rows.shape[0]
    walked, walk_offsets = (stream_rows, None) if normed else (branch_rows, offsets)
    parameters, programs = parameters_for(f"residual{'_layer_norm' * normed}_backward", like, walked)
    vectors = (gamma, norm_weight, norm_bias)
    gradients = [like.new_empty(0) if not n else v.new_empty(v.shape) for v, n in zip(vectors, needs, strict=True)]
    computed = [needs[0], needs[1] and normed, needs[2] and normed]
    partials = [new_partials(1, programs, like, parameters) if needed else None for needed in computed]
    dx = torch.empty(like.shape, dtype=like.dtype, device=like.device) if normed else None
    dy = torch.empty((branch_rows, width), dtype=y_dtype, device=like.device)
    arguments = {
        "grad": grad, "grad_normed": grad_normed, "y": y if needs[0] else None, "out": out if normed else None,
        "dx": dx, "dy": dy, "mean": mean if normed else None, "rstd": rstd if normed else None,
        "gamma": compact(gamma), "keep": compact(keep), "sample": compact(sample),
        "norm_weight": compact(norm_weight) if normed else None,
        "dgamma": partials[0], "dweight": partials[1], "dbias": partials[2], "index": None if normed else rows,
        "place": row_places(rows, offsets, stream_rows) if normed and rows is not None else None,
        "offsets": walk_offsets, "branch_offsets": offsets, "rows": walked, "branch_rows": branch_rows,
        "width": width, "grad_stride": 0 if grad is None else grad.stride(0),
        "grad_normed_stride": grad_normed.stride(0) if normed else 0,
        "y_stride": y.stride(0) if needs[0] else 0, "out_stride": out.stride(0) if normed else 0,
        "modalities": _modalities(offsets), **_dropout_arguments(dropout, seed),
    }  # fmt: skip
    constants = {
        "IN_MEMORY": parameters.held_in == "memory", "BLOCK_ROWS": parameters.block_rows,
        "BLOCK_WIDTH": parameters.block_width,
    }  # fmt: skip
    launch(_backward, (programs,), arguments, constants, parameters.num_warps)
    sums = [pair for pair, needed in zip(zip(partials, gradients, strict=True), computed, strict=True) if needed]
    if sums:
        sum_partials(sums, walk_offsets, walked, 0, 1, parameters)
    for gradient, needed, done in zip(gradients, needs, computed, strict=True):
        if needed and not done:  # a norm whose output received no gradient still owes zeros
            gradient.zero_()
    return like.new_empty(0) if dx is None else dx, dy, *gradients


def _modalities(offsets: Tensor | None) -> int:
    return 0 if offsets is None else offsets.shape[0] - 1


def configurations(architecture: str) -> list[Configuration]:
    """What is launched for every width class of the table: alone and with the norm, plain, with all options."""
    half, single = torch.bfloat16, torch.float32
    with recording(architecture) as launches:
        for stream, branch in ((half, half), (torch.float16, torch.float16), (single, half), (single, single)):
            for width in width_classes("residual", architecture, stream):
                _launch_options(width, stream, branch)
    return launches


def _launch_options(width: int, stream: torch.dtype, branch: torch.dtype) -> None:
    new = functools.partial(torch.empty, device="meta")
    x, vector, statistics = new(4096, width, dtype=stream), new(width), new(4096, 1)
    keep, sample, seed = new(32), new(4096, dtype=torch.int32), new((), dtype=torch.int64)
    index, offsets = new(2048, dtype=torch.int32), new(4, dtype=torch.int32)
    for norm in (None, vector):
        for dropout, rows in ((0.0, None), (0.0, index), (0.1, index)):
            count = 4096 if rows is None else 2048
            y = new(count, width, dtype=branch)
            options = (vector, keep, sample, dropout, seed, rows, offsets)
            residual(x, y, *options, norm, norm, 1e-5)
            saved = (None,) * 5 if norm is None else (x, norm, norm, statistics, statistics)
            grad_normed = None if norm is None else new(4096, width, dtype=branch)
            needs = [True, norm is not None, norm is not None]
            residual_backward(x, grad_normed, y, *options, *saved, branch, needs)
