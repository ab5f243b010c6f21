"""A linear layer that ends a branch, the residual connection behind it, and the LayerNorm that follows.

    y = z W^T + b,   out = x + drop_path * gamma * y,   normed = LayerNorm(out)

With g the gradient of drop_path * gamma * y before gamma, so g = drop_path * (grad_out + LayerNorm'(grad_normed)), and
G = g^T z, the gradients do not need y, which then is not kept:

    dW = gamma G,  db = gamma sum(g),  dgamma = rowsum(W * G) + b sum(g),  dz = g (gamma W)

Nothing is divided by gamma, which may be 0. The products are the vendor's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_tensor, require_vector
from onepeace_fast.linear_residual_structures import (
    LinearResidualGradients,
    LinearResidualInputs,
    LinearResidualOutputs,
    LinearResidualSaved,
)
from onepeace_fast.ops.arguments import FLOATS, autocast_dtype
from onepeace_fast.ops.kernel_choice import runs_kernel
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import accumulation_dtype
from onepeace_fast.ops.residual import (
    RESIDUAL,
    branch_rows,
    check_norm,
    check_residual,
    residual_backward_and_sums,
    residual_fake,
)
from onepeace_fast.structures import (
    Dropout,
    DropPath,
    Needs,
    ResidualGradients,
    ResidualInputs,
    ResidualSaved,
    Routing,
)


def linear_residual_forward(given: LinearResidualInputs) -> LinearResidualOutputs:
    """A product, and ``residual`` by its kernel where that runs."""
    z, weight = given.z, given.weight
    y = torch.mm(z, weight.t()) if given.bias is None else torch.addmm(given.bias, z, weight.t())
    return LinearResidualOutputs._make((*RESIDUAL.run(_as_residual(given, y)), y if given.keep_y else None))


def _as_residual(given: LinearResidualInputs, y: Tensor) -> ResidualInputs:
    return ResidualInputs(
        given.x, y, given.gamma, given.drop_path, Dropout(), given.routing, given.norm_weight, given.norm_bias,
        given.eps,
    )  # fmt: skip


def linear_residual_backward(saved: LinearResidualSaved, needs: Needs) -> LinearResidualGradients:
    """By the formulas above where y was not kept, otherwise with dy = gamma g: dW = dy^T z, db = sum(dy), dz = dy W."""
    z, weight, bias = saved.z, saved.weight, saved.bias
    without_y = needs.gamma and saved.y is None
    branch = _as_residual_saved(saved, None if without_y else saved.gamma)
    dbias = torch.empty_like(bias) if needs.bias and not without_y else None
    total = weight.new_empty(weight.shape[0], dtype=accumulation_dtype(weight.dtype)) if without_y else None
    scaled = any(value is not None for value in (branch.gamma, branch.drop_path.scale, *branch.routing[::2]))
    stream = saved.grad_out if saved.grad_normed is None else saved.out
    cast = scaled or stream.dtype != weight.dtype
    of_gamma = needs.gamma and not without_y
    wanted = ResidualGradients._make((True, cast, of_gamma, needs.norm_weight, needs.norm_bias))
    found = residual_backward_and_sums(branch, wanted, [total if without_y else dbias])
    g = next(grad for grad in (found.y, found.x, saved.grad_out) if grad is not None)
    gradients = LinearResidualGradients(found.x, None, None, dbias, found.gamma, found.norm_weight, found.norm_bias)
    if not without_y:
        dz = torch.mm(g, weight) if needs.z else None
        return gradients._replace(z=dz, weight=torch.mm(g.t(), z) if needs.weight else None)
    dz = None
    if needs.z:
        scaled_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)  # not in gamma's wider dtype
        dz = torch.mm(g, torch.mul(weight, saved.gamma[:, None], out=scaled_weight))
    of_scale = parameter_gradients_reference
    if runs_kernel("linear_residual_backward", weight):
        from onepeace_fast.kernels.linear_residual import parameter_gradients

        of_scale = parameter_gradients
    dweight, dbias, dgamma = of_scale(torch.mm(g.t(), z), total, weight, bias, saved.gamma)
    return gradients._replace(
        z=dz, weight=dweight if needs.weight else None, bias=dbias if needs.bias else None, gamma=dgamma
    )


def _as_residual_saved(saved: LinearResidualSaved, gamma: Tensor | None) -> ResidualSaved:
    return ResidualSaved(
        saved.grad_out, saved.grad_normed, saved.y, gamma, saved.drop_path, Dropout(), saved.routing, saved.out,
        saved.norm_weight, saved.norm_bias, saved.mean, saved.rstd, saved.weight.dtype,
    )  # fmt: skip


def parameter_gradients_reference(
    product: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dW, which overwrites G [width, columns], db and dgamma; ``total`` is sum(g) [width], in at least float32."""
    dgamma = (weight.to(total.dtype) * product).sum(1)
    if bias is not None:
        dgamma += bias * total
    dbias = None if bias is None else (gamma * total).to(bias.dtype)
    return product.mul_(gamma[:, None]), dbias, dgamma.to(gamma.dtype)


def _fake(given: LinearResidualInputs) -> LinearResidualOutputs:
    y = given.z.new_empty(given.z.shape[0], given.weight.shape[0])
    return LinearResidualOutputs._make((*residual_fake(_as_residual(given, y)), y if given.keep_y else None))


def _fake_backward(saved: LinearResidualSaved, needs: Needs) -> LinearResidualGradients:
    like, weight = saved.grad_out if saved.grad_normed is None else saved.out, saved.weight
    parameters = ("weight", "bias", "gamma", "norm_weight", "norm_bias")
    return LinearResidualGradients(
        None if saved.grad_normed is None else like.new_empty(like.shape),
        weight.new_empty(branch_rows(like, saved.routing), weight.shape[1]) if needs.z else None,
        *(
            torch.empty_like(getattr(saved, name), memory_format=torch.contiguous_format)
            if getattr(needs, name) else None
            for name in parameters
        ),
    )  # fmt: skip


def _select(given: LinearResidualInputs, outputs: LinearResidualOutputs, needs: Needs) -> dict[str, Any]:
    selected: dict[str, Any] = {} if needs.weight or (needs.gamma and not given.keep_y) else {"z": None}
    return selected if given.norm_weight is not None else {**selected, "out": None}


def _finish(backward: Callable[..., Any], saved: LinearResidualSaved, needs: Needs) -> LinearResidualGradients:
    """Without a gradient of the norm, that of x is ``grad_out`` itself."""
    if saved.norm_weight is None:
        saved = saved._replace(grad_normed=None)
    if saved.grad_normed is not None:
        return backward(saved, needs)
    if saved.grad_out is None:
        return LinearResidualGradients._make([None] * len(LinearResidualGradients._fields))
    return backward(saved, needs)._replace(x=saved.grad_out)


LINEAR_RESIDUAL = Operation(
    "linear_residual",
    LinearResidualInputs,
    LinearResidualOutputs,
    reference=linear_residual_forward,
    kernel=linear_residual_forward,
    fake=_fake,
    gradient=Gradient(
        LinearResidualSaved, LinearResidualGradients, linear_residual_backward, linear_residual_backward,
        _fake_backward, _select, _finish,
    ),
)  # fmt: skip


def linear_residual(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    drop_path: Tensor | None = None,
    sample: Tensor | None = None,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None]:
    """``residual`` of the linear layer z W^T + b, with ``norm_weight`` ``residual_layer_norm``.

    Args:
        x, gamma, norm_weight, norm_bias, drop_path, sample, row_index, offsets, eps: as there.
        z: [rows, columns], or [N, columns] with ``row_index``, in x's dtype, or in half precision over a float32 x.
        weight, bias: [width, columns] and [width] in z's dtype; the bias may be None.

    Returns:
        out [rows, width] in x's dtype, and LayerNorm(out) in z's, None without ``norm_weight``. Under autocast z has
        its dtype.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    if (dtype := autocast_dtype(z)) is not None:
        z, weight, bias = z.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # float16 does not reach as low as a small gamma times a weight, nor as high as G.
    formula = z.dtype != torch.float16 and weight.requires_grad
    keep_y = gamma is not None and gamma.requires_grad and torch.is_grad_enabled() and not formula
    given = LinearResidualInputs(
        x, z, weight, bias, gamma, DropPath(drop_path, sample), Routing(offsets, (), row_index), norm_weight, norm_bias,
        eps, keep_y,
    )  # fmt: skip
    _check(given)
    out, normed = LINEAR_RESIDUAL(given)
    return out, None if norm_weight is None else normed


def _check(given: LinearResidualInputs) -> None:
    x, z, weight, bias = given[:4]
    as_residual = _as_residual(given, z)
    check_residual(as_residual, "z", z.shape[1])
    if given.norm_weight is not None:
        check_norm(as_residual)
    require_tensor("weight", weight, FLOATS, "[width, columns]", 2)
    require(
        weight.shape == (x.shape[1], z.shape[1]) and weight.dtype == z.dtype,
        lambda: f"weight: expected {[x.shape[1], z.shape[1]]} in z's dtype, got {describe(weight)} for {describe(z)}",
    )
    require_device("weight", weight, x.device)
    require_vector("bias", bias, x.shape[1], x.device)
    require(
        bias is None or bias.dtype == z.dtype,
        lambda: f"bias: expected z's dtype, got {describe(bias)} for {describe(z)}",
    )
