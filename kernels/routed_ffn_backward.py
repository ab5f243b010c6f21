"""The backward pass of the routed feed-forward network on grouped products.

With dy = grad * drop_path * gamma, the folded Sub-LayerNorm's c = gl W2 and e = bl W2 + b2, and hhat = (h - mu) r:

    m1 = dy c / f,  m2 = dy (y - e) / f,  db2 = sum dy,  dgamma = sum grad * drop_path * y      rows of the stream, once
    dh = r (gl (dy W2) - m1 - hhat m2),  du = dh v act'(u),  dv = dh act(u),  and hhat itself   a product's epilogue
    Ghat = dy^T hhat:  dW2 = Ghat gl + db2 (x) bl,  dgl = colsum(W2 * Ghat),  dbl = W2^T db2    a product's epilogue
    dW0 = du^T z,  dW1 = dv^T z,  dz = du W0 + dv W1

Without Sub-LayerNorm dh = dy W2, and h takes hhat's place. No sum depends on which program comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.activation import activation_and_slope
from onepeace_fast.kernels.grouped_gemm import (
    add_x_w,
    column_pieces,
    contiguous_for_descriptors,
    for_descriptors,
    launch_tiles,
    matrix,
    of_modality,
    row_stride,
    tiles_for,
    vectors,
    walk_rows,
)
from onepeace_fast.kernels.grouped_gradients import NormedLayer, WeightGradient
from onepeace_fast.kernels.grouped_gradients import gradients as all_gradients
from onepeace_fast.kernels.launch import cdiv, compact
from onepeace_fast.kernels.routed_ffn import hidden
from onepeace_fast.kernels.routed_ffn_norm_gradient import any_given, sum_norm_tiles
from onepeace_fast.kernels.routed_ffn_scale_gradient import scaled_gradient
from onepeace_fast.structures import FeedForwardWeights, Needs, RoutedFFNGradients, RoutedFFNSaved


@triton.jit
def _tensors(given, modality, stop, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr):
    dy, w2, width, hidden, dy_stride = given[0]
    return (
        modality,
        stop,
        matrix(dy, stop, width, dy_stride, BLOCK_ROWS, BLOCK_INNER),
        matrix(of_modality(w2, modality), width, hidden, hidden, BLOCK_INNER, BLOCK_COLUMNS),
    )


@triton.jit
def _tile(
    given, tensors, row, column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    _dy, _w2, width, hidden, _dy_stride = given[0]
    u, v, du, dv, hhat, mean, rstd, m1, m2, norm_weight = given[1]
    modality, stop, dy_rows, weight = tensors
    ACTIVATION: tl.constexpr = given[2]
    PIECES: tl.constexpr = given[3]
    PIECE_COLUMNS: tl.constexpr = BLOCK_COLUMNS // PIECES
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    total = add_x_w(total, dy_rows, weight, row, column, width, BLOCK_INNER)
    tile_rows = row + tl.arange(0, BLOCK_ROWS)
    live = tile_rows < stop
    if mean is not None:
        mu = tl.load(mean + tile_rows, mask=live, other=0)[:, None]
        r = tl.load(rstd + tile_rows, mask=live, other=0)[:, None]
        g_mean = tl.load(m1 + tile_rows, mask=live, other=0)[:, None]
        g_hhat_mean = tl.load(m2 + tile_rows, mask=live, other=0)[:, None]
    pieces = column_pieces(total, PIECES)
    for piece in tl.static_range(PIECES):
        dh = pieces[piece]
        at = column + piece * PIECE_COLUMNS + tl.arange(0, PIECE_COLUMNS)
        mask = live[:, None] & (at < hidden)[None, :]
        cell = tile_rows.to(tl.int64)[:, None] * hidden + at[None, :]
        h, slope = activation_and_slope(tl.load(u + cell, mask=mask, other=0), ACTIVATION)
        activated = h
        if v is not None:
            value = tl.load(v + cell, mask=mask, other=0).to(tl.float32)
            h = h * value
            slope = slope * value
        if mean is not None:
            h = (h - mu) * r
            scale = tl.load(of_modality(norm_weight, modality) + at, mask=at < hidden, other=0)
            dh = (dh * scale.to(tl.float32)[None, :] - g_mean - h * g_hhat_mean) * r
        if hhat is not None:
            tl.store(hhat + cell, h.to(hhat.dtype.element_ty), mask=mask)
        tl.store(du + cell, (dh * slope).to(du.dtype.element_ty), mask=mask)
        if dv is not None:
            tl.store(dv + cell, (dh * activated).to(dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def routed_ffn_hidden_gradient_kernel(
    dy,  # [rows, width]
    w2,  # of each modality [width, hidden]
    u,  # [rows, hidden]
    v,  # [rows, hidden] or None
    du,  # [rows, hidden]
    dv,  # [rows, hidden] or None
    hhat,  # [rows, hidden] or None
    mean,  # [rows, 1] or None
    rstd,  # [rows, 1] or None
    m1,  # [rows] or None
    m2,  # [rows] or None
    norm_weight,  # of each modality [hidden], or None
    offsets,  # [MODALITIES + 1]
    rows, width, hidden, dy_stride,
    MODALITIES: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, ROW_TILES_AT_ONCE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    walk_rows(
        offsets, rows, hidden,
        ((dy, w2, width, hidden, dy_stride), (u, v, du, dv, hhat, mean, rstd, m1, m2, norm_weight), ACTIVATION, PIECES),
        _tensors, _tile, MODALITIES, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, ROW_TILES_AT_ONCE,
    )  # fmt: skip


def hidden_gradient(
    dy: Tensor, saved: RoutedFFNSaved, m1: Tensor | None, m2: Tensor | None, hhat_needed: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """du, dv and hhat (h without norm), [rows, hidden]; rows past the last offset are not written."""
    w2 = contiguous_for_descriptors(saved.weights.w2)
    dy, u, v = for_descriptors(dy), saved.u.contiguous(), compact(saved.v)
    rows, (width, hidden) = dy.shape[0], w2[0].shape
    du = torch.empty((rows, hidden), dtype=u.dtype, device=u.device)
    dv, hhat = None if v is None else torch.empty_like(du), torch.empty_like(du) if hhat_needed else None
    arguments = {
        "dy": dy, "w2": w2, "u": u, "v": v, "du": du, "dv": dv, "hhat": hhat, "mean": saved.mean, "rstd": saved.rstd,
        "m1": m1, "m2": m2, "norm_weight": vectors(saved.weights.norm_weight),
        "offsets": compact(saved.routing.offsets), "rows": rows, "width": width, "hidden": hidden,
        "dy_stride": row_stride(dy),
    }  # fmt: skip
    entry = "routed_ffn_hidden_gradient"
    constants = {
        "MODALITIES": len(w2), "ACTIVATION": saved.settings.activation, "PIECES": tiles_for(entry, dy)[0].pieces,
    }  # fmt: skip
    launch_tiles(routed_ffn_hidden_gradient_kernel, entry, rows, hidden, len(w2), arguments, constants)
    return du, dv, hhat


def output_layer(
    dy: Tensor, hhat: Tensor | None, db2: Tensor, saved: RoutedFFNSaved, gradients: FeedForwardWeights
) -> WeightGradient | None:
    """What ``all_gradients`` is given of W2; where it needs none itself but its norm does, something to store into."""
    if hhat is None:
        return None
    weights, modalities = saved.weights, len(saved.weights.w2)
    if not weights.norm_weight:
        return WeightGradient(dy, hhat, gradients.w2)
    width, hidden = weights.w2[0].shape
    of_norm = zip(gradients.w2, gradients.norm_weight, gradients.norm_bias, strict=True)
    unused = None if all([out is not None for out in gradients.w2]) else torch.empty_like(weights.w2[0])
    outs = [(unused if mine[0] is None else mine[0]) if any_given(mine) else None for mine in of_norm]
    row_tiles = cdiv(width, tiles_for("gradients", dy)[0].block_rows)
    sums = dy.new_empty((2, modalities * row_tiles, hidden), dtype=torch.float32)
    return WeightGradient(
        dy, hhat, outs, NormedLayer(weights.w2, weights.norm_weight, weights.norm_bias, db2, *sums.unbind())
    )


def routed_ffn_backward(saved: RoutedFFNSaved, needs: Needs) -> RoutedFFNGradients:
    """The backward pass by grouped products; u and v are computed again where they were not kept."""
    z, weights, offsets = saved.z, saved.weights, saved.routing.offsets
    if saved.u is None:
        u, v, *_ = hidden(z, weights, offsets, saved.settings, normed=False, keep_products=True, keep_a=False)
        saved = saved._replace(u=u, v=v)
    gradients = FeedForwardWeights(*[
        [torch.empty_like(p, memory_format=torch.contiguous_format) if need else None
         for p, need in zip(parameters, flags, strict=True)]
        for parameters, flags in zip(weights, needs.weights, strict=True)
    ])  # fmt: skip
    dgamma = torch.empty_like(saved.gamma, memory_format=torch.contiguous_format) if needs.gamma else None
    normed = bool(weights.norm_weight)
    hhat_needed = any_given((*gradients.w2, *gradients.norm_weight, *gradients.norm_bias))
    sums_needed = any_given(gradients.b2) or (normed and hhat_needed)
    dy, m1, m2, row_sums = scaled_gradient(saved, sums_needed, gradients.b2, dgamma)
    du, dv, hhat = hidden_gradient(dy, saved, m1, m2, hhat_needed)
    layers = [WeightGradient(du, z, gradients.w0)]
    layers += [] if dv is None else [WeightGradient(dv, z, gradients.w1)]
    output = output_layer(dy, hhat, row_sums, saved, gradients)
    dz = all_gradients(layers, [weights.w0, weights.w1][: len(layers)], output, offsets)
    if output is not None and output.norm is not None:
        sum_norm_tiles(output.norm.norm_weight_sums, output.norm.norm_bias_sums, gradients, weights)
    return RoutedFFNGradients(dz, gradients, None, dgamma)
