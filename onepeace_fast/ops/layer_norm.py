"""LayerNorm of packed rows, with one weight and bias for all rows or one per modality.

    y = (c * x - mean) * rstd * weight + bias,   mean and rstd = 1 / sqrt(variance + eps) of each row of c * x

(Ba et al., arXiv 1607.06450), c the scale of the column's head where there is one. Rows past the last modality are
inert and come out as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_vector
from onepeace_fast.ops.arguments import check_routing, check_row_index, require_row_index, require_rows
from onepeace_fast.ops.operation import define, no_gradient, only_needed, register_gradient
from onepeace_fast.ops.packed_rows import accumulation_dtype, row_slices


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


def layer_norm_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], head_scale: Tensor | None, row_index: Tensor | None,
    offsets: Tensor | None, row_counts: Sequence[int], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y in x's dtype, mean and rstd [rows, 1]; ``row_index`` are those of x that are read, all where it is None."""
    count = x.shape[0] if row_index is None else row_index.shape[0]
    y = x.new_zeros(count, x.shape[1])
    mean, rstd = (x.new_zeros((count, 1), dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    for group, part in enumerate(_groups(weights, biases, offsets, row_counts, count)):
        scaled = _scaled(x[_source(row_index, part, x)], head_scale)
        y[part], mean[part], rstd[part] = normalize(scaled, _at(weights, group), _at(biases, group), eps)
    return y, mean, rstd


def layer_norm_backward_reference(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor],
    head_scale: Tensor | None, row_index: Tensor | None, offsets: Tensor | None, row_counts: Sequence[int],
    weight_needs: Sequence[bool], bias_needs: Sequence[bool], head_scale_needed: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """With d the gradient of c * x: dx = c d, zero in rows that were not read, and dc = sum(x d) over rows and heads.

    Returns dx and the gradients of the weights, the biases and the head scale c, empty where none is needed.
    """
    dweights = [torch.zeros_like(w) if n else w.new_empty(0) for w, n in zip(weights, weight_needs, strict=True)]
    dbiases = [torch.zeros_like(b) if n else b.new_empty(0) for b, n in zip(biases, bias_needs, strict=True)]
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dscale = mean.new_zeros(head_scale.shape) if head_scale_needed else x.new_empty(0)
    for group, part in enumerate(_groups(weights, biases, offsets, row_counts, grad.shape[0])):
        source = _source(row_index, part, x)
        needs = (True, bool(weights) and weight_needs[group], bool(biases) and bias_needs[group])
        dscaled, dweight, dbias = normalize_backward(
            grad[part], _scaled(x[source], head_scale), mean[part], rstd[part], _at(weights, group), needs
        )
        dx[source] = _scaled(dscaled, head_scale).to(x.dtype)
        if head_scale_needed:
            dscale += (dscaled * x[source]).unflatten(1, (head_scale.shape[0], -1)).sum((0, 2))
        if needs[1]:
            dweights[group].copy_(dweight)
        if needs[2]:
            dbiases[group].copy_(dbias)
    return dx, dweights, dbiases, dscale.to(head_scale.dtype) if head_scale_needed else dscale


def _groups(
    weights: Sequence[Tensor], biases: Sequence[Tensor], offsets: Tensor | None, row_counts: Sequence[int], count: int
) -> Sequence[slice]:
    """The row range of each modality, or one of all real rows where the modalities share their parameters."""
    if offsets is None:
        return [slice(0, count)]
    ranges = list(row_slices(offsets, row_counts))
    shared = max(len(weights), len(biases)) <= 1
    return [slice(0, ranges[-1].stop if ranges else 0)] if shared else ranges


def _source(row_index: Tensor | None, part: slice, x: Tensor) -> slice | Tensor:
    """Where the rows of a range come from."""
    if row_index is None:
        return part
    check_row_index(row_index[part], None, x)
    return row_index[part].long()


def _scaled(x: Tensor, head_scale: Tensor | None) -> Tensor:
    """Every head's columns times its scale, in at least float32."""
    if head_scale is None:
        return x
    dtype = accumulation_dtype(x.dtype)
    heads = x.to(dtype).unflatten(1, (head_scale.shape[0], -1))
    return (heads * head_scale.to(dtype)[:, None]).flatten(1)


def _at(tensors: Sequence[Tensor], group: int) -> Tensor | None:
    return tensors[group] if tensors else None


def _fake(x, weights, biases, head_scale, row_index, offsets, row_counts, eps):
    count = x.shape[0] if row_index is None else row_index.shape[0]
    statistics = x.new_empty((count, 1), dtype=accumulation_dtype(x.dtype))
    return x.new_empty(count, x.shape[1]), statistics, torch.empty_like(statistics)


def _fake_backward(
    grad, x, mean, rstd, weights, biases, head_scale, row_index, offsets, row_counts, weight_needs, bias_needs,
    head_scale_needed,
):  # fmt: skip
    dweights = [torch.empty_like(w) if n else w.new_empty(0) for w, n in zip(weights, weight_needs, strict=True)]
    dbiases = [torch.empty_like(b) if n else b.new_empty(0) for b, n in zip(biases, bias_needs, strict=True)]
    dscale = torch.empty_like(head_scale) if head_scale_needed else x.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweights, dbiases, dscale


_op = define(
    "layer_norm",
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? head_scale, Tensor? row_index, Tensor? offsets,"
    " SymInt[] row_counts, float eps) -> (Tensor, Tensor, Tensor)",
    layer_norm_reference,
    _fake,
    kernel="layer_norm",
)
_backward_op = define(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor[] weights, Tensor[] biases, Tensor? head_scale,"
    " Tensor? row_index, Tensor? offsets, SymInt[] row_counts, bool[] weight_needs, bool[] bias_needs,"
    " bool head_scale_needed) -> (Tensor, Tensor[], Tensor[], Tensor)",
    layer_norm_backward_reference,
    _fake_backward,
    kernel="layer_norm",
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weights, biases, head_scale, row_index, offsets, row_counts, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.groups, ctx.row_counts = len(weights), row_counts
    ctx.save_for_backward(x, mean, rstd, head_scale, row_index, offsets, *weights, *biases)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    x, mean, rstd, head_scale, row_index, offsets, *parameters = ctx.saved_tensors
    weights, biases = parameters[: ctx.groups], parameters[ctx.groups :]
    _, weight_needs, bias_needs, head_scale_needed, *_ = ctx.needs_input_grad
    dx, dweights, dbiases, dscale = _backward_op(
        grad, x, mean, rstd, weights, biases, head_scale, row_index, offsets, ctx.row_counts, list(weight_needs or ()),
        list(bias_needs or ()), head_scale_needed,
    )  # fmt: skip
    return (
        dx,
        only_needed(dweights, weight_needs),
        only_needed(dbiases, bias_needs),
        dscale if head_scale_needed else None,
        None,
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
    head_scale: Tensor | None = None,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
    row_counts: Sequence[int] = (),
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm over the last dimension (Ba et al., arXiv 1607.06450), of all rows or of some.

    Args:
        x: floating point [rows, width], any row stride, at most 16,384 wide.
        weight, bias: [width] for all rows, or with ``offsets`` a sequence of one per modality; None for none.
        head_scale: [heads], a factor of each head's width / heads columns in front of the norm (the head scale of
            NormFormer, Shleifer et al., arXiv 2110.09456).
        row_index: int32 [N], distinct rows of x: row i of the result is the norm of x[row_index[i]], no other is read.
        offsets: int32 [G + 1], first row of each modality in the result; rows of the result past the last are zero.
        row_counts: rows of each modality in the result, where the host knows them.
        eps: added to the variance.

    Returns:
        [rows, width], or [N, width] with ``row_index``, in x's dtype; statistics are float32 for half precision.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    require_rows("x", x)
    require(eps > 0, lambda: f"eps: got {eps}, takes a positive number")
    require_row_index(row_index, x)
    if offsets is not None:
        check_routing(offsets, row_counts, x if row_index is None else row_index)
    groups = 1 if offsets is None else offsets.shape[0] - 1
    weights, biases = _per_group("weight", weight, groups, x), _per_group("bias", bias, groups, x)
    if weights and biases and len(weights) != len(biases):  # one is shared and the other is not
        weights, biases = (values * groups if len(values) == 1 else values for values in (weights, biases))
    if head_scale is not None:
        heads = head_scale.shape[0] if head_scale.dim() == 1 else 0
        require(
            head_scale.is_floating_point() and heads > 0 and x.shape[1] % heads == 0,
            lambda: f"head_scale: got {describe(head_scale)}, takes a floating-point [heads] that divides {x.shape[1]}",
        )
        require_device("head_scale", head_scale, x.device)
    return _op(x, weights, biases, head_scale, row_index, offsets, row_counts, eps)[0]


def _per_group(name: str, value: Tensor | Sequence[Tensor] | None, groups: int, x: Tensor) -> list[Tensor]:
    """The given vectors: none, one for all rows, or one of each modality."""
    values = [] if value is None else [value] if isinstance(value, Tensor) else list(value)
    require(
        isinstance(value, Tensor) or not values or len(values) == groups,
        lambda: f"{name}: got {len(values)} tensors, takes {groups}, one per modality, or a tensor for all",
    )
    for item in values:
        require_vector(name, item, x.shape[1], x.device)
    return values
