"""RMSNorm of packed rows, forward and backward: the formulas stand in ``onepeace_fast/ops/rms_norm.py``.

They walk over rows as LayerNorm's kernels do. As an option of those the norm would hide behind their name in a profile,
and each line about mean, bias and head scale would have to say when it is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from onepeace_fast.kernels.launch import compact, launch_over_rows, parameters_for, unit_columns
from onepeace_fast.kernels.layer_norm import stacked
from onepeace_fast.kernels.partial_sums import new_partials, new_where_needed, store_sums, sum_by_norm, zero_sums
from onepeace_fast.kernels.rows import (
    load_rows,
    load_vector,
    row_extent,
    row_places,
    rows_of_norm,
    rows_per_program,
    store_rows,
    store_zeros,
    store_zeros_unplaced,
)
from onepeace_fast.structures import Needs, RMSNormGradients, RMSNormInputs, RMSNormOutputs, RMSNormSaved


@triton.jit
def reciprocal_rms(
    parts, width, eps, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):  # fmt: skip
    """1 / RMS, float32 [BLOCK_ROWS, 1], of rows that are held as a tuple of parts and are zero past the width."""
    squares = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        value = parts[part].to(tl.float32)
        squares += value * value
    return tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["row_index", "offsets"])
def rms_norm_forward_kernel(
    x,  # [rows or more, width]
    y,  # [rows, width]
    rrms,  # [rows, 1]
    weight,  # [norms, width] or None
    row_index,  # [rows] or None
    offsets,  # [norms * modalities_per_norm + 1] or None
    rows, width, x_stride, norms, modalities_per_norm, eps,
    PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    extent = row_extent(offsets, norms * modalities_per_norm, rows)
    share = rows_per_program(extent, tl.num_programs(0), BLOCK_ROWS)
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, extent)
    norm = 0
    while norm < norms:
        tile, stop = rows_of_norm(offsets, norm, modalities_per_norm, first, last)
        if tile < stop:
            if weight is not None:
                w = load_vector(weight + norm * width, width, PARTS, BLOCK_WIDTH)
            while tile < stop:
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                source = row
                if row_index is not None:
                    source = tl.load(row_index + row, mask=live, other=0)
                held = ()
                for part in tl.static_range(PARTS):
                    held += (load_rows(x, x_stride, source, live, width, part, BLOCK_WIDTH),)
                r = reciprocal_rms(held, width, eps, PARTS, BLOCK_ROWS, BLOCK_WIDTH)
                for part in tl.static_range(PARTS):
                    result = held[part].to(tl.float32) * r
                    if weight is not None:
                        result = result * w[part]
                    store_rows(y, row, live, width, result, part, BLOCK_WIDTH)
                store_rows(rrms, row, live, 1, r, 0, 1)
                tile += BLOCK_ROWS
        norm += 1
    if offsets is not None:
        store_zeros(y, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
        store_zeros(rrms, extent, rows, 1, BLOCK_ROWS, 1)


@triton.jit(do_not_specialize=["rows", "x_rows"], do_not_specialize_on_alignment=["row_index", "offsets"])
def rms_norm_backward_kernel(
    grad,  # [rows, width]
    x,  # [x_rows, width]
    dx,  # [x_rows, width]
    rrms,  # [rows, 1]
    weight,  # [norms, width] or None
    dweight,  # [norms, programs, width] or None
    row_index,  # [rows] or None
    place,  # [x_rows] or None
    offsets,  # [norms * modalities_per_norm + 1] or None
    rows, x_rows, width, grad_stride, x_stride, norms, modalities_per_norm,
    PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    extent = row_extent(offsets, norms * modalities_per_norm, rows)
    share = rows_per_program(extent, tl.num_programs(0), BLOCK_ROWS)
    first = program * share
    last = tl.minimum(first + share, extent)
    norm = 0
    while norm < norms:
        tile, stop = rows_of_norm(offsets, norm, modalities_per_norm, first, last)
        if tile < stop:
            partial = (norm * tl.num_programs(0) + program).to(tl.int64) * width
            if weight is not None:
                w = load_vector(weight + norm * width, width, PARTS, BLOCK_WIDTH)
            total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
            while tile < stop:
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                source = row
                if row_index is not None:
                    source = tl.load(row_index + row, mask=live, other=0)
                r = tl.load(rrms + row, mask=live, other=0)[:, None]
                held = ()
                sums = ()
                g_xhat_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                for part in tl.static_range(PARTS):
                    dy = load_rows(grad, grad_stride, row, live, width, part, BLOCK_WIDTH)
                    value = load_rows(x, x_stride, source, live, width, part, BLOCK_WIDTH)
                    held += ((dy, value),)
                    g_xhat = dy.to(tl.float32) * (value.to(tl.float32) * r)
                    sums += (total[part] + g_xhat,)
                    if weight is not None:
                        g_xhat = g_xhat * w[part]
                    g_xhat_total += g_xhat
                total = sums
                g_xhat_mean = (tl.sum(g_xhat_total, 1) / width)[:, None]
                for part in tl.static_range(PARTS):
                    dy, value = held[part]
                    g = dy.to(tl.float32)
                    if weight is not None:
                        g = g * w[part]
                    result = (g - value.to(tl.float32) * r * g_xhat_mean) * r
                    store_rows(dx, source, live, width, result, part, BLOCK_WIDTH)
                tile += BLOCK_ROWS
            if dweight is not None:
                store_sums(dweight + partial, total, width, PARTS, BLOCK_WIDTH)
        norm += 1
    if place is not None:
        store_zeros_unplaced(dx, place, x_rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    elif offsets is not None:
        store_zeros(dx, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)


def rms_norm_forward(given: RMSNormInputs) -> RMSNormOutputs:
    """Launch ``rms_norm_forward_kernel``."""
    x, walk = unit_columns(given.x), _walk(given)
    row_index = walk["row_index"]
    count = x.shape[0] if row_index is None else row_index.shape[0]
    y = torch.empty((count, x.shape[1]), dtype=x.dtype, device=x.device)
    rrms = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    parameters, programs = parameters_for("rms_norm", x, count)
    arguments = {"x": x, "y": y, "rrms": rrms, "rows": count, "x_stride": x.stride(0), "eps": given.eps, **walk}
    launch_over_rows(rms_norm_forward_kernel, programs, arguments, parameters)
    return RMSNormOutputs(y, rrms)


def rms_norm_backward(saved: RMSNormSaved, needs: Needs) -> RMSNormGradients:
    """Launch ``rms_norm_backward_kernel``, and a sum for each weight that needs one."""
    grad, x, walk = unit_columns(saved.grad_y), unit_columns(saved.x), _walk(saved)
    row_index, offsets, norms = walk["row_index"], walk["offsets"], walk["norms"]
    count = grad.shape[0]
    parameters, programs = parameters_for("rms_norm_backward", x, count)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = new_partials(norms, programs, x) if any(needs.weight) else None
    arguments = {
        "grad": grad, "x": x, "dx": dx, "rrms": saved.rrms, "dweight": partial,
        "place": None if row_index is None else row_places(row_index, offsets, x.shape[0]), "rows": count,
        "x_rows": x.shape[0], "grad_stride": grad.stride(0), "x_stride": x.stride(0), **walk,
    }  # fmt: skip
    launch_over_rows(rms_norm_backward_kernel, programs, arguments, parameters)
    gradients = new_where_needed(saved.weight, needs.weight)
    sum_by_norm([partial], [gradients], norms, offsets, count, parameters)
    return RMSNormGradients(dx, gradients)


def _walk(given: RMSNormInputs | RMSNormSaved) -> dict[str, Any]:
    """Which rows both kernels walk over, and whose weights scale them."""
    offsets, norms = compact(given.routing.offsets), max(len(given.weight), 1)
    return {
        "weight": stacked(given.weight), "row_index": compact(given.routing.row_index), "offsets": offsets,
        "width": given.x.shape[1], "norms": norms,
        "modalities_per_norm": 0 if offsets is None else (offsets.shape[0] - 1) // norms,
    }  # fmt: skip
