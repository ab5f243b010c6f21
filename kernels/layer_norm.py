"""LayerNorm and RMSNorm of packed rows, both passes: the formulas stand in ``onepeace_fast/ops/layer_norm.py``.

A row is in registers as a whole, so it is read once and written once; statistics are float32. A program keeps the
parameters of a modality in registers while it walks over its rows of it, and its sums over them for their gradients,
and copies the rows that come next into shared memory where ``stages`` says so. A norm without a mean is RMSNorm, whose
launches have names of their own in a profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.grouped_gemm import of_modality, vectors
from onepeace_fast.kernels.launch import compact, launch_over_rows, parameters_for, stages, unit_columns
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
from onepeace_fast.structures import LayerNormGradients, LayerNormInputs, LayerNormOutputs, LayerNormSaved, Needs


@triton.jit
def mean_and_rstd(
    parts, width, eps, CENTRED: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):  # fmt: skip
    """Mean and reciprocal deviation, float32 [BLOCK_ROWS, 1], of rows that are held as a tuple of parts.

    The deviation is taken from the mean, so that one that is far above it cancels nothing. Rows that are not
    ``CENTRED`` have the mean zero, and are zero past the width.
    """
    mean = 0.0
    if CENTRED:
        total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            total += parts[part].to(tl.float32)
        mean = (tl.sum(total, 1) / width)[:, None]
    squares = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        value = parts[part].to(tl.float32)
        if CENTRED:
            inside = part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH) < width
            value = tl.where(inside[None, :], value - mean, 0)
        squares += value * value
    return mean, tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]


def _name(direction: str) -> Callable[[Any], str]:
    """A kernel's name in a profile, by what Triton compiles it for."""
    return lambda compiled: f"{'rms' if compiled.signature['mean'] == 'constexpr' else 'layer'}_norm_{direction}_kernel"


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["row_index", "offsets"], repr=_name("forward"))
def layer_norm_forward_kernel(
    x,  # [rows or more, width]
    y,  # [rows, width]
    mean,  # [rows, 1] or None
    rstd,  # [rows, 1]
    weight,  # of each norm [width], or None
    bias,  # of each norm [width], or None
    scale,  # [width // head_dim] or None
    row_index,  # [rows] or None
    offsets,  # [norms * modalities_per_norm + 1] or None
    rows, width, x_stride, norms, modalities_per_norm, head_dim, eps,
    STAGES: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    extent = row_extent(offsets, norms * modalities_per_norm, rows)
    first, last = share_of_rows(extent, BLOCK_ROWS)
    if scale is not None:
        c = load_vector(scale, width, PARTS, BLOCK_WIDTH, head_dim)
    norm = 0
    while norm < norms:
        start, stop = rows_of_norm(offsets, norm, modalities_per_norm, first, last)
        if start < stop:
            if weight is not None:
                w = load_vector(of_modality(weight, norm), width, PARTS, BLOCK_WIDTH)
            if bias is not None:
                b = load_vector(of_modality(bias, norm), width, PARTS, BLOCK_WIDTH)
            for tile in tl.range(start, stop, BLOCK_ROWS, num_stages=STAGES):
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                source = row
                if row_index is not None:
                    source = tl.load(row_index + row, mask=live, other=0)
                held = ()
                for part in tl.static_range(PARTS):
                    value = load_rows(x, x_stride, source, live, width, part, BLOCK_WIDTH).to(tl.float32)
                    if scale is not None:
                        value = value * c[part]
                    held += (value,)
                mu, r = mean_and_rstd(held, width, eps, mean is not None, PARTS, BLOCK_ROWS, BLOCK_WIDTH)
                for part in tl.static_range(PARTS):
                    result = (held[part] - mu) * r
                    if weight is not None:
                        result = result * w[part]
                    if bias is not None:
                        result = result + b[part]
                    store_rows(y, row, live, width, result, part, BLOCK_WIDTH)
                if mean is not None:
                    store_rows(mean, row, live, 1, mu, 0, 1)
                store_rows(rstd, row, live, 1, r, 0, 1)
        norm += 1
    if offsets is not None:
        store_zeros(y, None, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
        if mean is not None:
            store_zeros(mean, None, extent, rows, 1, BLOCK_ROWS, 1)
        store_zeros(rstd, None, extent, rows, 1, BLOCK_ROWS, 1)


@triton.jit(
    do_not_specialize=["rows", "x_rows"], do_not_specialize_on_alignment=["row_index", "offsets"],
    repr=_name("backward"),
)  # fmt: skip
def layer_norm_backward_kernel(
    grad,  # [rows, width]
    x,  # [x_rows, width]
    passed,  # [x_rows, width] or None
    dx,  # [x_rows, width]
    mean,  # [rows, 1] or None
    rstd,  # [rows, 1]
    weight,  # of each norm [width], or None
    scale,  # [width // head_dim] or None
    dweight,  # [norms, programs, width] or None
    dbias,  # [norms, programs, width] or None
    dscale,  # [programs, width] or None
    row_index,  # [rows] or None
    place,  # [x_rows] or None
    offsets,  # [norms * modalities_per_norm + 1] or None
    rows, x_rows, width, grad_stride, x_stride, passed_stride, norms, modalities_per_norm, head_dim,
    STAGES: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    extent = row_extent(offsets, norms * modalities_per_norm, rows)
    first, last = share_of_rows(extent, BLOCK_ROWS)
    if scale is not None:
        c = load_vector(scale, width, PARTS, BLOCK_WIDTH, head_dim)
    c_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
    norm = 0
    while norm < norms:
        start, stop = rows_of_norm(offsets, norm, modalities_per_norm, first, last)
        if start < stop:
            partial = (norm * tl.num_programs(0) + program).to(tl.int64) * width
            if weight is not None:
                w = load_vector(of_modality(weight, norm), width, PARTS, BLOCK_WIDTH)
            w_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
            b_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
            for tile in tl.range(start, stop, BLOCK_ROWS, num_stages=STAGES):
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                source = row
                if row_index is not None:
                    source = tl.load(row_index + row, mask=live, other=0)
                mu = 0.0
                if mean is not None:
                    mu = tl.load(mean + row, mask=live, other=0)[:, None]
                r = tl.load(rstd + row, mask=live, other=0)[:, None]
                held = ()
                w_sums = ()
                b_sums = ()
                c_sums = ()
                g_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                g_xhat_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                # Past the width dy is zero, and so is what xhat takes part in.
                for part in tl.static_range(PARTS):
                    dy = load_rows(grad, grad_stride, row, live, width, part, BLOCK_WIDTH)
                    value = load_rows(x, x_stride, source, live, width, part, BLOCK_WIDTH)
                    held += ((dy, value),)
                    g = dy.to(tl.float32)
                    scaled = value.to(tl.float32)
                    if scale is not None:
                        scaled = scaled * c[part]
                    xhat = (scaled - mu) * r
                    w_sums += (w_total[part] + g * xhat,)
                    b_sums += (b_total[part] + g,)
                    if weight is not None:
                        g = g * w[part]
                    g_total += g
                    g_xhat_total += g * xhat
                w_total = w_sums
                b_total = b_sums
                g_mean = 0.0
                if mean is not None:
                    g_mean = (tl.sum(g_total, 1) / width)[:, None]
                g_xhat_mean = (tl.sum(g_xhat_total, 1) / width)[:, None]
                for part in tl.static_range(PARTS):
                    dy, value = held[part]
                    g = dy.to(tl.float32)
                    scaled = value.to(tl.float32)
                    if scale is not None:
                        scaled = scaled * c[part]
                    if weight is not None:
                        g = g * w[part]
                    result = (g - g_mean - (scaled - mu) * r * g_xhat_mean) * r
                    c_sums += (c_total[part] + result * value.to(tl.float32),)
                    if scale is not None:
                        result = result * c[part]
                    if passed is not None:
                        other = load_rows(passed, passed_stride, source, live, width, part, BLOCK_WIDTH)
                        result += other.to(tl.float32)
                    store_rows(dx, source, live, width, result, part, BLOCK_WIDTH)
                c_total = c_sums
            if dweight is not None:
                store_sums(dweight + partial, w_total, width, PARTS, BLOCK_WIDTH)
            if dbias is not None:
                store_sums(dbias + partial, b_total, width, PARTS, BLOCK_WIDTH)
        norm += 1
    if dscale is not None:
        store_sums(dscale + program.to(tl.int64) * width, c_total, width, PARTS, BLOCK_WIDTH)
    # What the norm did not read has the gradient from elsewhere alone.
    if place is not None:
        store_zeros(dx, place, 0, x_rows, width, BLOCK_ROWS, BLOCK_WIDTH, passed, passed_stride)
    elif offsets is not None:
        store_zeros(dx, None, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH, passed, passed_stride)


def layer_norm_forward(given: LayerNormInputs, rms: bool = False) -> LayerNormOutputs:
    """Launch ``layer_norm_forward_kernel``; with ``rms`` it is RMSNorm, and there is no mean."""
    x, head_scale, walk = unit_columns(given.x), given.head_scale, _walk(given)
    row_index = walk["row_index"]
    count = x.shape[0] if row_index is None else row_index.shape[0]
    y = torch.empty((count, x.shape[1]), dtype=given.y_dtype or x.dtype, device=x.device)
    rstd = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    mean = None if rms else torch.empty_like(rstd)
    parameters, programs = parameters_for(_table_name("", rms, head_scale), x, count)
    arguments = {
        "x": x, "y": y, "mean": mean, "rstd": rstd, "weight": vectors(given.weight), "bias": vectors(given.bias),
        "scale": compact(head_scale), "rows": count, "x_stride": x.stride(0), "eps": given.eps, **walk,
    }  # fmt: skip
    # RMSNorm has enough programs to hide each other's wait; a row in several parts would leave room for a program less.
    ahead = 1 if rms or parameters.parts > 1 else stages(parameters, x)
    launch_over_rows(layer_norm_forward_kernel, programs, arguments, parameters, STAGES=ahead)
    return LayerNormOutputs(y, mean, rstd)


def layer_norm_backward(saved: LayerNormSaved, needs: Needs) -> LayerNormGradients:
    """Launch ``layer_norm_backward_kernel``, and a sum for each norm that needs one."""
    grad, x, head_scale, walk = unit_columns(saved.grad_y), unit_columns(saved.x), saved.head_scale, _walk(saved)
    row_index, offsets, norms, passed = walk["row_index"], walk["offsets"], walk["norms"], unit_columns(saved.passed)
    count, width = grad.shape
    parameters, programs = parameters_for(_table_name("_backward", saved.mean is None, head_scale), x, count)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partials = [new_partials(norms, programs, x) if any(flags) else None for flags in (needs.weight, needs.bias)]
    dscale = new_partials(1, programs, x) if needs.head_scale else None
    arguments = {
        "grad": grad, "x": x, "passed": passed, "dx": dx, "mean": saved.mean, "rstd": saved.rstd,
        "weight": vectors(saved.weight), "scale": compact(head_scale), "dweight": partials[0], "dbias": partials[1],
        "dscale": dscale, "place": None if row_index is None else row_places(row_index, offsets, x.shape[0]),
        "rows": count, "x_rows": x.shape[0], "grad_stride": grad.stride(0), "x_stride": x.stride(0),
        "passed_stride": 0 if passed is None else passed.stride(0), **walk,
    }  # fmt: skip
    # What is added last Triton does not copy ahead through a row index; with a scale rows in parts spill on sm_120.
    none_ahead = (passed is not None and row_index is not None) or (head_scale is not None and parameters.parts > 1)
    ahead = 1 if none_ahead else stages(parameters, grad, x, passed)
    launch_over_rows(layer_norm_backward_kernel, programs, arguments, parameters, STAGES=ahead)
    gradients = [new_where_needed(saved.weight, needs.weight), new_where_needed(saved.bias, needs.bias)]
    sum_by_norm(partials, gradients, norms, offsets, count, parameters)
    by_head = None
    if dscale is not None:
        by_column = torch.empty(width, dtype=torch.float32, device=x.device)
        sum_partials([(dscale, by_column)], offsets, count, 0, 1, parameters)
        by_head = by_column.view(head_scale.shape[0], -1).sum(1).to(head_scale.dtype)
    return LayerNormGradients(dx, *gradients, by_head)


def _walk(given: LayerNormInputs | LayerNormSaved) -> dict[str, Any]:
    """Which rows both kernels walk over, and how these share norms."""
    offsets, norms, width = compact(given.routing.offsets), max(len(given.weight), len(given.bias), 1), given.x.shape[1]
    return {
        "row_index": compact(given.routing.row_index), "offsets": offsets, "width": width, "norms": norms,
        # One where each modality has its own norm, all of them where they share one.
        "modalities_per_norm": 0 if offsets is None else (offsets.shape[0] - 1) // norms,
        "head_dim": 1 if given.head_scale is None else width // given.head_scale.shape[0],
    }  # fmt: skip


def _table_name(direction: str, rms: bool, head_scale: Tensor | None) -> str:
    return f"{'rms' if rms else 'layer'}_norm{direction}{'' if head_scale is None else '_head_scale'}"
