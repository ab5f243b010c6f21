"""A linear layer of each modality by grouped products, in one launch for each pass and operand.

y = x W^T + b;  dx = dy W,  dW = dy^T x,  db = sum dy. No sum depends on which program comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.grouped_gemm import (
    add_x_wt,
    contiguous_for_descriptors,
    for_descriptors,
    launch_tiles,
    matrix,
    of_modality,
    row_stride,
    vectors,
    walk_rows,
)
from onepeace_fast.kernels.grouped_gradients import WeightGradient, gradients
from onepeace_fast.kernels.launch import compact
from onepeace_fast.kernels.routed_ffn_scale_gradient import modality_sums
from onepeace_fast.kernels.rows import row_extent, store_zeros
from onepeace_fast.structures import (
    Needs,
    RoutedLinearGradients,
    RoutedLinearInputs,
    RoutedLinearOutputs,
    RoutedLinearSaved,
)


@triton.jit
def _tensors(given, modality, stop, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr):
    x, weights, bias, out, inner, columns, x_stride = given
    shift = out
    if bias is not None:
        shift = of_modality(bias, modality)
    return (
        matrix(x, stop, inner, x_stride, BLOCK_ROWS, BLOCK_INNER),
        matrix(of_modality(weights, modality), columns, inner, inner, BLOCK_COLUMNS, BLOCK_INNER),
        matrix(out, stop, columns, columns, BLOCK_ROWS, BLOCK_COLUMNS),
        shift,
    )


@triton.jit
def _tile(
    given, tensors, row, column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    _x, _weights, bias, out, inner, columns, _stride = given
    x_rows, weight, out_rows, shift = tensors
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    total = add_x_wt(total, x_rows, weight, row, column, inner, BLOCK_INNER)
    if bias is not None:
        at = column + tl.arange(0, BLOCK_COLUMNS)
        total += tl.load(shift + at, mask=at < columns, other=0).to(tl.float32)[None, :]
    out_rows.store([row, column], total.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["offsets"])
def routed_linear_kernel(
    x,  # [rows, inner]
    weights,  # of each modality [columns, inner]
    bias,  # of each modality [columns], or None
    out,  # [rows, columns]
    offsets,  # [MODALITIES + 1]
    rows, inner, columns, x_stride,
    MODALITIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    ROW_TILES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    walk_rows(
        offsets, rows, columns, (x, weights, bias, out, inner, columns, x_stride), _tensors, _tile, MODALITIES,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, ROW_TILES_AT_ONCE,
    )  # fmt: skip
    store_zeros(out, None, row_extent(offsets, MODALITIES, rows), rows, columns, 32, BLOCK_COLUMNS)


def routed_linear_forward(given: RoutedLinearInputs) -> RoutedLinearOutputs:
    """The forward pass; what the op's reference returns."""
    x, weights = for_descriptors(given.x), contiguous_for_descriptors(given.weight)
    rows, (columns, inner), modalities = x.shape[0], weights[0].shape, len(weights)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    arguments = {
        "x": x, "weights": weights, "bias": vectors(given.bias), "out": out, "offsets": compact(given.routing.offsets),
        "rows": rows, "inner": inner, "columns": columns, "x_stride": row_stride(x),
    }  # fmt: skip
    launch_tiles(
        routed_linear_kernel, "routed_linear", rows, columns, modalities, arguments, {"MODALITIES": modalities}
    )
    return RoutedLinearOutputs(out)


def routed_linear_backward(saved: RoutedLinearSaved, needs: Needs) -> RoutedLinearGradients:
    """The backward pass; what the op's backward reference returns."""
    dy, x, weight, offsets = saved.grad_y, saved.x, saved.weight, saved.routing.offsets
    dweight: list[Tensor | None] = [
        torch.empty_like(w, memory_format=torch.contiguous_format) if need else None
        for w, need in zip(weight, needs.weight, strict=True)
    ]
    dbias = [dy.new_empty(dy.shape[1]) if need else None for need in needs.bias]
    dx = gradients([WeightGradient(dy, x, dweight)], [weight] if needs.x else None, None, offsets)
    if any(needs.bias):
        modality_sums(dy, offsets, dbias)
    return RoutedLinearGradients(dx, dweight, dbias)
