"""The routed FFN by a vendor product for each modality, and one kernel over the rows of all between the products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast.ops.gated_sub_ln import GATED_SUB_LN, gated_sub_ln_backward_and_n
from onepeace_fast.ops.packed_rows import row_slices
from onepeace_fast.ops.residual import RESIDUAL, residual_backward_and_sums
from onepeace_fast.structures import (
    Dropout,
    FeedForwardWeights,
    GatedSubLNGradients,
    GatedSubLNInputs,
    GatedSubLNSaved,
    Needs,
    ResidualGradients,
    ResidualInputs,
    ResidualSaved,
    RoutedFFNGradients,
    RoutedFFNInputs,
    RoutedFFNOutputs,
    RoutedFFNSaved,
)


def project(z: Tensor, weights: FeedForwardWeights, ranges: Sequence[slice]) -> tuple[Tensor, Tensor | None]:
    """u = z W0^T and v = z W1^T, None without a gate."""
    w0, w1 = weights.w0, weights.w1
    u = z.new_empty(z.shape[0], w0[0].shape[0])
    v = torch.empty_like(u) if w1 else None
    for m, rows in enumerate(ranges):
        torch.mm(z[rows], w0[m].t(), out=u[rows])
        if w1:
            torch.mm(z[rows], w1[m].t(), out=v[rows])
    return u, v


def as_branch(given: RoutedFFNInputs, y: Tensor) -> ResidualInputs:
    """How y comes back into the residual stream."""
    return ResidualInputs(
        given.residual, y, given.gamma, given.drop_path, Dropout(), given.routing, None, None, given.settings.eps
    )


def as_branch_saved(saved: RoutedFFNSaved, needs: Needs) -> tuple[ResidualSaved, Needs]:
    """What the residual's backward pass is given to make dy and dgamma, and what is needed of it."""
    y = saved.y if needs.gamma else None
    nothing = dict.fromkeys(("grad_normed", "out", "norm_weight", "norm_bias", "mean", "rstd"))
    branch = ResidualSaved(
        grad_out=saved.grad_out, y=y, gamma=saved.gamma, drop_path=saved.drop_path, dropout=Dropout(),
        routing=saved.routing, y_dtype=saved.z.dtype, **nothing,
    )  # fmt: skip
    return branch, ResidualGradients._make((False, True, needs.gamma, False, False))


def is_scaled(saved: RoutedFFNSaved) -> bool:
    """Whether dy differs from the gradient of the result."""
    return saved.gamma is not None or saved.drop_path.scale is not None or saved.routing.row_index is not None


def routed_ffn(given: RoutedFFNInputs) -> RoutedFFNOutputs:
    """The forward pass."""
    z, weights, routing, settings = given.z, given.weights, given.routing, given.settings
    ranges = list(row_slices(routing))
    u, v = project(z, weights, ranges)
    n, mean, rstd = GATED_SUB_LN.run(
        GatedSubLNInputs(u, v, weights.norm_weight, weights.norm_bias, routing, settings.activation, settings.eps)
    )
    y = z.new_empty(z.shape[0], weights.w2[0].shape[0])
    for m, rows in enumerate(ranges):
        if weights.b2:
            torch.addmm(weights.b2[m], n[rows], weights.w2[m].t(), out=y[rows])
        else:
            torch.mm(n[rows], weights.w2[m].t(), out=y[rows])
    if given.residual is None:
        y[ranges[-1].stop :] = 0
        return RoutedFFNOutputs(y, u, v, y, mean, rstd, None)
    return RoutedFFNOutputs(RESIDUAL.run(as_branch(given, y)).out, u, v, y, mean, rstd, None)


def routed_ffn_backward(saved: RoutedFFNSaved, needs: Needs) -> RoutedFFNGradients:
    """The gradients by the formulas of the backward reference."""
    z, weights, routing, wanted = saved.z, saved.weights, saved.routing, needs.weights
    ranges = list(row_slices(routing))
    u, v = (saved.u, saved.v) if saved.u is not None else project(z, weights, ranges)
    dy, dgamma = saved.grad_out.to(z.dtype), None
    db2 = [torch.empty_like(b2) if need else None for b2, need in zip(weights.b2, wanted.b2, strict=True)]
    scaled = is_scaled(saved)
    if scaled or any(wanted.b2):
        branch, needed = as_branch_saved(saved._replace(grad_out=saved.grad_out if scaled else dy), needs)
        found = residual_backward_and_sums(branch, needed._replace(y=scaled), db2, ranges)
        dy, dgamma = found.y if scaled else dy, found.gamma
    dn = torch.empty_like(u)
    for m, rows in enumerate(ranges):
        torch.mm(dy[rows], weights.w2[m], out=dn[rows])
    gated, n = gated_sub_ln_backward_and_n(
        GatedSubLNSaved(
            dn, u, v, saved.mean, saved.rstd, weights.norm_weight, weights.norm_bias, routing, saved.settings.activation
        ),
        GatedSubLNGradients._make((True, v is not None, wanted.norm_weight, wanted.norm_bias)),
        any(wanted.w2),
    )
    gradients = FeedForwardWeights(
        weight_gradients(gated.u, z, ranges, wanted.w0),
        weight_gradients(gated.v, z, ranges, wanted.w1),
        gated.norm_weight,
        gated.norm_bias,
        weight_gradients(dy, n, ranges, wanted.w2),
        db2,
    )
    return RoutedFFNGradients(input_gradient(gated.u, gated.v, z, weights, ranges), gradients, None, dgamma)


def input_gradient(
    du: Tensor, dv: Tensor | None, z: Tensor, weights: FeedForwardWeights, ranges: Sequence[slice]
) -> Tensor:
    """dz = du W0 + dv W1, zero for inert rows."""
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    for m, rows in enumerate(ranges):
        mine = dz[rows]
        torch.mm(du[rows], weights.w0[m], out=mine)
        if dv is not None:
            torch.addmm(mine, dv[rows], weights.w1[m], out=mine)
    dz[ranges[-1].stop :] = 0
    return dz


def weight_gradients(
    left: Tensor | None, right: Tensor | None, ranges: Sequence[slice], needs: Sequence[bool]
) -> list[Tensor | None]:
    """left^T right over the rows of each modality that needs it: the gradient of its weight."""
    if left is None or right is None:
        return [None for _need in needs]
    return [torch.mm(left[ranges[m]].t(), right[ranges[m]]) if need else None for m, need in enumerate(needs)]
