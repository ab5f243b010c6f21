"""One gated feed-forward network per modality, on contiguous row ranges of packed tokens.

    h = activation(z W0^T) * (z W1^T),   y = LayerNorm(h) W2^T + b2,   out = residual + drop_path * gamma * y

with W0, W1, W2, b2 and the Sub-LayerNorm of the row's modality (GeGLU: Shazeer, arXiv 2002.05202; Sub-LayerNorm: Wang
et al., arXiv 2210.06423; routing: ONE-PEACE, arXiv 2305.11172). Without W1 there is no gate: h = activation(z W0^T).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.kernels.tile_table import norm_is_folded
from onepeace_fast.ops import routed_ffn_hybrid as hybrid
from onepeace_fast.ops import routed_ffn_per_modality as per_modality
from onepeace_fast.ops.arguments import autocast_dtype, check_offsets, check_row_index, check_sample, require_lists
from onepeace_fast.ops.gated_sub_ln import ACTIVATION_BACKWARD, ACTIVATIONS, statistics
from onepeace_fast.ops.layer_norm import normalize, normalize_backward
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import row_slices
from onepeace_fast.ops.residual import residual_backward_reference, residual_reference, row_factor
from onepeace_fast.ops.routed_ffn_arguments import check, chosen_strategy
from onepeace_fast.structures import (
    Dropout,
    DropPath,
    FeedForwardSettings,
    FeedForwardWeights,
    Needs,
    RoutedFFNGradients,
    RoutedFFNInputs,
    RoutedFFNOutputs,
    RoutedFFNSaved,
    Routing,
)


def routed_ffn_reference(given: RoutedFFNInputs) -> RoutedFFNOutputs:
    """One modality after another."""
    z, weights, settings = given.z, given.weights, given.settings
    w0, w1, norm_weight, norm_bias, w2, b2 = weights
    y = z.new_empty(z.shape[0], w2[0].shape[0])
    u = z.new_empty(z.shape[0], w0[0].shape[0])
    v = torch.empty_like(u) if w1 else None
    mean, rstd = (statistics(z, norm_weight) for _ in range(2))
    ranges = list(row_slices(given.routing))
    for m, rows in enumerate(ranges):
        torch.mm(z[rows], w0[m].t(), out=u[rows])
        h = ACTIVATIONS[settings.activation](u[rows])
        if w1:
            torch.mm(z[rows], w1[m].t(), out=v[rows])
            h = h.mul_(v[rows])
        if norm_weight:
            h, mean[rows], rstd[rows] = normalize(h, norm_weight[m], norm_bias[m], settings.eps)
        if b2:
            torch.addmm(b2[m], h, w2[m].t(), out=y[rows])
        else:
            torch.mm(h, w2[m].t(), out=y[rows])
    y[ranges[-1].stop :] = 0
    return RoutedFFNOutputs(_added(given, y), u, v, y, mean, rstd, None)


def _added(given: RoutedFFNInputs, y: Tensor) -> Tensor:
    """The residual and the scaled result; y itself without a residual."""
    if given.residual is None:
        return y
    if given.routing.row_index is not None:
        return residual_reference(per_modality.as_branch(given, y)).out
    factor = row_factor(y, y.dtype, given.gamma, given.drop_path, Dropout())
    out = given.residual + y if factor is None else (y * factor).add_(given.residual)
    return out.to(given.residual.dtype).contiguous()


def routed_ffn_backward_reference(saved: RoutedFFNSaved, needs: Needs) -> RoutedFFNGradients:
    """With dy = grad * drop_path * gamma and n = LayerNorm(h):

    db2 = sum dy, dW2 = dy^T n, dh = LayerNorm'(dy W2), du = activation'(u) dh v, dv = dh activation(u), dW0 = du^T z,
    dW1 = dv^T z, dz = du W0 + dv W1, dgamma = sum grad * drop_path * y.

    u and v are computed again where they were not kept.
    """
    z, (w0, w1, norm_weight, norm_bias, w2, _), settings = saved.z, saved.weights, saved.settings
    wanted = needs.weights
    gradients = FeedForwardWeights._make([None] * len(parameters) for parameters in saved.weights)
    ranges = list(row_slices(saved.routing))
    u, v = (saved.u, saved.v) if saved.u is not None else per_modality.project(z, saved.weights, ranges)
    dy_all, dgamma = saved.grad_out.to(z.dtype), None
    if per_modality.is_scaled(saved):
        branch = residual_backward_reference(*per_modality.as_branch_saved(saved, needs))
        dy_all, dgamma = branch.y, branch.gamma
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    for m, rows in enumerate(ranges):
        dy, z_m, u_m = dy_all[rows], z[rows], u[rows]
        activated = ACTIVATIONS[settings.activation](u_m)
        h = activated * v[rows] if w1 else activated
        if _wants(wanted.b2, m):
            gradients.b2[m] = dy.sum(0)
        if _wants(wanted.w2, m):
            n = normalize(h, norm_weight[m], norm_bias[m], settings.eps)[0] if norm_weight else h
            gradients.w2[m] = dy.t() @ n
            del n  # each here is as wide as u: what is done with makes room for the next
        dh = dy @ w2[m]
        if norm_weight:
            dh, gradients.norm_weight[m], gradients.norm_bias[m] = normalize_backward(
                dh, h, saved.mean[rows], saved.rstd[rows], norm_weight[m],
                (True, _wants(wanted.norm_weight, m), _wants(wanted.norm_bias, m)),
            )  # fmt: skip
            dh = dh.to(z.dtype)
        del h
        dv = activated.mul_(dh) if w1 else None
        du = ACTIVATION_BACKWARD[settings.activation](dh.mul_(v[rows]) if w1 else dh, u_m)
        del activated, dh
        if _wants(wanted.w0, m):
            gradients.w0[m] = du.t() @ z_m
        if w1:
            if _wants(wanted.w1, m):
                gradients.w1[m] = dv.t() @ z_m
            torch.addmm(du @ w0[m], dv, w1[m], out=dz[rows])
        else:
            torch.mm(du, w0[m], out=dz[rows])
        del du, dv
    dz[ranges[-1].stop :] = 0
    return RoutedFFNGradients(dz, _in_dtypes_of(gradients, saved.weights), None, dgamma)


def _wants(flags: Sequence[bool], m: int) -> bool:
    return bool(flags) and flags[m]


def _in_dtypes_of(gradients: FeedForwardWeights, weights: FeedForwardWeights) -> FeedForwardWeights:
    return FeedForwardWeights(*(
        [None if gradient is None else gradient.to(weight.dtype) for gradient, weight in zip(some, those, strict=True)]
        for some, those in zip(gradients, weights, strict=True)
    ))  # fmt: skip


def _by_reference(given: RoutedFFNInputs) -> RoutedFFNOutputs:
    _check_values(given)
    return _what_is_kept(given, routed_ffn_reference(given))


def _by_kernel(given: RoutedFFNInputs) -> RoutedFFNOutputs:
    """By the strategy that was chosen."""
    strategy = given.settings.strategy
    if strategy == "reference":
        return _by_reference(given)
    _check_values(given)
    if strategy in ("hybrid", "per_modality"):
        return _what_is_kept(given, per_modality.routed_ffn(given))
    from onepeace_fast.kernels.routed_ffn import routed_ffn_forward

    check_sample(given.drop_path)
    return _what_is_kept(given, routed_ffn_forward(given))


def _check_values(given: RoutedFFNInputs) -> None:
    check_offsets(given.routing, given.z.shape[0])
    if given.routing.row_index is not None:
        check_row_index(given.routing.row_index, given.routing.offsets, given.residual)


def _what_is_kept(given: RoutedFFNInputs, outputs: RoutedFFNOutputs) -> RoutedFFNOutputs:
    """The outputs but for what the backward pass is not to read."""
    products, y = given.settings.keep_products, given.settings.keep_y and given.residual is not None
    return outputs._replace(
        u=outputs.u if products else None,
        v=outputs.v if products else None,
        y=outputs.y if y else None,
        mean=outputs.mean if given.weights.norm_weight else None,
        rstd=outputs.rstd if given.weights.norm_weight else None,
        folded=_folded(given) if outputs.folded is None else outputs.folded,
    )


def _folded(given: RoutedFFNInputs) -> Tensor | None:
    """Room for W2 g and W2 b + b2 of each modality, which the grouped strategy keeps."""
    w2 = given.weights.w2
    if not given.weights.norm_weight or given.settings.strategy != "grouped":
        return None
    return given.z.new_zeros((2, len(w2), w2[0].shape[0]), dtype=torch.float32)


def _backward_by_kernel(saved: RoutedFFNSaved, needs: Needs) -> RoutedFFNGradients:
    """By the strategy that was chosen."""
    if saved.settings.strategy == "reference":
        return routed_ffn_backward_reference(saved, needs)
    if saved.settings.strategy == "per_modality":
        return per_modality.routed_ffn_backward(saved, needs)
    if saved.settings.strategy == "hybrid":
        return hybrid.routed_ffn_backward(saved, needs)
    from onepeace_fast.kernels.routed_ffn_backward import routed_ffn_backward

    return routed_ffn_backward(saved, needs)


def _fake(given: RoutedFFNInputs) -> RoutedFFNOutputs:
    z, weights, residual = given.z, given.weights, given.residual
    y = z.new_empty(z.shape[0], weights.w2[0].shape[0])
    u = z.new_empty(z.shape[0], weights.w0[0].shape[0])
    out = y if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    v = torch.empty_like(u) if weights.w1 else None
    mean, rstd = (statistics(z, weights.norm_weight) for _ in range(2))
    return _what_is_kept(given, RoutedFFNOutputs(out, u, v, y, mean, rstd, None))


def _fake_backward(saved: RoutedFFNSaved, needs: Needs) -> RoutedFFNGradients:
    gradients = FeedForwardWeights(*(
        [torch.empty_like(parameter) if need else None for parameter, need in zip(parameters, flags, strict=True)]
        for parameters, flags in zip(saved.weights, needs.weights, strict=True)
    ))  # fmt: skip
    dgamma = torch.empty_like(saved.gamma) if needs.gamma else None
    dz = torch.empty_like(saved.z, memory_format=torch.contiguous_format)
    return RoutedFFNGradients(dz, gradients, None, dgamma)


def _select(given: RoutedFFNInputs, outputs: RoutedFFNOutputs, needs: Needs) -> dict[str, Any]:
    """Without a residual the result is y itself."""
    return {"y": outputs.out} if given.residual is None and given.settings.keep_y else {}


def _finish(backward: Callable[..., Any], saved: RoutedFFNSaved, needs: Needs) -> RoutedFFNGradients:
    return backward(saved, needs)._replace(residual=saved.grad_out if needs.residual else None)


ROUTED_FFN = Operation(
    "routed_ffn",
    RoutedFFNInputs,
    RoutedFFNOutputs,
    reference=_by_reference,
    kernel=_by_kernel,
    fake=_fake,
    gradient=Gradient(
        RoutedFFNSaved, RoutedFFNGradients, routed_ffn_backward_reference, _backward_by_kernel, _fake_backward,
        _select, _finish,
    ),
)  # fmt: skip


def routed_ffn(
    z: Tensor,
    w0: Sequence[Tensor],
    w1: Sequence[Tensor] | None,
    w2: Sequence[Tensor],
    b2: Sequence[Tensor] | None = None,
    *,
    offsets: Tensor,
    row_counts: Sequence[int] = (),
    norm_weight: Sequence[Tensor] | None = None,
    norm_bias: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    drop_path: Tensor | None = None,
    sample: Tensor | None = None,
    row_index: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-5,
    recompute: bool = False,
    strategy: str | None = None,
) -> Tensor:
    """The gated feed-forward network of each row's modality, with Sub-LayerNorm, LayerScale, DropPath and residual.

    Gate: Shazeer, arXiv 2002.05202; Sub-LayerNorm: Wang et al., arXiv 2210.06423; routing: ONE-PEACE, arXiv 2305.11172.

    Args:
        z: floating point [N, width], modality-major: rows offsets[m] to offsets[m + 1] are those of modality m.
        w0, w1: one [hidden, width] per modality in z's dtype; gate and value projections. ``w1`` None: no gate.
        w2: one [width, hidden] per modality in z's dtype; output projections.
        b2: one [width] per modality in z's dtype, or None.
        offsets: int32 [G + 1], the plan's.
        row_counts: the plan's row counts, where the host knows them. Without them all but the grouped strategy read
            offsets on the host, since each modality's products are launched from there.
        norm_weight, norm_bias: one floating-point [hidden] per modality, Sub-LayerNorm; None for none.
        residual: floating point [rows, width], added to the scaled result; without it gamma, drop_path and row_index
            are refused.
        gamma, drop_path, sample: LayerScale and DropPath as in ``onepeace_fast.ops.residual``.
        row_index: int32 [N], the row of the residual that each row of z comes back to; all others keep theirs bit by
            bit.
        activation: "gelu" (exact, by erf), "gelu_tanh", "silu" or "relu".
        eps: of the Sub-LayerNorm.
        recompute: keep neither of z W0^T and z W1^T for the backward pass, which computes them again.
        strategy: "grouped" (products of all modalities in one launch, and all else inside them), "per_modality" (a
            vendor product for each, a kernel between them), "hybrid" (the same, but for the hidden gradient's product,
            which is a launch with all else inside) or "reference"; None: what was measured to be the fastest on this
            GPU, "hybrid" where nothing was, "grouped" on a GPU without ``row_counts``, "per_modality" where that one
            cannot take z. A CPU runs the reference.

    Returns:
        [N, width], or the residual's shape and dtype. Rows past offsets[G] get the residual, else zero. Under autocast
        the matrix products run in autocast's dtype. A parameter without rows gets a zero gradient, a frozen one none.

    Raises:
        ValueError: a dtype, shape, device, name or width that does not fit.
    """
    require_lists(w0=w0, w1=w1, w2=w2, b2=b2, norm_weight=norm_weight, norm_bias=norm_bias)
    if (dtype := autocast_dtype(z)) is not None:
        z = z.to(dtype)
        w0, w1, w2, b2 = (some and [w.to(dtype) for w in some] for some in (w0, w1, w2, b2))
    weights = FeedForwardWeights(*(list(some or ()) for some in (w0, w1, norm_weight, norm_bias, w2, b2)))
    routing, factors = Routing(offsets, tuple(row_counts), row_index), DropPath(drop_path, sample)
    settings = FeedForwardSettings(activation, eps, strategy or "", False, False)
    given = RoutedFFNInputs(z, weights, routing, residual, gamma, factors, settings)
    check(given, has_gate=w1 is not None)
    strategy = chosen_strategy(
        strategy, z, weights.w0[0].shape[0], len(weights.w0), routing.row_counts,
        unfolded=len(weights.norm_weight) > 0 and not norm_is_folded(z.dtype),
    )  # fmt: skip
    leaves = (z, *(parameter for some in weights for parameter in some), gamma)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    y_needed = gamma is not None or (len(weights.norm_weight) > 0 and strategy in ("grouped", "hybrid"))
    settings = FeedForwardSettings(
        activation, eps, strategy, keep_products=differentiable and not recompute, keep_y=differentiable and y_needed
    )
    return ROUTED_FFN(RoutedFFNInputs(z, weights, routing, residual, gamma, factors, settings))[0]
