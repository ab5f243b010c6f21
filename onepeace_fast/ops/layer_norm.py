"""LayerNorm of packed rows, with one weight and bias for all rows or one per modality.

    y = (c * x - mean) * rstd * weight + bias,   mean and rstd = 1 / sqrt(variance + eps) of each row of c * x

(Ba et al., arXiv 1607.06450), c the scale of the column's head where there is one. Rows past the last modality are
inert and come out as zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device
from onepeace_fast.ops.arguments import check_offsets, norm_vectors, require_eps, require_norm_routing, require_rows
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import accumulation_dtype, rows_of_norms, source_rows
from onepeace_fast.structures import (
    LayerNormGradients,
    LayerNormInputs,
    LayerNormOutputs,
    LayerNormSaved,
    Needs,
    Routing,
)


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm of every row: the result in x's dtype, mean and reciprocal deviation [rows, 1] in at least float32.

    With ``rms`` it is RMSNorm, which has no mean and no bias: x / RMS(x) * weight, RMS(x) = sqrt(mean(x^2) + eps).
    """
    dtype = accumulation_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    if rms:
        wide, mean = x.to(dtype).contiguous(), None  # as native_layer_norm reads it
        rstd = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
        y = wide * rstd if weight is None else wide * rstd * weight
    else:
        y, mean, rstd = torch.native_layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    return y.to(x.dtype), mean, rstd


def normalize_backward(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``normalize``; with xhat = (x - mean) rstd and g = grad weight,

    dx = rstd (g - mean(g) - xhat mean(g xhat)),  dweight = sum(grad xhat),  dbias = sum(grad).

    Without a mean it is RMSNorm: xhat = x rstd, and no mean(g).
    """
    dtype = rstd.dtype
    weight = None if weight is None else weight.to(dtype)
    if mean is None:
        grad, x = (one.to(dtype).contiguous() for one in (grad, x))
        xhat = x * rstd
        g = grad if weight is None else grad * weight
        dx = (g - xhat * (g * xhat).mean(1, keepdim=True)) * rstd
        return dx, (grad * xhat).sum(0) if needs[1] else None, None
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype).contiguous(), x.to(dtype), x.shape[-1:], mean, rstd, weight,
        x.new_zeros(x.shape[-1], dtype=dtype) if needs[2] else None, [True, *needs[1:]],
    )  # fmt: skip
    return dx, dweight, dbias


def layer_norm_reference(given: LayerNormInputs, rms: bool = False) -> LayerNormOutputs:
    """The norm of the rows of x that the row index names, of all without one; with ``rms`` it is RMSNorm."""
    x = given.x
    if given.routing.offsets is None and given.routing.row_index is None:
        y, mean, rstd = normalize(
            _scaled(x, given.head_scale), _at(given.weight, 0), _at(given.bias, 0), given.eps, rms
        )
        return LayerNormOutputs(y.to(given.y_dtype or x.dtype), mean, rstd)
    y, mean, rstd = (value if value is None else value.zero_() for value in layer_norm_fake(given, rms))
    check_offsets(given.routing, y.shape[0])
    for m, part in enumerate(_parts(given, y.shape[0])):
        scaled = _scaled(x[source_rows(given.routing, part, x)], given.head_scale)
        y[part], mu, rstd[part] = normalize(scaled, _at(given.weight, m), _at(given.bias, m), given.eps, rms)
        if mean is not None:
            mean[part] = mu
    return LayerNormOutputs(y, mean, rstd)


def layer_norm_backward_reference(saved: LayerNormSaved, needs: Needs) -> LayerNormGradients:
    """With d the gradient of c * x: dx = c d, zero in rows that were not read, dc = sum(x d) over rows and heads.

    What was passed is added to dx. Without a mean it is RMSNorm's.
    """
    x, grad, mean, head_scale = saved.x, saved.grad_y, saved.mean, saved.head_scale
    dweight, dbias = zeros_where_needed(saved.weight, needs.weight), zeros_where_needed(saved.bias, needs.bias)
    passed, parts = saved.passed, _parts(saved, grad.shape[0])
    all_rows = saved.routing.row_index is None and [*parts] == [slice(0, x.shape[0])]
    dx = None  # of all rows it is what the norm gives
    if not all_rows:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dx = dx.zero_() if passed is None else dx.copy_(passed)
    dscale = saved.rstd.new_zeros(head_scale.shape) if needs.head_scale else None
    for m, part in enumerate(parts):
        source, mu = source_rows(saved.routing, part, x), None if mean is None else mean[part]
        wanted = (True, _at(dweight, m) is not None, _at(dbias, m) is not None)
        dscaled, weight_part, bias_part = normalize_backward(
            grad[part], _scaled(x[source], head_scale), mu, saved.rstd[part], _at(saved.weight, m), wanted
        )
        of_norm = _scaled(dscaled, head_scale)
        of_norm = (of_norm if passed is None else of_norm.add_(passed[source])).to(x.dtype)
        if all_rows:
            dx = of_norm
        else:
            dx[source] = of_norm
        if dscale is not None:
            dscale += (dscaled * x[source]).unflatten(1, (head_scale.shape[0], -1)).sum((0, 2))
        if wanted[1]:
            dweight[m].copy_(weight_part)
        if wanted[2]:
            dbias[m].copy_(bias_part)
    return LayerNormGradients(dx, dweight, dbias, None if dscale is None else dscale.to(head_scale.dtype))


def zeros_where_needed(vectors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Zeros like each vector that needs a gradient, None for the others."""
    return [torch.zeros_like(vector) if need else None for vector, need in zip(vectors, needs, strict=True)]


def _parts(given: LayerNormInputs | LayerNormSaved, count: int) -> Sequence[slice]:
    return rows_of_norms(given.routing, max(len(given.weight), len(given.bias)), count)


def _scaled(x: Tensor, head_scale: Tensor | None) -> Tensor:
    """Every head's columns times its scale, in at least float32."""
    if head_scale is None:
        return x
    dtype = accumulation_dtype(x.dtype)
    heads = x.to(dtype).unflatten(1, (head_scale.shape[0], -1))
    return (heads * head_scale.to(dtype)[:, None]).flatten(1)


def _at(tensors: Sequence[Tensor | None], m: int) -> Tensor | None:
    return tensors[m] if tensors else None


def layer_norm_by_kernel(given: LayerNormInputs, rms: bool = False) -> LayerNormOutputs:
    """What the reference returns, by the kernel."""
    from onepeace_fast.kernels.layer_norm import layer_norm_forward

    row_index = given.routing.row_index
    check_offsets(given.routing, (given.x if row_index is None else row_index).shape[0])
    return layer_norm_forward(given, rms)


def layer_norm_backward_by_kernel(saved: LayerNormSaved, needs: Needs) -> LayerNormGradients:
    """What the backward reference returns, by the kernel."""
    from onepeace_fast.kernels.layer_norm import layer_norm_backward

    return layer_norm_backward(saved, needs)


def layer_norm_fake(given: LayerNormInputs, rms: bool = False) -> LayerNormOutputs:
    """Outputs of the right shapes; of RMSNorm there is no mean."""
    x, row_index = given.x, given.routing.row_index
    count = x.shape[0] if row_index is None else row_index.shape[0]
    rstd = x.new_empty((count, 1), dtype=accumulation_dtype(x.dtype))
    y = x.new_empty((count, x.shape[1]), dtype=given.y_dtype or x.dtype)
    return LayerNormOutputs(y, None if rms else torch.empty_like(rstd), rstd)


def layer_norm_backward_fake(saved: LayerNormSaved, needs: Needs) -> LayerNormGradients:
    """Gradients of the right shapes."""
    return LayerNormGradients(
        torch.empty_like(saved.x, memory_format=torch.contiguous_format),
        zeros_where_needed(saved.weight, needs.weight),
        zeros_where_needed(saved.bias, needs.bias),
        torch.empty_like(saved.head_scale) if needs.head_scale else None,
    )


LAYER_NORM = Operation(
    "layer_norm",
    LayerNormInputs,
    LayerNormOutputs,
    reference=layer_norm_reference,
    kernel=layer_norm_by_kernel,
    fake=layer_norm_fake,
    gradient=Gradient(
        LayerNormSaved, LayerNormGradients, layer_norm_backward_reference, layer_norm_backward_by_kernel,
        layer_norm_backward_fake, select=lambda given, outputs, needs: {"passed": None},
    ),
)  # fmt: skip


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
        x: floating point [rows, width], any row stride, at most 16,384 wide, past 6,144 by the reference.
        weight, bias: floating point [width] for all rows, or with ``offsets`` a sequence of one per modality; None for
            none.
        head_scale: floating point [heads], a factor of each head's width / heads columns in front of the norm (the head
            scale of NormFormer, Shleifer et al., arXiv 2110.09456).
        row_index: int32 [N], distinct rows of x: row i of the result is the norm of x[row_index[i]], no other is read.
        offsets: int32 [G + 1], first row of each modality in the result; rows of the result past the last are zero.
        row_counts: rows of each modality in the result, where the host knows them.
        eps: added to the variance.

    Returns:
        [rows, width], or [N, width] with ``row_index``, in x's dtype; statistics are float32 for half precision.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    routing = Routing(offsets, tuple(row_counts), row_index)
    return LAYER_NORM(_checked(x, weight, bias, head_scale, routing, eps))[0]


def layer_norm_and_stream(
    x: Tensor,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``layer_norm``, rounded to ``dtype`` where one is given, and x, for a residual connection around the branch.

    Where x is used in that place, the backward kernel adds the two gradients of x.
    """
    given = _checked(x, weight, bias, None, Routing(offsets, (), row_index), eps, dtype)
    stream, y = LAYER_NORM.passing(given)
    return y, stream


def _checked(
    x: Tensor, weight: Tensor | Sequence[Tensor] | None, bias: Tensor | Sequence[Tensor] | None,
    head_scale: Tensor | None, routing: Routing, eps: float, dtype: torch.dtype | None = None,
) -> LayerNormInputs:  # fmt: skip
    """The inputs, or a ValueError."""
    require_rows("x", x)
    require_eps(eps)
    modalities = require_norm_routing(routing, x)
    weights, biases = (norm_vectors(*given, modalities, x) for given in (("weight", weight), ("bias", bias)))
    if weights and biases and len(weights) != len(biases):  # one is shared and the other is not
        weights, biases = (values * modalities if len(values) == 1 else values for values in (weights, biases))
    if head_scale is not None:
        heads = head_scale.shape[0] if head_scale.dim() == 1 else 0
        require(
            head_scale.is_floating_point() and heads > 0 and x.shape[1] % heads == 0,
            lambda: (
                f"head_scale: expected a floating-point [heads] that divides {x.shape[1]}, got {describe(head_scale)}"
            ),
        )
        require_device("head_scale", head_scale, x.device)
    return LayerNormInputs(x, weights, biases, head_scale, routing, eps, dtype)
