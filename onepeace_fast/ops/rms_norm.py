"""RMSNorm of packed rows, with one weight for all rows or one per modality.

    y = x / RMS(x) * weight,   RMS(x) = sqrt(mean(x^2) + eps) of each row

(Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4; eps inside the root as in
Llama). No mean is taken away and no bias added. Rows past the last modality are inert and come out as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from onepeace_fast.ops.arguments import norm_vectors, require_eps, require_norm_routing, require_rows
from onepeace_fast.ops.layer_norm import (
    layer_norm_backward_by_kernel,
    layer_norm_backward_fake,
    layer_norm_backward_reference,
    layer_norm_by_kernel,
    layer_norm_fake,
    layer_norm_reference,
)
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.structures import (
    Function,
    LayerNormGradients,
    LayerNormInputs,
    LayerNormSaved,
    Needs,
    RMSNormGradients,
    RMSNormInputs,
    RMSNormOutputs,
    RMSNormSaved,
    Routing,
)


def _forward(norm: Function, given: RMSNormInputs) -> RMSNormOutputs:
    """A function of ``layer_norm`` on a norm without mean, bias and head scale."""
    y, _, rrms = norm(LayerNormInputs(given.x, given.weight, [], None, given.routing, given.eps), rms=True)
    return RMSNormOutputs(y, rrms)


def _backward(norm: Function, saved: RMSNormSaved, needs: Needs) -> RMSNormGradients:
    """A function of its backward pass on a norm without mean, bias and head scale."""
    given = LayerNormSaved(saved.grad_y, saved.x, None, saved.rrms, saved.weight, [], None, saved.routing)
    dx, dweight, _, _ = norm(given, LayerNormGradients(needs.x, needs.weight, [], None))
    return RMSNormGradients(dx, dweight)


RMS_NORM = Operation(
    "rms_norm",
    RMSNormInputs,
    RMSNormOutputs,
    reference=partial(_forward, layer_norm_reference),
    kernel=partial(_forward, layer_norm_by_kernel),
    fake=partial(_forward, layer_norm_fake),
    gradient=Gradient(
        RMSNormSaved, RMSNormGradients, partial(_backward, layer_norm_backward_reference),
        partial(_backward, layer_norm_backward_by_kernel), partial(_backward, layer_norm_backward_fake),
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
