"""LayerNorm of packed rows, with one weight and bias for all rows or one per modality.

    y = (x - mean) * rstd * weight + bias,   mean and rstd = 1 / sqrt(variance + eps) of each row

(Ba et al., arXiv 1607.06450). Rows past the last modality are inert and come out as zero when the weights are routed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import require, require_tensor, require_vector
from onepeace_fast.ops._library import (
    accumulation_dtype,
    check_routing,
    define,
    no_gradient,
    only_needed,
    register_gradient,
    row_slices,
)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of every row: the result in x's dtype, mean and reciprocal deviation [rows, 1] in at least float32."""
    dtype = accumulation_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    return y.to(x.dtype), mean, rstd


def normalize_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``normalize``; with xhat = (x - mean) rstd and g = grad weight,

    dx = rstd (g - mean(g) - xhat mean(g xhat)),  dweight = sum(grad xhat),  dbias = sum(grad).
    """
    dtype = mean.dtype
    weight = None if weight is None else weight.to(dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype).contiguous(), x.to(dtype), x.shape[-1:], mean, rstd, weight,
        x.new_zeros(x.shape[-1], dtype=dtype) if needs[2] else None, [True, *needs[1:]],
    )  # fmt: skip
    return dx, dweight, dbias


def layer_norm_specification(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], offsets: Tensor | None, row_counts: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y [rows, width] in x's dtype, and mean and rstd [rows, 1]."""
    if offsets is None:
        return normalize(x, _first(weights), _first(biases), eps)
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_zeros((x.shape[0], 1), dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    for group, rows in enumerate(row_slices(offsets, row_counts)):
        y[rows], mean[rows], rstd[rows] = normalize(x[rows], _at(weights, group), _at(biases, group), eps)
    return y, mean, rstd


def layer_norm_backward_specification(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor],
    offsets: Tensor | None, row_counts: Sequence[int], weight_needs: Sequence[bool], bias_needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Returns dx and the gradients of the weights and biases, empty where none is needed."""
    dweights = [torch.zeros_like(w) if n else w.new_empty(0) for w, n in zip(weights, weight_needs, strict=True)]
    dbiases = [torch.zeros_like(b) if n else b.new_empty(0) for b, n in zip(biases, bias_needs, strict=True)]
    ranges = [slice(None)] if offsets is None else row_slices(offsets, row_counts)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for group, rows in enumerate(ranges):
        needs = (True, bool(weights) and weight_needs[group], bool(biases) and bias_needs[group])
        part, dweight, dbias = normalize_backward(
            grad[rows], x[rows], mean[rows], rstd[rows], _at(weights, group), needs
        )
        dx[rows] = part
        if needs[1]:
            dweights[group].copy_(dweight)
        if needs[2]:
            dbiases[group].copy_(dbias)
    return dx, dweights, dbiases


def _first(tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _at(tensors: Sequence[Tensor], group: int) -> Tensor | None:
    return tensors[group] if tensors else None


def _fake(x, weights, biases, offsets, row_counts, eps):
    statistics = x.new_empty((x.shape[0], 1), dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), statistics, torch.empty_like(statistics)


def _fake_backward(
    grad, x, mean, rstd, weights, biases, offsets, row_counts, weight_needs, bias_needs
):  # fmt: skip
    dweights = [torch.empty_like(w) if n else w.new_empty(0) for w, n in zip(weights, weight_needs, strict=True)]
    dbiases = [torch.empty_like(b) if n else b.new_empty(0) for b, n in zip(biases, bias_needs, strict=True)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweights, dbiases


_op = define(
    "layer_norm",
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? offsets, SymInt[] row_counts, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    layer_norm_specification,
    _fake,
    kernel="layer_norm",
)
_backward_op = define(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor[] weights, Tensor[] biases, Tensor? offsets,"
    " SymInt[] row_counts, bool[] weight_needs, bool[] bias_needs) -> (Tensor, Tensor[], Tensor[])",
    layer_norm_backward_specification,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weights, biases, offsets, row_counts, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.groups, ctx.row_counts = len(weights), row_counts
    ctx.save_for_backward(x, mean, rstd, offsets, *weights, *biases)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    x, mean, rstd, offsets, *parameters = ctx.saved_tensors
    weights, biases = parameters[: ctx.groups], parameters[ctx.groups :]
    _, weight_needs, bias_needs, *_ = ctx.needs_input_grad
    dx, dweights, dbiases = _backward_op(
        grad, x, mean, rstd, weights, biases, offsets, ctx.row_counts, list(weight_needs or ()), list(bias_needs or ())
    )
    return (
        dx,
        only_needed(dweights, weight_needs),
        only_needed(dbiases, bias_needs),
        None,
        no_gradient(ctx.row_counts),
        None,
    )


register_gradient("layer_norm", _setup_context, _backward)


def layer_norm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    offsets: Tensor | None = None,
    row_counts: Sequence[int] = (),
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm over the last dimension (Ba et al., arXiv 1607.06450).

    Args:
        x: floating point [rows, width], any row stride.
        weight, bias: [width], or with ``offsets`` a sequence of one per modality; None for none.
        offsets: int32 [G + 1], a plan's offsets, where weights are per modality.
        row_counts: the plan's row counts, where the host knows them.
        eps: added to the variance.

    Returns:
        [rows, width] in x's dtype; statistics are float32 for half precision.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    require_tensor("x", x, floats, "[rows, width]", 2)
    if offsets is not None:
        check_routing(offsets, row_counts, x)
    groups = 1 if offsets is None else offsets.shape[0] - 1
    parameters = []
    for name, value in (("weight", weight), ("bias", bias)):
        values = [] if value is None else [value] if isinstance(value, Tensor) else list(value)
        require(
            not values or len(values) == groups,
            lambda name=name, values=values: (
                f"{name}: got {len(values)} tensors, takes {groups}, one per modality of offsets"
            ),
        )
        for item in values:
            require_vector(name, item, x.shape[1], x.device)
        parameters.append(values)
    require(eps > 0, lambda: f"eps: got {eps}, takes a positive number")
    return _op(x, *parameters, offsets, row_counts, eps)[0]
