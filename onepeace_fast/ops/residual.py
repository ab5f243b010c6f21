"""The residual connection of a branch, and the LayerNorm or RMSNorm that follows it.

    out = x + drop_path * gamma * dropout(y),   normed = LayerNorm(out) or RMSNorm(out)

gamma is LayerScale (Touvron et al., arXiv 2103.17239), drop_path DropPath's factor of the row's sample (Huang et al.,
arXiv 1603.09382). The residual stream may be float32 while the branch is half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_tensor, require_vector
from onepeace_fast.ops.arguments import (
    FLOATS,
    check_offsets,
    check_routing,
    check_row_index,
    check_sample,
    factor_of_rows,
    require_drop_path,
    require_eps,
    require_row_index,
    require_rows,
)
from onepeace_fast.ops.dropout import dropout_factor
from onepeace_fast.ops.kernel_choice import runs_kernel
from onepeace_fast.ops.layer_norm import normalize, normalize_backward
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import accumulation_dtype
from onepeace_fast.structures import (
    Dropout,
    DropPath,
    Needs,
    ResidualGradients,
    ResidualInputs,
    ResidualOutputs,
    ResidualSaved,
    Routing,
)


def row_factor(
    x: Tensor, y_dtype: torch.dtype, gamma: Tensor | None, drop_path: DropPath, dropout: Dropout
) -> Tensor | None:
    """drop_path * gamma * dropout's factor, broadcastable to x, in at least float32; None where all are absent."""
    dtype = torch.promote_types(torch.float32, y_dtype)
    factor = None if gamma is None else gamma.to(dtype)
    if drop_path.scale is not None:
        per_row = factor_of_rows(drop_path, dtype)[:, None]
        factor = per_row if factor is None else factor * per_row
    if dropout.probability:
        drop = dropout_factor(dropout.seed, x.shape, dropout.probability).to(dtype)
        factor = drop if factor is None else factor * drop
    return factor


def branch_places(routing: Routing, count: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which row of y each row of x gets, -1 for none, [rows of x]; and which row of x each row of y goes to, [N].

    Rows of y past the last of ``offsets`` go to a row behind the last of x. Nothing is read on the host.
    """
    entries = torch.arange(count, device=x.device)
    target = entries if routing.row_index is None else routing.row_index.long()
    if routing.offsets is not None:
        target = torch.where(entries < routing.offsets[-1], target, x.shape[0])
    place = entries.new_full((x.shape[0] + 1,), -1)
    place[target] = entries
    return place[:-1], target


def residual_reference(given: ResidualInputs) -> ResidualOutputs:
    """out in x's dtype and, with a norm, normed in y's dtype."""
    x, y, routing = given.x, given.y, given.routing
    check_offsets(routing, y.shape[0])
    if routing.row_index is not None:
        check_row_index(routing.row_index, routing.offsets, x)
    factor = row_factor(x, y.dtype, given.gamma, given.drop_path, given.dropout)
    if routing.row_index is None and routing.offsets is None:
        out = (x + y if factor is None else (y * factor).add_(x)).to(x.dtype).contiguous()
    else:
        place, _ = branch_places(routing, y.shape[0], x)
        branch = _rows_at(y, place)
        out = x + (branch if factor is None else branch * factor)
        out = torch.where(place[:, None] < 0, x, out.to(x.dtype)).contiguous()
    if given.norm_weight is None:
        return ResidualOutputs(out, None, None, None)
    normed, mean, rstd = normalize(out, given.norm_weight, given.norm_bias, given.eps, given.norm_is_rms)
    return ResidualOutputs(out, normed.to(y.dtype), mean, rstd)


def residual_backward_reference(saved: ResidualSaved, needs: Needs) -> ResidualGradients:
    """With total = grad_out + norm'(grad_normed): dx = total, dy = total * factor,

    dgamma = sum(total * drop_path * y).
    """
    y, grad, routing, y_dtype = saved.y, saved.grad_out, saved.routing, saved.y_dtype
    total, dx, dweight, dbias, dgamma = grad, None, None, None, None
    if saved.grad_normed is not None:
        total, dweight, dbias = normalize_backward(
            saved.grad_normed, saved.out, saved.mean, saved.rstd, saved.norm_weight,
            (True, needs.norm_weight, needs.norm_bias),
        )  # fmt: skip
        total = total if grad is None else total.add_(grad)
        dx = total.to(saved.out.dtype)
    factor = row_factor(total, y_dtype, saved.gamma, saved.drop_path, saved.dropout)
    dy = total if factor is None else total * factor
    if routing.row_index is not None or routing.offsets is not None:
        place, target = branch_places(routing, branch_rows(total, routing), total)
        dy = _rows_at(dy, torch.where(target < total.shape[0], target, -1))
        y = _rows_at(y, place) if needs.gamma else None
        total = torch.where(place[:, None] < 0, 0, total)
    if needs.gamma:
        scaled = row_factor(total, y_dtype, None, saved.drop_path, saved.dropout)
        dgamma = (total * (y if scaled is None else y * scaled)).sum(0).to(saved.gamma.dtype)
    if needs.y:
        dy = dy.to(y_dtype).contiguous()
        dy = dy.clone() if dy is grad or dy is dx else dy
    return ResidualGradients(
        dx,
        dy if needs.y else None,
        dgamma,
        _parameter_gradient(saved.norm_weight, dweight) if needs.norm_weight else None,
        _parameter_gradient(saved.norm_bias, dbias) if needs.norm_bias else None,
    )


def branch_rows(stream: Tensor, routing: Routing) -> int:
    """How many rows a branch has."""
    return stream.shape[0] if routing.row_index is None else routing.row_index.shape[0]


def _rows_at(x: Tensor, place: Tensor) -> Tensor:
    """Rows x[place], zero where ``place`` is -1."""
    if not x.shape[0]:
        return x.new_zeros(place.shape[0], x.shape[1])
    return torch.where(place[:, None] < 0, 0, x[place.clamp(min=0)])


def _parameter_gradient(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """A norm whose output received no gradient still owes zeros."""
    return torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)


def _by_kernel(given: ResidualInputs) -> ResidualOutputs:
    from onepeace_fast.kernels.residual import residual_forward

    check_offsets(given.routing, given.y.shape[0])
    check_sample(given.drop_path)
    return residual_forward(given)


def _backward_by_kernel(saved: ResidualSaved, needs: Needs) -> ResidualGradients:
    from onepeace_fast.kernels.residual import residual_backward

    return residual_backward(saved, needs)


def residual_backward_and_sums(
    saved: ResidualSaved, needs: Needs, sums: Sequence[Tensor | None], ranges: Sequence[slice] = (slice(None),)
) -> ResidualGradients:
    """The gradients by the kernel where it runs, and the sum of dy over the rows of each modality, or over all rows.

    The sums go into vectors [width], where there is one. Where dy is not needed, nothing may scale it.
    """
    if runs_kernel("residual_backward", saved.grad_out if saved.grad_normed is None else saved.grad_normed):
        from onepeace_fast.kernels.residual import residual_backward

        return residual_backward(saved, needs, sums)
    found = residual_backward_reference(saved, needs)
    dy = next(grad for grad in (found.y, found.x, saved.grad_out) if grad is not None)
    for rows, into in zip(ranges, sums, strict=False):
        if into is not None:
            torch.sum(dy[rows], 0, dtype=into.dtype, out=into)
    return found


def residual_fake(given: ResidualInputs) -> ResidualOutputs:
    """The shapes of the outputs."""
    x = given.x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if given.norm_weight is None:
        return ResidualOutputs(out, None, None, None)
    rstd = x.new_empty((x.shape[0], 1), dtype=accumulation_dtype(x.dtype))
    mean = None if given.norm_is_rms else torch.empty_like(rstd)
    return ResidualOutputs(out, torch.empty_like(out, dtype=given.y.dtype), mean, rstd)


def _fake_backward(saved: ResidualSaved, needs: Needs) -> ResidualGradients:
    like = saved.grad_out if saved.grad_normed is None else saved.out
    parameters = (
        (saved.gamma, needs.gamma),
        (saved.norm_weight, needs.norm_weight),
        (saved.norm_bias, needs.norm_bias),
    )
    return ResidualGradients(
        None if saved.grad_normed is None else like.new_empty(like.shape),
        like.new_empty((branch_rows(like, saved.routing), like.shape[1]), dtype=saved.y_dtype) if needs.y else None,
        *(torch.empty_like(parameter) if need else None for parameter, need in parameters),
    )


def _select(given: ResidualInputs, outputs: ResidualOutputs, needs: Needs) -> dict[str, Any]:
    selected: dict[str, Any] = {"y": given.y if needs.gamma else None, "y_dtype": given.y.dtype}
    if given.norm_weight is None:
        selected["out"] = None
    if not given.dropout.probability:
        selected["dropout"] = Dropout()
    return selected


def _finish(backward: Callable[..., Any], saved: ResidualSaved, needs: Needs) -> ResidualGradients:
    """Without a gradient of the norm, that of x is ``grad_out`` itself, and where nothing scales y its own too."""
    if saved.norm_weight is None:
        saved = saved._replace(grad_normed=None)
    grad = saved.grad_out
    if saved.grad_normed is not None:
        return backward(saved, needs)
    if grad is None:
        return ResidualGradients(None, None, None, None, None)
    scaled = saved.gamma, saved.drop_path.scale, saved.dropout.seed, saved.routing.row_index, saved.routing.offsets
    if saved.norm_weight is None and all(value is None for value in scaled):
        return ResidualGradients(grad, grad.to(saved.y_dtype), None, None, None)
    return backward(saved, needs)._replace(x=grad)


RESIDUAL = Operation(
    "residual",
    ResidualInputs,
    ResidualOutputs,
    reference=residual_reference,
    kernel=_by_kernel,
    fake=residual_fake,
    gradient=Gradient(
        ResidualSaved, ResidualGradients, residual_backward_reference, _backward_by_kernel, _fake_backward,
        _select, _finish,
    ),
)  # fmt: skip


def residual(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None = None,
    *,
    drop_path: Tensor | None = None,
    sample: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """x + drop_path * gamma * dropout(y).

    Args:
        x: floating point [rows, width], the residual stream, at most 16,384 wide, past 4,096 by the reference.
        y: [rows, width], or [N, width] with ``row_index``, the branch, in x's dtype, or in half precision over a
            float32 x.
        gamma: floating point [width], LayerScale (Touvron et al., arXiv 2103.17239).
        drop_path: float32 or float64 [samples], DropPath's factor of each sample (Huang et al., arXiv 1603.09382);
            needs ``sample``.
        sample: int32 or int64 [rows], sample of each row of x.
        dropout: probability in [0, 1) to zero an element of y; needs ``seed``.
        seed: int64 [] on y's device; the random numbers depend on it and on the element's place in x alone.
        row_index: int32 [N], distinct rows of x: y[i] is added to x[row_index[i]], all other rows are x bit by bit.
        offsets: int32 [G + 1], first row of each modality in y; rows of y past the last are not read.

    Returns:
        [rows, width] in x's dtype.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    given = ResidualInputs(
        x, y, gamma, DropPath(drop_path, sample), Dropout(dropout, seed), Routing(offsets, (), row_index), None, None,
        eps=1e-5,
    )  # fmt: skip
    check_residual(given)
    return RESIDUAL(given)[0]


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    drop_path: Tensor | None = None,
    sample: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``residual``, and the LayerNorm of all its rows (Ba et al., arXiv 1607.06450).

    Args:
        x, y, gamma, drop_path, sample, dropout, seed, row_index, offsets: as in ``residual``.
        norm_weight, norm_bias: floating point [width]; the bias may be None.
        eps: added to the variance.

    Returns:
        out [rows, width] in x's dtype, and LayerNorm(out) [rows, width] in y's dtype; statistics are those of out as it
        is stored, float32 for half precision.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    return _normed(ResidualInputs(
        x, y, gamma, DropPath(drop_path, sample), Dropout(dropout, seed), Routing(offsets, (), row_index), norm_weight,
        norm_bias, eps,
    ))  # fmt: skip


def residual_rms_norm(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    norm_weight: Tensor,
    *,
    drop_path: Tensor | None = None,
    sample: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    row_index: Tensor | None = None,
    offsets: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``residual``, and the RMSNorm of all its rows (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Args:
        x, y, gamma, drop_path, sample, dropout, seed, row_index, offsets: as in ``residual``.
        norm_weight: floating point [width].
        eps: added to the mean of squares.

    Returns:
        out [rows, width] in x's dtype, and RMSNorm(out) [rows, width] in y's dtype; statistics are those of out as it
        is stored, float32 for half precision.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    return _normed(ResidualInputs(
        x, y, gamma, DropPath(drop_path, sample), Dropout(dropout, seed), Routing(offsets, (), row_index), norm_weight,
        None, eps, norm_is_rms=True,
    ))  # fmt: skip


def _normed(given: ResidualInputs) -> tuple[Tensor, Tensor]:
    check_residual(given)
    check_norm(given)
    out, normed = RESIDUAL(given)
    return out, normed


def check_norm(given: ResidualInputs) -> None:
    """Raise unless the norm's parameters fit the stream."""
    x, weight = given.x, given.norm_weight
    require(weight is not None, "norm_weight: expected a floating-point vector, got None; residual() has no norm")
    require_eps(given.eps)
    require_vector("norm_weight", weight, x.shape[1], x.device)
    require_vector("norm_bias", given.norm_bias, x.shape[1], x.device)


def check_residual(given: ResidualInputs, name: str = "y", columns: int | None = None) -> None:
    """Raise unless the branch's rows, of x's width or so many columns, and what scales it fit the stream."""
    x, y, routing, dropout = given.x, given.y, given.routing, given.dropout
    require_rows("x", x)
    require_tensor(name, y, FLOATS, "[rows, width]", 2)
    require_row_index(routing.row_index, x)
    shape = branch_rows(x, routing), x.shape[1] if columns is None else columns
    require(
        y.shape == shape,
        lambda: f"{name}: expected {list(shape)}, a row for each of x or of row_index, got {describe(y)}",
    )
    require(
        y.dtype == x.dtype or (x.dtype == torch.float32 and y.dtype.itemsize == 2),
        lambda: f"{name}: expected x's dtype, or half precision over a float32 x, got {describe(y)} over {describe(x)}",
    )
    require_device(name, y, x.device)
    if routing.offsets is not None:
        check_routing(routing, y)
    require_vector("gamma", given.gamma, x.shape[1], x.device)
    require_drop_path(given.drop_path, x)
    probability, seed = dropout
    require(0.0 <= probability < 1.0, lambda: f"dropout: expected a probability in [0, 1), got {probability}")
    require(
        not probability or seed is not None, lambda: f"seed: expected an int64 [] with dropout {probability}, got none"
    )
    if seed is not None:
        require_tensor("seed", seed, (torch.int64,), "[]", 0)
        require_device("seed", seed, x.device)
