"""Gate and Sub-LayerNorm of packed rows: the formulas stand in ``onepeace_fast/ops/gated_sub_ln.py``.

A program walks over rows of u and v and computes h in float32 registers; h is never stored. Both passes read a row
once, and keep the norm of a modality and the sums for its gradients in registers while they walk over its rows. The
backward pass holds h and its derivatives, and copies the rows that come next into shared memory where that fits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.activation import activation_and_slope
from onepeace_fast.kernels.grouped_gemm import of_modality, vectors
from onepeace_fast.kernels.launch import compact, launch_over_rows, parameters_for, stages, unit_columns
from onepeace_fast.kernels.layer_norm import mean_and_rstd
from onepeace_fast.kernels.partial_sums import new_partials, new_where_needed, store_sums, sum_by_norm, zero_sums
from onepeace_fast.kernels.rows import (
    load_rows,
    load_vector,
    row_extent,
    rows_of_norm,
    share_of_rows,
    store_rows,
    store_zeros,
)
from onepeace_fast.structures import GatedSubLNGradients, GatedSubLNInputs, GatedSubLNOutputs, GatedSubLNSaved, Needs


@triton.jit
def _load_u_and_v(
    u,  # [rows, width]
    v,  # [rows, width] or None
    u_stride, v_stride, row, live, width, part, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A part of the columns of both; u's twice where there is no v."""
    u_part = load_rows(u, u_stride, row, live, width, part, BLOCK_WIDTH)
    v_part = u_part
    if v is not None:
        v_part = load_rows(v, v_stride, row, live, width, part, BLOCK_WIDTH)
    return u_part, v_part


@triton.jit
def _hidden(u_part, v_part, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """h, and its derivatives by v and u."""
    activated, slope = activation_and_slope(u_part, ACTIVATION)
    h = activated
    if GATED:
        h = activated * v_part.to(tl.float32)
        slope = slope * v_part.to(tl.float32)
    return h, activated, slope


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def gated_sub_ln_forward_kernel(
    u,  # [rows, width]
    v,  # [rows, width] or None
    n,  # [rows, width]
    mean,  # [rows, 1]
    rstd,  # [rows, 1]
    weight,  # of each modality [width], or None
    bias,  # of each modality [width], or None
    offsets,  # [modalities + 1]
    rows, width, u_stride, v_stride, modalities, eps,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    extent = row_extent(offsets, modalities, rows)
    store_zeros(n, None, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    if weight is not None:
        store_zeros(mean, None, extent, rows, 1, BLOCK_ROWS, 1)
        store_zeros(rstd, None, extent, rows, 1, BLOCK_ROWS, 1)
    first, last = share_of_rows(extent, BLOCK_ROWS)
    modality = 0
    while modality < modalities:
        tile, stop = rows_of_norm(offsets, modality, 1, first, last)
        if tile < stop:
            if weight is not None:
                w = load_vector(of_modality(weight, modality), width, PARTS, BLOCK_WIDTH)
                b = load_vector(of_modality(bias, modality), width, PARTS, BLOCK_WIDTH)
            while tile < stop:
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                h = ()
                for part in tl.static_range(PARTS):
                    u_part, v_part = _load_u_and_v(u, v, u_stride, v_stride, row, live, width, part, BLOCK_WIDTH)
                    hidden, _, _ = _hidden(u_part, v_part, v is not None, ACTIVATION)
                    h += (hidden,)
                if weight is not None:
                    mu, r = mean_and_rstd(h, width, eps, True, PARTS, BLOCK_ROWS, BLOCK_WIDTH)
                    store_rows(mean, row, live, 1, mu, 0, 1)
                    store_rows(rstd, row, live, 1, r, 0, 1)
                for part in tl.static_range(PARTS):
                    result = h[part]
                    if weight is not None:
                        result = (result - mu) * r * w[part] + b[part]
                    store_rows(n, row, live, width, result, part, BLOCK_WIDTH)
                tile += BLOCK_ROWS
        modality += 1


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def gated_sub_ln_backward_kernel(
    grad,  # [rows, width]
    u,  # [rows, width]
    v,  # [rows, width] or None
    du,  # [rows, width]
    dv,  # [rows, width] or None
    n,  # [rows, width] or None
    mean,  # [rows, 1]
    rstd,  # [rows, 1]
    weight,  # of each modality [width], or None
    bias,  # of each modality [width], or None
    dweight,  # [modalities, programs, width] or None
    dbias,  # [modalities, programs, width] or None
    offsets,  # [modalities + 1]
    rows, width, grad_stride, u_stride, v_stride, modalities,
    ACTIVATION: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    extent = row_extent(offsets, modalities, rows)
    store_zeros(du, None, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    if v is not None:
        store_zeros(dv, None, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    if n is not None:
        store_zeros(n, None, extent, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    first, last = share_of_rows(extent, BLOCK_ROWS)
    modality = 0
    while modality < modalities:
        start, stop = rows_of_norm(offsets, modality, 1, first, last)
        if start < stop:
            partial = (modality * tl.num_programs(0) + program).to(tl.int64) * width
            if weight is not None:
                w = load_vector(of_modality(weight, modality), width, PARTS, BLOCK_WIDTH)
                if bias is not None:
                    b = load_vector(of_modality(bias, modality), width, PARTS, BLOCK_WIDTH)
                w_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
                b_total = zero_sums(PARTS, BLOCK_ROWS, BLOCK_WIDTH)
            for tile in tl.range(start, stop, BLOCK_ROWS, num_stages=STAGES):
                row = tile + tl.arange(0, BLOCK_ROWS)
                live = row < stop
                mu = 0.0
                r = 0.0
                if weight is not None:
                    mu = load_rows(mean, 1, row, live, 1, 0, 1)
                    r = load_rows(rstd, 1, row, live, 1, 0, 1)
                held = ()
                w_sums = ()
                b_sums = ()
                g_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                g_hhat_total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
                # Past the width dn is zero, and so is what hhat takes part in.
                for part in tl.static_range(PARTS):
                    dn = load_rows(grad, grad_stride, row, live, width, part, BLOCK_WIDTH)
                    u_part, v_part = _load_u_and_v(u, v, u_stride, v_stride, row, live, width, part, BLOCK_WIDTH)
                    h, activated, slope = _hidden(u_part, v_part, v is not None, ACTIVATION)
                    if weight is not None:
                        h = (h - mu) * r
                        g = dn.to(tl.float32)
                        g_h = g * h
                        w_sums += (w_total[part] + g_h,)
                        b_sums += (b_total[part] + g,)
                        g_total += g * w[part]
                        g_hhat_total += g_h * w[part]
                    held += ((dn, h, activated, slope),)
                if weight is not None:
                    w_total = w_sums
                    b_total = b_sums
                    g_mean = (tl.sum(g_total, 1) / width)[:, None]
                    g_hhat_mean = (tl.sum(g_hhat_total, 1) / width)[:, None]
                for part in tl.static_range(PARTS):
                    dn, h, activated, slope = held[part]
                    dh = dn.to(tl.float32)
                    if weight is not None:
                        dh = (dh * w[part] - g_mean - h * g_hhat_mean) * r
                        if bias is not None:
                            h = h * w[part] + b[part]
                    if n is not None:
                        store_rows(n, row, live, width, h, part, BLOCK_WIDTH)
                    if dv is not None:
                        store_rows(dv, row, live, width, dh * activated, part, BLOCK_WIDTH)
                    store_rows(du, row, live, width, dh * slope, part, BLOCK_WIDTH)
            if dweight is not None:
                store_sums(dweight + partial, w_total, width, PARTS, BLOCK_WIDTH)
            if dbias is not None:
                store_sums(dbias + partial, b_total, width, PARTS, BLOCK_WIDTH)
        modality += 1


def gated_sub_ln_forward(given: GatedSubLNInputs) -> GatedSubLNOutputs:
    """Launch ``gated_sub_ln_forward_kernel``."""
    u, v, offsets = unit_columns(given.u), unit_columns(given.v), compact(given.routing.offsets)
    rows, width = u.shape
    n = torch.empty((rows, width), dtype=u.dtype, device=u.device)
    mean = rstd = None
    if given.norm_weight:
        mean, rstd = (torch.empty((rows, 1), dtype=torch.float32, device=u.device) for _ in range(2))
    parameters, programs = parameters_for("gated_sub_ln", u, rows)
    arguments = {
        "u": u, "v": v, "n": n, "mean": mean, "rstd": rstd, "weight": vectors(given.norm_weight),
        "bias": vectors(given.norm_bias), "offsets": offsets, "rows": rows, "width": width, "u_stride": u.stride(0),
        "v_stride": 0 if v is None else v.stride(0), "modalities": offsets.shape[0] - 1, "eps": given.eps,
    }  # fmt: skip
    launch_over_rows(gated_sub_ln_forward_kernel, programs, arguments, parameters, ACTIVATION=given.activation)
    return GatedSubLNOutputs(n, mean, rstd)


def gated_sub_ln_backward(saved: GatedSubLNSaved, needs: Needs) -> GatedSubLNGradients:
    """Launch ``gated_sub_ln_backward_kernel``, and a sum for each modality that needs one."""
    return gated_sub_ln_backward_and_n(saved, needs, n_needed=False)[0]


def gated_sub_ln_backward_and_n(
    saved: GatedSubLNSaved, needs: Needs, n_needed: bool = True
) -> tuple[GatedSubLNGradients, Tensor | None]:
    """The gradients, and n once more: the products on either side need it and it costs no further reading here."""
    grad, u, v = unit_columns(saved.grad_n), unit_columns(saved.u), unit_columns(saved.v)
    offsets = compact(saved.routing.offsets)
    rows, width = u.shape
    modalities = offsets.shape[0] - 1
    parameters, programs = parameters_for("gated_sub_ln_backward", u, rows)

    def like_u(needed: bool) -> Tensor | None:
        return torch.empty((rows, width), dtype=u.dtype, device=u.device) if needed else None

    du, dv, n = like_u(True), like_u(v is not None), like_u(n_needed)
    partials = [
        new_partials(modalities, programs, u) if any(flags) else None for flags in (needs.norm_weight, needs.norm_bias)
    ]
    arguments = {
        "grad": grad, "u": u, "v": v, "du": du, "dv": dv, "n": n, "mean": saved.mean, "rstd": saved.rstd,
        "weight": vectors(saved.norm_weight), "bias": vectors(saved.norm_bias) if n_needed else None,
        "dweight": partials[0], "dbias": partials[1], "offsets": offsets, "rows": rows, "width": width,
        "grad_stride": grad.stride(0), "u_stride": u.stride(0), "v_stride": 0 if v is None else v.stride(0),
        "modalities": modalities,
    }  # fmt: skip
    # A norm's row in several parts takes all registers: sm_90 has none left for what copies the next one.
    ahead = stages(parameters, grad, u, v) if parameters.parts == 1 or not saved.norm_weight else 1
    constants = {"ACTIVATION": saved.activation, "STAGES": ahead}
    launch_over_rows(gated_sub_ln_backward_kernel, programs, arguments, parameters, **constants)
    gradients = [
        new_where_needed(saved.norm_weight, needs.norm_weight), new_where_needed(saved.norm_bias, needs.norm_bias),
    ]  # fmt: skip
    sum_by_norm(partials, gradients, modalities, offsets, rows, parameters)
    return GatedSubLNGradients(du, dv, *gradients), n
