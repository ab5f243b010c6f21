"""The pointwise heart of a routed feed-forward network: gate, and Sub-LayerNorm of the row's modality.

    h = activation(u) * v, or activation(u) without a gate;   n = (h - mean) * rstd * weight + bias

mean and rstd = 1 / sqrt(variance + eps) are those of each row of h, weight and bias those of the row's modality
(GeGLU: Shazeer, arXiv 2002.05202; Sub-LayerNorm: Wang et al., arXiv 2210.06423). Without a norm n = h. Rows past the
last modality are inert and come out as zero. The backward pass computes h again and stores none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_vector
from onepeace_fast.ops.arguments import (
    check_offsets,
    check_routing,
    require_eps,
    require_lists,
    require_one_per_modality,
    require_rows,
)
from onepeace_fast.ops.kernel_choice import runs_kernel
from onepeace_fast.ops.layer_norm import normalize, normalize_backward, zeros_where_needed
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import accumulation_dtype, end_of, row_slices
from onepeace_fast.structures import (
    GatedSubLNGradients,
    GatedSubLNInputs,
    GatedSubLNOutputs,
    GatedSubLNSaved,
    Needs,
    Routing,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, u: torch.ops.aten.gelu_backward(grad, u, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
    "relu": lambda grad, u: torch.ops.aten.threshold_backward(grad, u, 0),  # 0 at 0
}


def gated_sub_ln_reference(given: GatedSubLNInputs) -> GatedSubLNOutputs:
    """The rows of each modality after one another; h is never rounded."""
    u, v, norm_weight = given.u, given.v, given.norm_weight
    check_offsets(given.routing, u.shape[0])
    n = torch.empty_like(u, memory_format=torch.contiguous_format)
    mean, rstd = (statistics(u, norm_weight) for _ in range(2))
    ranges = list(row_slices(given.routing))
    for m, rows in enumerate(ranges):
        u_m, v_m = _accumulable(u, v, rows)
        h = ACTIVATIONS[given.activation](u_m)
        h = h if v is None else h.mul_(v_m)
        if norm_weight:
            h, mean[rows], rstd[rows] = normalize(h, norm_weight[m], given.norm_bias[m], given.eps)
        n[rows] = h
    n[end_of(ranges) :] = 0
    return GatedSubLNOutputs(n, mean, rstd)


def gated_sub_ln_backward_reference(saved: GatedSubLNSaved, needs: Needs) -> GatedSubLNGradients:
    """With hhat = (h - mean) rstd and g = grad weight: dweight = sum(grad hhat), dbias = sum(grad),

    dh = rstd (g - mean(g) - hhat mean(g hhat)),  du = activation'(u) dh v,  dv = dh activation(u).
    """
    return gated_sub_ln_backward_and_n_reference(saved, needs, n_needed=False)[0]


def gated_sub_ln_backward_and_n_reference(
    saved: GatedSubLNSaved, needs: Needs, n_needed: bool = True
) -> tuple[GatedSubLNGradients, Tensor | None]:
    """The gradients, and n once more: the products on either side need it and it costs no further reading here."""
    u, v, norm_weight, norm_bias = saved.u, saved.v, saved.norm_weight, saved.norm_bias
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dv = None if v is None else torch.empty_like(du)
    n = torch.empty_like(du) if n_needed else None
    dweight, dbias = zeros_where_needed(norm_weight, needs.norm_weight), zeros_where_needed(norm_bias, needs.norm_bias)
    ranges = list(row_slices(saved.routing))
    for m, rows in enumerate(ranges):
        u_m, v_m = _accumulable(u, v, rows)
        activated, dh = ACTIVATIONS[saved.activation](u_m), saved.grad_n[rows].to(u_m.dtype)
        h = activated if v is None else activated * v_m
        if n is not None:
            hhat = (h - saved.mean[rows]) * saved.rstd[rows] if norm_weight else h
            n[rows] = hhat * norm_weight[m] + norm_bias[m] if norm_weight else hhat
        if norm_weight:
            wanted = (True, dweight[m] is not None, dbias[m] is not None)
            dh, *parts = normalize_backward(dh, h, saved.mean[rows], saved.rstd[rows], norm_weight[m], wanted)
            for gradient, part in zip((dweight[m], dbias[m]), parts, strict=True):
                if gradient is not None:
                    gradient.copy_(part)
        if dv is not None:
            torch.mul(dh, activated, out=dv[rows])
        du[rows] = ACTIVATION_BACKWARD[saved.activation](dh if v is None else dh * v_m, u_m)
    for inert in (du, dv, n):
        if inert is not None:
            inert[end_of(ranges) :] = 0
    return GatedSubLNGradients(du, dv, dweight, dbias), n


def _accumulable(u: Tensor, v: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Rows of u and v in at least float32."""
    dtype = accumulation_dtype(u.dtype)
    return u[rows].to(dtype), None if v is None else v[rows].to(dtype)


def statistics(u: Tensor, norm_weight: Sequence[Tensor]) -> Tensor | None:
    """A zero for each row [rows, 1], None where there is no norm."""
    return u.new_zeros((u.shape[0], 1), dtype=accumulation_dtype(u.dtype)) if norm_weight else None


def _by_kernel(given: GatedSubLNInputs) -> GatedSubLNOutputs:
    from onepeace_fast.kernels.gated_sub_ln import gated_sub_ln_forward

    check_offsets(given.routing, given.u.shape[0])
    return gated_sub_ln_forward(given)


def _backward_by_kernel(saved: GatedSubLNSaved, needs: Needs) -> GatedSubLNGradients:
    from onepeace_fast.kernels.gated_sub_ln import gated_sub_ln_backward

    return gated_sub_ln_backward(saved, needs)


def gated_sub_ln_backward_and_n(
    saved: GatedSubLNSaved, needs: Needs, n_needed: bool
) -> tuple[GatedSubLNGradients, Tensor | None]:
    """The gradients, and n once more, by the kernel where it runs."""
    if not runs_kernel("gated_sub_ln_backward", saved.grad_n):
        return gated_sub_ln_backward_and_n_reference(saved, needs, n_needed)
    from onepeace_fast.kernels.gated_sub_ln import gated_sub_ln_backward_and_n

    return gated_sub_ln_backward_and_n(saved, needs, n_needed)


def _fake(given: GatedSubLNInputs) -> GatedSubLNOutputs:
    u, norm_weight = given.u, given.norm_weight
    n = torch.empty_like(u, memory_format=torch.contiguous_format)
    return GatedSubLNOutputs(n, statistics(u, norm_weight), statistics(u, norm_weight))


def _fake_backward(saved: GatedSubLNSaved, needs: Needs) -> GatedSubLNGradients:
    du = torch.empty_like(saved.u, memory_format=torch.contiguous_format)
    return GatedSubLNGradients(
        du,
        None if saved.v is None else torch.empty_like(du),
        zeros_where_needed(saved.norm_weight, needs.norm_weight),
        zeros_where_needed(saved.norm_bias, needs.norm_bias),
    )


GATED_SUB_LN = Operation(
    "gated_sub_ln",
    GatedSubLNInputs,
    GatedSubLNOutputs,
    reference=gated_sub_ln_reference,
    kernel=_by_kernel,
    fake=_fake,
    gradient=Gradient(
        GatedSubLNSaved, GatedSubLNGradients, gated_sub_ln_backward_reference, _backward_by_kernel,
        _fake_backward,
    ),
)  # fmt: skip


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

    That is GeGLU, SwiGLU with silu or ReGLU with relu (Shazeer, arXiv 2002.05202), and Sub-LN (Wang et al., arXiv
    2210.06423).

    Args:
        u: floating point [rows, width], any row stride, at most 16,384 wide, past 6,144 by the reference; rows
            offsets[m] to offsets[m + 1] are those of modality m.
        v: as u, the values that the activation gates; None for none.
        norm_weight, norm_bias: one floating-point [width] per modality; None for no norm.
        offsets: int32 [G + 1], the plan's.
        row_counts: the plan's row counts, where the host knows them.
        activation: "gelu" (exact, by erf), "gelu_tanh" (its approximation by tanh), "silu" or "relu", whose derivative
            at 0 is 0.
        eps: added to the variance.

    Returns:
        [rows, width] in u's dtype. h and its statistics are float32 for half precision. A norm without rows gets zero
        gradients, a frozen one none.

    Raises:
        ValueError: a dtype, shape, device or name that does not fit.
    """
    require_lists(norm_weight=norm_weight, norm_bias=norm_bias)
    norm_weight, norm_bias = list(norm_weight or ()), list(norm_bias or ())
    routing = Routing(offsets, tuple(row_counts))
    require_rows("u", u)
    check_routing(routing, u)
    if v is not None:
        fits = isinstance(v, Tensor) and v.dtype == u.dtype and v.shape == u.shape
        require(fits, lambda: f"v: expected u's dtype and shape, {describe(u)}, got {describe(v)}")
        require_device("v", v, u.device)
    modalities = offsets.shape[0] - 1
    for name, vectors in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        require_one_per_modality(name, vectors, modalities)
        for m, vector in enumerate(vectors):
            require_vector(f"{name}[{m}]", vector, u.shape[1], u.device)
    require_norm_and_activation(norm_weight, norm_bias, activation, eps)
    return GATED_SUB_LN(GatedSubLNInputs(u, v, norm_weight, norm_bias, routing, activation, eps))[0]


def require_norm_and_activation(
    norm_weight: Sequence[Tensor], norm_bias: Sequence[Tensor], activation: str, eps: float
) -> None:
    """Raise unless the Sub-LayerNorm has both parameters or none, and the activation and eps are ones there are."""
    require(len(norm_weight) == len(norm_bias), "norm_weight, norm_bias: expected both or none, got one of them")
    require(
        activation in ACTIVATIONS, lambda: f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
    )
    require_eps(eps)
