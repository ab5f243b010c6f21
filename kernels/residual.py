"""The residual connection, alone or with the norm behind it: the formulas stand in ``ops/residual.py``.

A norm with a mean is LayerNorm, one without RMSNorm; it is a small part of these kernels. A program holds gamma and the
norm's parameters in registers while it walks over its rows. With a row index a walk over all rows of the stream looks
up each row's place among the branch's rows, so that every row is read and written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import compact, launch_over_rows, parameters_for, stages, unit_columns
from onepeace_fast.kernels.layer_norm import mean_and_rstd
from onepeace_fast.kernels.partial_sums import (
    new_partials,
    new_where_needed,
    store_sums,
    sum_by_norm,
    sum_partials,
    zero_sums,
)
from onepeace_fast.kernels.rows import (
    load_rows,
    load_vector,
    row_extent,
    row_places,
    rows_of_norm,
    share_of_rows,
    store_rows,
    store_zeros,
)
from onepeace_fast.structures import Needs, ResidualGradients, ResidualInputs, ResidualOutputs, ResidualSaved


@triton.jit
def _drop_path_factor(
    drop_path,  # [samples] or None
    sample,  # [rows] or None
    row, live,
):  # fmt: skip
    """DropPath's factor of rows of the stream, float32 [BLOCK_ROWS, 1]; zero where not ``live``."""
    factor = tl.where(live, 1.0, 0.0)
    if drop_path is not None:
        entry = tl.load(sample + row, mask=live, other=0)
        factor = tl.load(drop_path + entry, mask=live, other=0).to(tl.float32)
    return factor[:, None]


@triton.jit
def _times_dropout(
    factor,
    seed,  # [] or None
    row, width, drop_below, dropout_scale, part, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """``factor`` times dropout's factor of a part of the columns."""
    if seed is not None:
        column = part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        counter = row.to(tl.int64)[:, None] * width + column[None, :]
        low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        zero = tl.zeros_like(low)
        word, _, _, _ = tl.philox(tl.load(seed), low, high, zero, zero, 10)
        factor = factor * tl.where(word.to(tl.int64) >= drop_below, dropout_scale, 0.0)
    return factor


@triton.jit(
    do_not_specialize=["rows", "drop_below"], do_not_specialize_on_alignment=["drop_path", "sample", "seed", "offsets"]
)
def residual_forward_kernel(
    x,  # [rows, width]
    y,  # [branch rows, width]
    out,  # [rows, width]
    normed,  # [rows, width] or None
    mean,  # [rows, 1] or None
    rstd,  # [rows, 1] or None
    gamma,  # [width] or None
    drop_path,  # [samples] or None
    sample,  # [rows] or None
    seed,  # [] or None
    place,  # [rows] or None
    offsets,  # [modalities + 1] or None
    norm_weight,  # [width] or None
    norm_bias,  # [width] or None
    rows, width, x_stride, y_stride, modalities, drop_below, dropout_scale, eps,
    PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    tile, stop = share_of_rows(rows, BLOCK_ROWS)
    branch_extent = row_extent(offsets, modalities, rows)
    if tile < stop:
        if gamma is not None:
            gammas = load_vector(gamma, width, PARTS, BLOCK_WIDTH)
        if norm_weight is not None:
            w = load_vector(norm_weight, width, PARTS, BLOCK_WIDTH)
        if norm_bias is not None:
            b = load_vector(norm_bias, width, PARTS, BLOCK_WIDTH)
        while tile < stop:
            row = tile + tl.arange(0, BLOCK_ROWS)
            live = row < stop
            source = row
            placed = row < tl.minimum(stop, branch_extent)
            if place is not None:
                source = tl.load(place + row, mask=live, other=-1)
                placed = source >= 0
            path_factor = _drop_path_factor(drop_path, sample, row, placed)
            held = ()
            for part in tl.static_range(PARTS):
                stream = load_rows(x, x_stride, row, live, width, part, BLOCK_WIDTH).to(tl.float32)
                branch = load_rows(y, y_stride, source, placed, width, part, BLOCK_WIDTH).to(tl.float32)
                factor = _times_dropout(path_factor, seed, row, width, drop_below, dropout_scale, part, BLOCK_WIDTH)
                if gamma is not None:
                    factor = factor * gammas[part]
                total = tl.where(placed[:, None], stream + branch * factor, stream).to(out.dtype.element_ty)
                store_rows(out, row, live, width, total, part, BLOCK_WIDTH)
                held += (total,)
            if normed is not None:
                mu, r = mean_and_rstd(held, width, eps, mean is not None, PARTS, BLOCK_ROWS, BLOCK_WIDTH)
                if mean is not None:
                    store_rows(mean, row, live, 1, mu, 0, 1)
                for part in tl.static_range(PARTS):
                    result = (held[part].to(tl.float32) - mu) * r * w[part]
                    if norm_bias is not None:
                        result = result + b[part]
                    store_rows(normed, row, live, width, result, part, BLOCK_WIDTH)
                store_rows(rstd, row, live, 1, r, 0, 1)
            tile += BLOCK_ROWS


@triton.jit(
    do_not_specialize=["rows", "branch_rows", "drop_below"],
    do_not_specialize_on_alignment=["drop_path", "sample", "seed", "row_index", "offsets", "branch_offsets"],
)
def residual_backward_kernel(
    grad,  # [rows of the stream, width] or None
    grad_normed,  # [rows of the stream, width] or None
    y,  # [branch_rows, width] or None
    out,  # [rows of the stream, width] or None
    dx,  # [rows of the stream, width] or None
    dy,  # [branch_rows, width] or None
    mean,  # [rows of the stream, 1] or None
    rstd,  # [rows of the stream, 1] or None
    gamma,  # [width] or None
    drop_path,  # [samples] or None
    sample,  # [rows of the stream] or None
    seed,  # [] or None
    norm_weight,  # [width] or None
    dgamma,  # [1, programs, width] or None
    dweight,  # [1, programs, width] or None
    dbias,  # [1, programs, width] or None
    dy_sum,  # [sums, programs, width] or None
    row_index,  # [branch_rows] or None
    place,  # [rows of the stream] or None
    offsets,  # [modalities + 1] or None, of the rows that are walked over
    branch_offsets,  # [modalities + 1] or None
    rows, branch_rows, width, grad_stride, grad_normed_stride, y_stride, out_stride, modalities, sums,
    modalities_per_sum, drop_below, dropout_scale,
    STAGES: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    extent = row_extent(offsets, modalities, rows)
    first, last = share_of_rows(extent, BLOCK_ROWS)
    branch_extent = row_extent(branch_offsets, modalities, branch_rows)
    gamma_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
    of_sum = 0
    while of_sum < sums:
        start = first
        stop = last
        if dy_sum is not None:
            start, stop = rows_of_norm(offsets, of_sum, modalities_per_sum, first, last)
        if start < stop:
            partial = program.to(tl.int64) * width
            if gamma is not None:
                gammas = load_vector(gamma, width, PARTS, BLOCK_WIDTH)
            if grad_normed is not None:
                w = load_vector(norm_weight, width, PARTS, BLOCK_WIDTH)
            w_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
            b_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
            y_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
            for tile in tl.range(start, stop, BLOCK_ROWS, num_stages=STAGES):
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                stream_row = row
                branch_row = row
                placed = row < tl.minimum(stop, branch_extent)
                if row_index is not None:  # a walk over the branch's rows
                    stream_row = tl.load(row_index + row, mask=live, other=0)
                if place is not None:  # a walk over the stream's rows
                    branch_row = tl.load(place + row, mask=live, other=-1)
                    placed = branch_row >= 0
                path_factor = _drop_path_factor(drop_path, sample, stream_row, placed)
                mu = 0.0
                r = 0.0
                if mean is not None:
                    mu = tl.load(mean + row, mask=live, other=0)[:, None]
                if grad_normed is not None:
                    r = tl.load(rstd + row, mask=live, other=0)[:, None]
                held = ()
                gamma_sums = ()
                y_sums = ()
                w_sums = ()
                b_sums = ()
                if grad_normed is not None:
                    g_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                    g_xhat_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                    # Past the width dn is zero, and so is what xhat takes part in.
                    for part in tl.static_range(PARTS):
                        dn = load_rows(grad_normed, grad_normed_stride, row, live, width, part, BLOCK_WIDTH)
                        value = load_rows(out, out_stride, row, live, width, part, BLOCK_WIDTH)
                        held += ((dn, value),)
                        g = dn.to(tl.float32)
                        xhat = (value.to(tl.float32) - mu) * r
                        w_sums += (w_total[part] + g * xhat,)
                        b_sums += (b_total[part] + g,)
                        g_total += g * w[part]
                        g_xhat_total += g * w[part] * xhat
                    w_total = w_sums
                    b_total = b_sums
                    g_mean = 0.0
                    if mean is not None:
                        g_mean = (tl.sum(g_total, 1) / width)[:, None]
                    g_xhat_mean = (tl.sum(g_xhat_total, 1) / width)[:, None]
                for part in tl.static_range(PARTS):
                    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                    if grad is not None:
                        total = load_rows(grad, grad_stride, stream_row, live, width, part, BLOCK_WIDTH).to(tl.float32)
                    if grad_normed is not None:
                        dn, value = held[part]
                        xhat = (value.to(tl.float32) - mu) * r
                        total += (dn.to(tl.float32) * w[part] - g_mean - xhat * g_xhat_mean) * r
                    if dx is not None:
                        store_rows(dx, row, live, width, total, part, BLOCK_WIDTH)
                    scaled = total * _times_dropout(
                        path_factor, seed, stream_row, width, drop_below, dropout_scale, part, BLOCK_WIDTH
                    )
                    if dgamma is not None:
                        branch = load_rows(y, y_stride, branch_row, placed, width, part, BLOCK_WIDTH).to(tl.float32)
                        gamma_sums += (gamma_total[part] + tl.where(placed[:, None], scaled * branch, 0),)
                    if gamma is not None:
                        scaled = scaled * gammas[part]
                    if dy is not None:
                        store_rows(dy, branch_row, placed, width, scaled, part, BLOCK_WIDTH)
                    if dy_sum is not None:
                        y_sums += (y_total[part] + tl.where(placed[:, None], scaled, 0),)
                if dgamma is not None:
                    gamma_total = gamma_sums
                if dy_sum is not None:
                    y_total = y_sums
            if dweight is not None:
                store_sums(dweight + partial, w_total, width, PARTS, BLOCK_WIDTH)
            if dbias is not None:
                store_sums(dbias + partial, b_total, width, PARTS, BLOCK_WIDTH)
            if dy_sum is not None:
                of_program = (of_sum * tl.num_programs(0) + program).to(tl.int64) * width
                store_sums(dy_sum + of_program, y_total, width, PARTS, BLOCK_WIDTH)
        of_sum += 1
    if dgamma is not None:
        store_sums(dgamma + program.to(tl.int64) * width, gamma_total, width, PARTS, BLOCK_WIDTH)
    if branch_offsets is not None and dy is not None:
        store_zeros(dy, None, branch_extent, branch_rows, width, BLOCK_ROWS, BLOCK_WIDTH)


def residual_forward(given: ResidualInputs) -> ResidualOutputs:
    """Launch ``residual_forward_kernel``."""
    x, y = unit_columns(given.x), unit_columns(given.y)
    row_index, offsets = compact(given.routing.row_index), compact(given.routing.offsets)
    count, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = mean = rstd = None
    if given.norm_weight is not None:
        normed = torch.empty(x.shape, dtype=y.dtype, device=x.device)
        rstd = torch.empty((count, 1), dtype=torch.float32, device=x.device)
        mean = None if given.norm_is_rms else torch.empty_like(rstd)
    parameters, programs = parameters_for(_table_name(normed is not None, mean is not None), x, count)
    arguments = {
        "x": x, "y": y, "out": out, "normed": normed, "mean": mean, "rstd": rstd,
        "place": None if row_index is None else row_places(row_index, offsets, count),
        "offsets": offsets if row_index is None else None, "norm_weight": compact(given.norm_weight),
        "norm_bias": compact(given.norm_bias), "rows": count, "width": width, "x_stride": x.stride(0),
        "y_stride": y.stride(0), "eps": given.eps, **_scaling(given),
    }  # fmt: skip
    launch_over_rows(residual_forward_kernel, programs, arguments, parameters)
    return ResidualOutputs(out, normed, mean, rstd)


def residual_backward(saved: ResidualSaved, needs: Needs, sums: Sequence[Tensor | None] = ()) -> ResidualGradients:
    """Launch ``residual_backward_kernel`` and the sum for the parameters.

    Without a norm's gradient the walk is over the branch's rows, otherwise over the stream's. The sum of dy over the
    rows of each modality, or over all rows, is stored into ``sums``, where there is a vector [width] for it.
    """
    grads = saved.grad_out, saved.grad_normed, saved.y if needs.gamma else None
    grad, grad_normed, y = (unit_columns(value) for value in grads)
    row_index, offsets = compact(saved.routing.row_index), compact(saved.routing.offsets)
    normed = grad_normed is not None
    out, mean, rstd = (saved.out, saved.mean, saved.rstd) if normed else (None, None, None)
    like = out if normed else grad
    stream_rows, width = like.shape
    branch_rows = stream_rows if row_index is None else row_index.shape[0]
    walked, walk_offsets = (stream_rows, None) if normed else (branch_rows, offsets)
    parameters, programs = parameters_for(f"{_table_name(normed, mean is not None)}_backward", like, walked)
    vectors = (saved.gamma, saved.norm_weight, saved.norm_bias)
    gradients = new_where_needed(vectors, (needs.gamma, needs.norm_weight, needs.norm_bias))
    computed = gradients if normed else [gradients[0], None, None]
    partials = [None if gradient is None else new_partials(1, programs, like) for gradient in computed]
    of_dy = new_partials(len(sums), programs, like) if any(vector is not None for vector in sums) else None
    groups = 1 if of_dy is None else len(sums)
    dx = torch.empty(like.shape, dtype=like.dtype, device=like.device) if normed else None
    dy = torch.empty((branch_rows, width), dtype=saved.y_dtype, device=like.device) if needs.y else None
    arguments = {
        "grad": grad, "grad_normed": grad_normed, "y": y, "out": out, "dx": dx, "dy": dy, "mean": mean, "rstd": rstd,
        "norm_weight": compact(saved.norm_weight) if normed else None,
        "dgamma": partials[0], "dweight": partials[1], "dbias": partials[2], "dy_sum": of_dy,
        "row_index": None if normed else row_index,
        "place": row_places(row_index, offsets, stream_rows) if normed and row_index is not None else None,
        "offsets": walk_offsets, "branch_offsets": offsets, "rows": walked, "branch_rows": branch_rows,
        "width": width, "grad_stride": 0 if grad is None else grad.stride(0),
        "grad_normed_stride": grad_normed.stride(0) if normed else 0, "y_stride": 0 if y is None else y.stride(0),
        "out_stride": out.stride(0) if normed else 0, "sums": groups,
        "modalities_per_sum": 0 if walk_offsets is None else (walk_offsets.shape[0] - 1) // groups, **_scaling(saved),
    }  # fmt: skip
    # What looks up where a row is takes the registers that copies of the next ones would.
    ahead = stages(parameters, grad, grad_normed, y, out) if row_index is None else 1
    launch_over_rows(residual_backward_kernel, programs, arguments, parameters, STAGES=ahead)
    pairs = [pair for pair in zip(partials, computed, strict=True) if pair[0] is not None]
    if groups == 1 and of_dy is not None:
        pairs.append((of_dy, sums[0]))
    elif of_dy is not None:
        sum_by_norm([of_dy], [sums], groups, walk_offsets, walked, parameters)
    for first in range(0, len(pairs), 3):  # as many as a launch adds up
        sum_partials(pairs[first : first + 3], walk_offsets, walked, 0, 1, parameters)
    if not normed:  # a norm whose output received no gradient still owes zeros
        for gradient in gradients[1:]:
            if gradient is not None:
                gradient.zero_()
    return ResidualGradients(dx, dy, *gradients)


def _table_name(normed: bool, has_mean: bool) -> str:
    return "residual" if not normed else "residual_layer_norm" if has_mean else "residual_rms_norm"


def _scaling(given: ResidualInputs | ResidualSaved) -> dict[str, Any]:
    """What the branch is scaled by, in both kernels."""
    offsets, (probability, seed) = given.routing.offsets, given.dropout
    return {
        "gamma": compact(given.gamma), "drop_path": compact(given.drop_path.scale),
        "sample": compact(given.drop_path.sample), "modalities": 0 if offsets is None else offsets.shape[0] - 1,
        "seed": seed if probability else None, "drop_below": int(probability * 2**32),
        "dropout_scale": 1 / (1 - probability),
    }  # fmt: skip
