"""The routed FFN by vendor products but one: the hidden gradient's has the backward pass of gate and Sub-LN inside.

There fusing saves most: dn = dy W2 is never stored, and u, v, du, dv and hhat are read or written once, in the
product's epilogue. With a norm dW2 comes from Ghat = dy^T hhat, another product, which half precision rounds. The
formulas stand in ``kernels/routed_ffn_backward.py``; the forward pass is that of ``routed_ffn_per_modality.py``.
"""

from __future__ import annotations

import torch

from onepeace_fast.ops.packed_rows import row_slices
from onepeace_fast.ops.routed_ffn_per_modality import input_gradient, project, weight_gradients
from onepeace_fast.structures import FeedForwardWeights, Needs, RoutedFFNGradients, RoutedFFNSaved


def routed_ffn_backward(saved: RoutedFFNSaved, needs: Needs) -> RoutedFFNGradients:
    """The gradients by the formulas of the backward reference."""
    from onepeace_fast.kernels.partial_sums import new_where_needed
    from onepeace_fast.kernels.routed_ffn_backward import hidden_gradient
    from onepeace_fast.kernels.routed_ffn_fold import fold
    from onepeace_fast.kernels.routed_ffn_norm_gradient import norm_gradients
    from onepeace_fast.kernels.routed_ffn_scale_gradient import scaled_gradient

    z, weights, offsets, wanted = saved.z, saved.weights, saved.routing.offsets, needs.weights
    ranges, normed = list(row_slices(saved.routing)), bool(saved.weights.norm_weight)
    if saved.u is None:
        u, v = project(z, weights, ranges)
        saved = saved._replace(u=u, v=v)
    if normed:
        # Here and not in the forward pass, which makes no use of it: then inference and a recomputed one pay nothing.
        folded, _ = fold(weights, offsets, z.shape[0], None)
        saved = saved._replace(folded=folded)
    of_norm = zip(wanted.w2, wanted.norm_weight, wanted.norm_bias, strict=True) if normed else ()
    hhat_needed = [any(mine) for mine in of_norm] or [*wanted.w2]
    db2 = new_where_needed(weights.b2, wanted.b2)
    dgamma = torch.empty_like(saved.gamma, memory_format=torch.contiguous_format) if needs.gamma else None
    sums_needed = any(wanted.b2) or (normed and any(hhat_needed))
    dy, m1, m2, row_sums = scaled_gradient(saved, sums_needed, db2, dgamma)
    du, dv, hhat = hidden_gradient(dy, saved, m1, m2, any(hhat_needed))
    dw2 = weight_gradients(dy, hhat, ranges, hhat_needed)
    gradients = FeedForwardWeights(
        weight_gradients(du, z, ranges, wanted.w0),
        weight_gradients(dv, z, ranges, wanted.w1),
        new_where_needed(weights.norm_weight, wanted.norm_weight),
        new_where_needed(weights.norm_bias, wanted.norm_bias),
        [mine if need else None for mine, need in zip(dw2, wanted.w2, strict=True)],
        db2,
    )
    if normed and any(hhat_needed):
        norm_gradients(dw2, weights, row_sums, gradients)
    return RoutedFFNGradients(input_gradient(du, dv, z, weights, ranges), gradients, None, dgamma)
