"""The pointwise heart of a routed feed-forward network: gate, and Sub-LayerNorm of the row's modality.

    h = activation(u) * v, or activation(u) without a gate;   n = (h - mean) * rstd * weight + bias

mean and rstd = 1 / sqrt(variance + eps) are those of each row of h, weight and bias those of the row's modality
(GeGLU: Shazeer, arXiv 2002.05202; Sub-LayerNorm: Wang et al., arXiv 2210.06423). Without a norm n = h. Rows past the
last modality are inert and come out as zero. The backward pass computes h again and stores none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_vector
from onepeace_fast.ops.arguments import check_routing, require_rows
from onepeace_fast.ops.layer_norm import normalize, normalize_backward
from onepeace_fast.ops.operation import define, no_gradient, only_needed, register_gradient
from onepeace_fast.ops.packed_rows import accumulation_dtype, row_slices

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
}
ACTIVATION_BACKWARD = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, u: torch.ops.aten.gelu_backward(grad, u, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
}


def gated_sub_ln_reference(
    u: Tensor, v: Tensor | None, norm_weight: Sequence[Tensor], norm_bias: Sequence[Tensor], offsets: Tensor,
    row_counts: Sequence[int], activation: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns n in u's dtype, and mean and rstd [rows, 1] of h, empty without a norm."""
    n = torch.zeros_like(u, memory_format=torch.contiguous_format)
    mean, rstd = (statistics(u, norm_weight) for _ in range(2))
    for m, rows in enumerate(row_slices(offsets, row_counts)):
        u_m, v_m = _accumulable(u, v, rows)
        h = ACTIVATIONS[activation](u_m)
        h = h if v is None else h * v_m
        if norm_weight:
            h, mean[rows], rstd[rows] = normalize(h, norm_weight[m], norm_bias[m], eps)
        n[rows] = h
    return n, mean, rstd


def gated_sub_ln_backward_reference(
    grad: Tensor, u: Tensor, v: Tensor | None, mean: Tensor, rstd: Tensor, norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor], offsets: Tensor, row_counts: Sequence[int], activation: str,
    weight_needs: Sequence[bool], bias_needs: Sequence[bool], n_needed: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """With hhat = (h - mean) rstd and g = grad weight: dweight = sum(grad hhat), dbias = sum(grad),

    dh = rstd (g - mean(g) - hhat mean(g hhat)),  du = activation'(u) dh v,  dv = dh activation(u).

    Returns du, dv, the gradients of the norms' weights and biases, empty where none is needed, and n once more where
    ``n_needed``: the products on either side need it and it costs no further reading here.
    """
    du = torch.zeros_like(u, memory_format=torch.contiguous_format)
    dv = u.new_empty(0) if v is None else torch.zeros_like(du)
    n = torch.zeros_like(du) if n_needed else u.new_empty(0)
    dweights, dbiases = _gradients(norm_weight, weight_needs), _gradients(norm_bias, bias_needs)
    for m, rows in enumerate(row_slices(offsets, row_counts)):
        u_m, v_m = _accumulable(u, v, rows)
        activated, dh = ACTIVATIONS[activation](u_m), grad[rows].to(u_m.dtype)
        h = activated if v is None else activated * v_m
        if norm_weight:
            needs = (True, weight_needs[m], bias_needs[m])
            dh, dweight, dbias = normalize_backward(dh, h, mean[rows], rstd[rows], norm_weight[m], needs)
            for gradients, value, need in ((dweights, dweight, needs[1]), (dbiases, dbias, needs[2])):
                if need:
                    gradients[m].copy_(value)
        if n_needed:
            hhat = (h - mean[rows]) * rstd[rows] if norm_weight else h
            n[rows] = hhat * norm_weight[m] + norm_bias[m] if norm_weight else hhat
        if v is not None:
            dv[rows] = dh * activated
        du[rows] = ACTIVATION_BACKWARD[activation](dh if v is None else dh * v_m, u_m)
    return du, dv, dweights, dbiases, n


def _accumulable(u: Tensor, v: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Rows of u and v in at least float32: h is never rounded."""
    dtype = accumulation_dtype(u.dtype)
    return u[rows].to(dtype), None if v is None else v[rows].to(dtype)


def statistics(u: Tensor, norm_weight: Sequence[Tensor]) -> Tensor:
    """A zero per row where there is a norm: [rows, 1], else [0, 1]."""
    return u.new_zeros((u.shape[0] if norm_weight else 0, 1), dtype=accumulation_dtype(u.dtype))


def _gradients(vectors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Zeros for each vector that needs a gradient, nothing for the others."""
    return [
        torch.zeros_like(vector) if need else vector.new_empty(0) for vector, need in zip(vectors, needs, strict=True)
    ]


def _fake(u, v, norm_weight, norm_bias, offsets, row_counts, activation, eps):
    n = torch.empty_like(u, memory_format=torch.contiguous_format)
    return n, statistics(u, norm_weight), statistics(u, norm_weight)


def _fake_backward(
    grad, u, v, mean, rstd, norm_weight, norm_bias, offsets, row_counts, activation, weight_needs, bias_needs, n_needed
):
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dweights, dbiases = _gradients(norm_weight, weight_needs), _gradients(norm_bias, bias_needs)
    dv = u.new_empty(0) if v is None else torch.empty_like(du)
    return du, dv, dweights, dbiases, torch.empty_like(du) if n_needed else u.new_empty(0)


_op = define(
    "gated_sub_ln",
    "(Tensor u, Tensor? v, Tensor[] norm_weight, Tensor[] norm_bias, Tensor offsets, SymInt[] row_counts,"
    " str activation, float eps) -> (Tensor, Tensor, Tensor)",
    gated_sub_ln_reference,
    _fake,
    kernel="gated_sub_ln",
)
_backward_op = define(
    "gated_sub_ln_backward",
    "(Tensor grad, Tensor u, Tensor? v, Tensor mean, Tensor rstd, Tensor[] norm_weight, Tensor[] norm_bias,"
    " Tensor offsets, SymInt[] row_counts, str activation, bool[] weight_needs, bool[] bias_needs, bool n_needed)"
    " -> (Tensor, Tensor, Tensor[], Tensor[], Tensor)",
    gated_sub_ln_backward_reference,
    _fake_backward,
    kernel="gated_sub_ln",
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    u, v, norm_weight, norm_bias, offsets, row_counts, activation, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.row_counts, ctx.activation = row_counts, activation
    ctx.save_for_backward(u, v, mean, rstd, offsets, *norm_weight, *norm_bias)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    u, v, mean, rstd, offsets, *parameters = ctx.saved_tensors
    groups = len(parameters) // 2
    weight_needs, bias_needs = (list(ctx.needs_input_grad[i] or ()) for i in (2, 3))
    du, dv, dweights, dbiases, _ = _backward_op(
        grad, u, v, mean, rstd, parameters[:groups], parameters[groups:], offsets, ctx.row_counts, ctx.activation,
        weight_needs, bias_needs, False,
    )  # fmt: skip
    return (
        du,
        None if v is None else dv,
        only_needed(dweights, weight_needs),
        only_needed(dbiases, bias_needs),
        None,
        no_gradient(ctx.row_counts),
        None,
        None,
    )


register_gradient("gated_sub_ln", _setup_context, _backward)


def gated_sub_ln(
    u: Tensor,
    v: Tensor | None = None,
    norm_weight: Sequence[Tensor] | None = None,
    norm_bias: Sequence[Tensor] | None = None,
    *,
    offsets: Tensor,
    row_counts: Sequence[int] = (),
    activation: str = "gelu",
    eps: float = 1e-5,
) -> Tensor:
    """activation(u) * v and the Sub-LayerNorm of each row's modality.

    That is GeGLU, or SwiGLU with silu (Shazeer, arXiv 2002.05202), and Sub-LN (Wang et al., arXiv 2210.06423).

    Args:
        u: floating point [rows, width], any row stride, at most 16,384 wide; rows offsets[m] to offsets[m + 1] are
            those of modality m.
        v: as u, the values that the activation gates; None for none.
        norm_weight, norm_bias: one [width] per modality; None for no norm.
        offsets: int32 [G + 1], the plan's.
        row_counts: the plan's row counts, where the host knows them.
        activation: "gelu" (exact, by erf), "gelu_tanh" (its approximation by tanh) or "silu".
        eps: added to the variance.

    Returns:
        [rows, width] in u's dtype. h and its statistics are float32 for half precision. A norm without rows gets zero
        gradients, a frozen one none.

    Raises:
        ValueError: a dtype, shape, device or name that does not fit.
    """
    norm_weight, norm_bias = list(norm_weight or ()), list(norm_bias or ())
    require_rows("u", u)
    check_routing(offsets, row_counts, u)
    if v is not None:
        fits = isinstance(v, Tensor) and v.dtype == u.dtype and v.shape == u.shape
        require(fits, lambda: f"v: got {describe(v)}, takes u's dtype and shape, {describe(u)}")
        require_device("v", v, u.device)
    groups = offsets.shape[0] - 1
    for name, vectors in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        fits = not vectors or len(vectors) == groups
        require(
            fits,
            lambda name=name, vectors=vectors: f"{name}: got {len(vectors)} tensors, takes one per modality, {groups}",
        )
        for m, vector in enumerate(vectors):
            require_vector(f"{name}[{m}]", vector, u.shape[1], u.device)
    require(len(norm_weight) == len(norm_bias), "norm_weight, norm_bias: got one of them, takes both or none")
    require(activation in ACTIVATIONS, lambda: f"activation: got {activation!r}, takes one of {', '.join(ACTIVATIONS)}")
    require(eps > 0, lambda: f"eps: got {eps}, takes a positive number")
    return _op(u, v, norm_weight, norm_bias, offsets, row_counts, activation, eps)[0]
