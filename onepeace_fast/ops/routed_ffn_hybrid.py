"""The routed FFN by vendor products but one: the hidden gradient's has the backward pass of gate and Sub-LN inside.

There fusing saves most: dn = dy W2 is never stored, and u, v, du, dv and n are read or written once, in the product's
epilogue. It leaves n for the product dW2 = dy^T n, and each row tile's part of the norm's gradients. The formulas stand
in ``kernels/routed_ffn_backward.py``; the forward pass is that of ``routed_ffn_per_modality.py``.
"""

from __future__ import annotations

import torch

from onepeace_fast.ops.packed_rows import row_slices
from onepeace_fast.ops.routed_ffn_per_modality import input_gradient, project, weight_gradients
from onepeace_fast.structures import FeedForwardWeights, Needs, RoutedFFNGradients, RoutedFFNSaved


def routed_ffn_backward(saved: RoutedFFNSaved, needs: Needs) -> RoutedFFNGradients:
    """The gradients by the formulas of the backward reference."""
    from onepeace_fast.kernels.partial_sums import new_where_needed
    from onepeace_fast.kernels.routed_ffn_backward import NormGradients, hidden_gradient
    from onepeace_fast.kernels.routed_ffn_fold import fold
    from onepeace_fast.kernels.routed_ffn_scale_gradient import scaled_gradient

    z, weights, offsets, wanted = saved.z, saved.weights, saved.routing.offsets, needs.weights
    ranges = list(row_slices(saved.routing))
    if saved.u is None:
        u, v = project(z, weights, ranges)
        saved = saved._replace(u=u, v=v)
    if weights.norm_weight:
        # Here and not in the forward pass, which makes no use of it: then inference and a recomputed one pay nothing.
        folded, _ = fold(weights, offsets, z.shape[0], None)
        saved = saved._replace(folded=folded)
    db2 = new_where_needed(weights.b2, wanted.b2)
    norm = NormGradients(
        new_where_needed(weights.norm_weight, wanted.norm_weight), new_where_needed(weights.norm_bias, wanted.norm_bias)
    )
    dgamma = torch.empty_like(saved.gamma, memory_format=torch.contiguous_format) if needs.gamma else None
    dy, m1, m2, _ = scaled_gradient(saved, any(wanted.b2), db2, dgamma)
    du, dv, n = hidden_gradient(dy, saved, m1, m2, any(wanted.w2), norm)
    gradients = FeedForwardWeights(
        weight_gradients(du, z, ranges, wanted.w0),
        weight_gradients(dv, z, ranges, wanted.w1),
        norm.weight,
        norm.bias,
        weight_gradients(dy, n, ranges, wanted.w2),
        db2,
    )
    return RoutedFFNGradients(input_gradient(du, dv, z, weights, ranges), gradients, None, dgamma)
