"""RMSNorm of packed rows, with one weight for all rows or one per modality.

    y = x / RMS(x) * weight,   RMS(x) = sqrt(mean(x^2) + eps) of each row

(Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4; eps inside the root as in
Llama). No mean is taken away and no bias added. Rows past the last modality are inert and come out as zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast.ops.arguments import norm_vectors, require_eps, require_norm_routing, require_rows
from onepeace_fast.ops.layer_norm import zeros_where_needed
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import accumulation_dtype, rows_of_norms, source_rows
from onepeace_fast.structures import (
    Needs,
    RMSNormGradients,
    RMSNormInputs,
    RMSNormOutputs,
    RMSNormSaved,
    Routing,
)


def rms_normalize(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of every row: the result in x's dtype, 1 / RMS(x) [rows, 1] in at least float32."""
    wide = x.to(accumulation_dtype(x.dtype))
    rrms = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    y = wide * rrms
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype), rrms


def rms_normalize_backward(
    grad: Tensor, x: Tensor, rrms: Tensor, weight: Tensor | None, weight_needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``rms_normalize``; with xhat = x / RMS(x) and g = grad weight,

    dx = (g - xhat mean(g xhat)) / RMS(x),  dweight = sum(grad xhat).
    """
    grad, xhat = grad.to(rrms.dtype), x.to(rrms.dtype) * rrms
    g = grad if weight is None else grad * weight.to(rrms.dtype)
    dx = (g - xhat * (g * xhat).mean(1, keepdim=True)) * rrms
    return dx, (grad * xhat).sum(0) if weight_needed else None


def rms_norm_reference(given: RMSNormInputs) -> RMSNormOutputs:
    """The norm of the rows of x that the row index names, of all without one."""
    x, count = given.x, _count(given)
    y, rrms = x.new_zeros(count, x.shape[1]), x.new_zeros((count, 1), dtype=accumulation_dtype(x.dtype))
    for m, rows in enumerate(rows_of_norms(given.routing, len(given.weight), count)):
        source = source_rows(given.routing, rows, x)
        y[rows], rrms[rows] = rms_normalize(x[source], _at(given.weight, m), given.eps)
    return RMSNormOutputs(y, rrms)


def rms_norm_backward_reference(saved: RMSNormSaved, needs: Needs) -> RMSNormGradients:
    """The gradient of x is zero in rows that were not read."""
    x, grad, weight = saved.x, saved.grad_y, saved.weight
    dx, dweight = torch.zeros_like(x, memory_format=torch.contiguous_format), zeros_where_needed(weight, needs.weight)
    for m, rows in enumerate(rows_of_norms(saved.routing, len(weight), grad.shape[0])):
        source, needed = source_rows(saved.routing, rows, x), _at(dweight, m) is not None
        part, weight_part = rms_normalize_backward(grad[rows], x[source], saved.rrms[rows], _at(weight, m), needed)
        dx[source] = part.to(x.dtype)
        if needed:
            dweight[m].copy_(weight_part)
    return RMSNormGradients(dx, dweight)


def _count(given: RMSNormInputs) -> int:
    """Rows of the result."""
    return (given.x if given.routing.row_index is None else given.routing.row_index).shape[0]


def _at(vectors: Sequence[Tensor | None], m: int) -> Tensor | None:
    return vectors[m] if vectors else None


def _by_kernel(given: RMSNormInputs) -> RMSNormOutputs:
    from onepeace_fast.kernels.rms_norm import rms_norm_forward

    return rms_norm_forward(given)


def _backward_by_kernel(saved: RMSNormSaved, needs: Needs) -> RMSNormGradients:
    from onepeace_fast.kernels.rms_norm import rms_norm_backward

    return rms_norm_backward(saved, needs)


def _fake(given: RMSNormInputs) -> RMSNormOutputs:
    x, count = given.x, _count(given)
    return RMSNormOutputs(x.new_empty(count, x.shape[1]), x.new_empty((count, 1), dtype=accumulation_dtype(x.dtype)))


def _fake_backward(saved: RMSNormSaved, needs: Needs) -> RMSNormGradients:
    return RMSNormGradients(
        torch.empty_like(saved.x, memory_format=torch.contiguous_format), zeros_where_needed(saved.weight, needs.weight)
    )


RMS_NORM = Operation(
    "rms_norm",
    RMSNormInputs,
    RMSNormOutputs,
    reference=rms_norm_reference,
    kernel=_by_kernel,
    fake=_fake,
    gradient=Gradient(
        RMSNormSaved, RMSNormGradients, rms_norm_backward_reference, _backward_by_kernel, _fake_backward
    ),
)  # fmt: skip


def rms_norm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor] | None = None,
    *,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
    row_counts: Sequence[int] = (),
    eps: float = 1e-5,
) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich, arXiv 1910.07467), of all rows or of some.

    Args:
        x: floating point [rows, width], any row stride, at most 16,384 wide, past 6,144 by the reference.
        weight: [width] for all rows, or with ``offsets`` a sequence of one per modality; None for none.
        row_index: int32 [N], distinct rows of x: row i of the result is the norm of x[row_index[i]], no other is read.
        offsets: int32 [G + 1], first row of each modality in the result; rows of the result past the last are zero.
        row_counts: rows of each modality in the result, where the host knows them.
        eps: added to the mean square, inside the root.

    Returns:
        [rows, width], or [N, width] with ``row_index``, in x's dtype; RMS(x) is float32 for half precision.

    Raises:
        ValueError: a dtype, shape, device, index or row count that does not fit.
    """
    routing = Routing(offsets, tuple(row_counts), row_index)
    require_rows("x", x)
    require_eps(eps)
    weights = norm_vectors("weight", weight, require_norm_routing(routing, x), x)
    return RMS_NORM(RMSNormInputs(x, weights, routing, eps))[0]
