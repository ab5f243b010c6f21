"""Gradients of a linear layer and of the LayerScale behind it: the formulas stand in ``ops/linear_residual.py``.

A program reads some rows of the weight and of its product G once, and has all columns of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onepeace_fast.kernels.launch import cdiv, compact, launch, unit_columns

BLOCK_ROWS, BLOCK_COLUMNS, NUM_WARPS = 4, 512, 4


@triton.jit
def linear_residual_gradient_kernel(
    product,  # [width, columns], G
    weight,  # [width, columns]
    dweight,  # [width, columns], which may be G's memory
    total,  # [width]
    bias,  # [width] or None
    gamma,  # [width]
    dbias,  # [width] or None
    dgamma,  # [width]
    width, columns, weight_stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < width
    scale = tl.load(gamma + row, mask=live, other=0).to(tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    first = 0
    while first < columns:
        column = first + tl.arange(0, BLOCK_COLUMNS)
        mask = live[:, None] & (column < columns)[None, :]
        cell = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(product + cell, mask=mask, other=0).to(tl.float32)
        of_weight = row.to(tl.int64)[:, None] * weight_stride + column[None, :]
        sums += value * tl.load(weight + of_weight, mask=mask, other=0).to(tl.float32)
        tl.store(dweight + cell, (value * scale[:, None]).to(dweight.dtype.element_ty), mask=mask)
        first += BLOCK_COLUMNS
    of_rows = tl.load(total + row, mask=live, other=0)
    of_gamma = tl.sum(sums, 1)
    if bias is not None:
        of_gamma += of_rows * tl.load(bias + row, mask=live, other=0).to(tl.float32)
        tl.store(dbias + row, (of_rows * scale).to(dbias.dtype.element_ty), mask=live)
    tl.store(dgamma + row, of_gamma.to(dgamma.dtype.element_ty), mask=live)


def parameter_gradients(
    product: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch ``linear_residual_gradient_kernel``; dW overwrites G, which is contiguous."""
    weight, bias, gamma = unit_columns(weight), compact(bias), compact(gamma)
    width, columns = weight.shape
    dgamma, dbias = torch.empty_like(gamma), None if bias is None else torch.empty_like(bias)
    arguments = {
        "product": product, "weight": weight, "dweight": product, "total": total, "bias": bias, "gamma": gamma,
        "dbias": dbias, "dgamma": dgamma, "width": width, "columns": columns, "weight_stride": weight.stride(0),
    }  # fmt: skip
    constants = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    launch(linear_residual_gradient_kernel, (cdiv(width, BLOCK_ROWS),), arguments, constants, NUM_WARPS)
    return product, dbias, dgamma
