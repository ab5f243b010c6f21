"""The residual connection of a branch, and the LayerNorm that follows it.

    out = x + drop_path * gamma * dropout(y),   normed = LayerNorm(out)

gamma is LayerScale (Touvron et al., arXiv 2103.17239), drop_path DropPath's factor of the row's sample (Huang et al., arXiv
1603.09382). The residual stream may be float32 while the branch is half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_tensor, require_vector
from onepeace_fast.ops.arguments import FLOATS, check_routing, check_row_index, require_row_index, require_rows
from onepeace_fast.ops.dropout import dropout_factor
from onepeace_fast.ops.layer_norm import normalize, normalize_backward
from onepeace_fast.ops.operation import define, register_gradient
from onepeace_fast.ops.packed_rows import accumulation_dtype


def row_factor(
    x: Tensor, y_dtype: torch.dtype, gamma: Tensor | None, drop_path: Tensor | None, sample: Tensor | None, dropout: float,
    seed: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """drop_path * gamma * dropout's factor, broadcastable to x, in at least float32; None where all are absent."""
    dtype = torch.promote_types(torch.float32, y_dtype)
    factor = None if gamma is None else gamma.to(dtype)
    if drop_path is not None:
        per_row = drop_path.to(dtype)[sample.long(), None]
        factor = per_row if factor is None else factor * per_row
    if dropout:
        drop = dropout_factor(seed, x.shape, dropout).to(dtype)
        factor = drop if factor is None else factor * drop
    return factor


def branch_places(row_index: Tensor | None, offsets: Tensor | None, y: Tensor, x_rows: int) -> tuple[Tensor, Tensor]:
    """Which row of y each row of x gets, -1 for none, [x_rows]; and which row of x each row of y goes to, [N].

    Rows of y past the last of ``offsets`` go to a row behind the last of x. Nothing is read on the host.
    """
    entries = torch.arange(y.shape[0], device=y.device)
    target = entries if row_index is None else row_index.long()
    if offsets is not None:
        target = torch.where(entries < offsets[-1], target, x_rows)
    place = entries.new_full((x_rows + 1,), -1)
    place[target] = entries
    return place[:-1], target


def residual_reference(
    x: Tensor, y: Tensor, gamma: Tensor | None, drop_path: Tensor | None, sample: Tensor | None, dropout: float,
    seed: Tensor | None, row_index: Tensor | None, offsets: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns out in x's dtype and, with a norm, normed in y's dtype, mean and rstd; otherwise empty tensors."""
    if row_index is not None:
        check_row_index(row_index, offsets, x)
    factor = row_factor(x, y.dtype, gamma, drop_path, sample, dropout, seed)
    if row_index is None and offsets is None:
        out = (x + (y if factor is None else y * factor)).to(x.dtype).contiguous()
    else:
        place, _ = branch_places(row_index, offsets, y, x.shape[0])
        branch = _rows_at(y, place)
        out = x + (branch if factor is None else branch * factor)
        out = torch.where(place[:, None] < 0, x, out.to(x.dtype)).contiguous()
    if norm_weight is None:
        return out, *(x.new_empty(0) for _ in range(3))
    normed, mean, rstd = normalize(out, norm_weight, norm_bias, eps)
    return out, normed.to(y.dtype), mean, rstd


def residual_backward_reference(
    grad: Tensor | None, grad_normed: Tensor | None, y: Tensor | None, gamma: Tensor | None, drop_path: Tensor | None,
    sample: Tensor | None, dropout: float, seed: Tensor | None, row_index: Tensor | None, offsets: Tensor | None,
    out: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor | None,
    rstd: Tensor | None, y_dtype: torch.dtype, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With total = grad + LayerNorm'(grad_normed): dx = total, dy = total * factor, dgamma = sum(total * drop_path * y).

    ``needs`` says which of gamma, norm_weight, norm_bias are needed; the others' gradients are empty. dx is empty
    without ``grad_normed``: it is ``grad`` then. ``y`` is there where gamma needs it, ``out`` where there is a norm.
    """
    dweight = dbias = None
    total = grad
    if grad_normed is not None:
        total, dweight, dbias = normalize_backward(grad_normed, out, mean, rstd, norm_weight, (True, *needs[1:]))
        total = total if grad is None else total.add_(grad)
    dx = total.new_empty(0) if grad_normed is None else total.to(out.dtype)
    dgamma = total.new_empty(0)
    factor = row_factor(total, y_dtype, gamma, drop_path, sample, dropout, seed)
    dy = total if factor is None else total * factor
    if row_index is not None or offsets is not None:
        place, target = branch_places(
            row_index, offsets, total if row_index is None else row_index[:, None], total.shape[0]
        )
        dy = _rows_at(dy, torch.where(target < total.shape[0], target, -1))
        y = _rows_at(y, place) if needs[0] else None
        total = torch.where(place[:, None] < 0, 0, total)
    if needs[0]:
        scaled = row_factor(total, y_dtype, None, drop_path, sample, dropout, seed)
        dgamma = (total * (y if scaled is None else y * scaled)).sum(0).to(gamma.dtype)
    dy = dy.to(y_dtype).contiguous()
    return (
        dx,
        dy.clone() if dy is grad or dy is dx else dy,
        dgamma,
        _parameter_gradient(norm_weight, dweight) if needs[1] else total.new_empty(0),
        _parameter_gradient(norm_bias, dbias) if needs[2] else total.new_empty(0),
    )


def _rows_at(x: Tensor, place: Tensor) -> Tensor:
    """Rows x[place], zero where ``place`` is -1."""
    if not x.shape[0]:
        return x.new_zeros(place.shape[0], x.shape[1])
    return torch.where(place[:, None] < 0, 0, x[place.clamp(min=0)])


def _parameter_gradient(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """A norm whose output received no gradient still owes zeros."""
    return torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)


def _fake(x, y, gamma, drop_path, sample, dropout, seed, row_index, offsets, norm_weight, norm_bias, eps):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if norm_weight is None:
        return out, *(x.new_empty(0) for _ in range(3))
    statistics = x.new_empty((x.shape[0], 1), dtype=accumulation_dtype(x.dtype))
    return out, torch.empty_like(out, dtype=y.dtype), statistics, torch.empty_like(statistics)


def _fake_backward(
    grad, grad_normed, y, gamma, drop_path, sample, dropout, seed, row_index, offsets, out, norm_weight, norm_bias, mean, rstd,
    y_dtype, needs,
):  # fmt: skip
    like = grad if grad_normed is None else out
    dx = like.new_empty(0 if grad_normed is None else like.shape)
    dy = like.new_empty((like.shape[0] if row_index is None else row_index.shape[0], like.shape[1]), dtype=y_dtype)
    parameters = (gamma, norm_weight, norm_bias)
    return dx, dy, *(torch.empty_like(p) if n else like.new_empty(0) for p, n in zip(parameters, needs, strict=True))


_op = define(
    "residual",
    "(Tensor x, Tensor y, Tensor? gamma, Tensor? drop_path, Tensor? sample, float dropout, Tensor? seed, Tensor? row_index,"
    " Tensor? offsets, Tensor? norm_weight, Tensor? norm_bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    residual_reference,
    _fake,
    kernel="residual",
)
_backward_op = define(
    "residual_backward",
    "(Tensor? grad, Tensor? grad_normed, Tensor? y, Tensor? gamma, Tensor? drop_path, Tensor? sample, float dropout,"
    " Tensor? seed, Tensor? row_index, Tensor? offsets, Tensor? out, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean,"
    " Tensor? rstd, ScalarType y_dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    residual_backward_reference,
    _fake_backward,
    kernel="residual",
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, y, gamma, drop_path, sample, dropout, seed, row_index, offsets, norm_weight, norm_bias, _ = inputs
    out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dropout, ctx.y_dtype = dropout, y.dtype
    if gamma is None or not ctx.needs_input_grad[2]:
        y = None
    if norm_weight is None:
        out = mean = rstd = None
    seed = seed if dropout else None
    ctx.save_for_backward(
        y, gamma, drop_path, sample, seed, row_index, offsets, out, norm_weight, norm_bias, mean, rstd
    )


def _backward(ctx: Any, grad: Tensor | None, grad_normed: Tensor | None, *_: Any) -> tuple:
    y, gamma, drop_path, sample, seed, row_index, offsets, out, norm_weight, norm_bias, mean, rstd = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (2, 9, 10)]
    if norm_weight is None:
        grad_normed = None
    if grad is None and grad_normed is None:
        return (None,) * 12
    if grad_normed is None and all(v is None for v in (norm_weight, gamma, drop_path, seed, row_index, offsets)):
        return grad, grad.to(ctx.y_dtype), *(None,) * 10
    dx, dy, *gradients = _backward_op(
        grad, grad_normed, y, gamma, drop_path, sample, ctx.dropout, seed, row_index, offsets, out, norm_weight, norm_bias, mean,
        rstd, ctx.y_dtype, needs,
    )  # fmt: skip
    dgamma, dweight, dbias = (g if n else None for g, n in zip(gradients, needs, strict=True))
    dx = grad if grad_normed is None else dx
    return dx, dy, dgamma, None, None, None, None, None, None, dweight, dbias, None


register_gradient("residual", _setup_context, _backward)


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
        x: floating point [rows, width], the residual stream, at most 16,384 wide.
        y: [rows, width], or [N, width] with ``row_index``, the branch, in x's dtype or in half precision over a float32 x.
        gamma: [width], LayerScale.
        drop_path: float32 [samples], DropPath's factor of each sample; needs ``sample``.
        sample: int32 [rows], sample of each row of x.
        dropout: probability in [0, 1) to zero an element of y; needs ``seed``.
        seed: int64 [] on y's device; the random numbers depend on it and on the element's place in x alone.
        row_index: int32 [N], distinct rows of x: y[i] is added to x[row_index[i]], and all other rows are x bit by bit.
        offsets: int32 [G + 1], first row of each modality in y; rows of y past the last are not read.

    Returns:
        [rows, width] in x's dtype.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    _check(x, y, gamma, drop_path, sample, dropout, seed, row_index, offsets)
    return _op(x, y, gamma, drop_path, sample, dropout, seed, row_index, offsets, None, None, 1e-5)[0]


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
    """``residual`` and the LayerNorm of all its rows: returns out in x's dtype and LayerNorm(out) in y's dtype.

    ``norm_weight`` and ``norm_bias`` are [width]; everything else is as in ``residual``.
    """
    _check(x, y, gamma, drop_path, sample, dropout, seed, row_index, offsets)
    require(norm_weight is not None, "norm_weight: got None, takes a floating-point vector; see residual() for none")
    require(eps > 0, lambda: f"eps: got {eps}, takes a positive number")
    require_vector("norm_weight", norm_weight, x.shape[1], x.device)
    require_vector("norm_bias", norm_bias, x.shape[1], x.device)
    return _op(x, y, gamma, drop_path, sample, dropout, seed, row_index, offsets, norm_weight, norm_bias, eps)[:2]


def _check(
    x: Tensor, y: Tensor, gamma: Tensor | None, drop_path: Tensor | None, sample: Tensor | None, dropout: float,
    seed: Tensor | None, row_index: Tensor | None, offsets: Tensor | None,
) -> None:  # fmt: skip
    require_rows("x", x)
    require_tensor("y", y, FLOATS, "[rows, width]", 2)
    require_row_index(row_index, x)
    count = x.shape[0] if row_index is None else row_index.shape[0]
    require(
        y.shape[0] == count and y.shape[1] == x.shape[1],
        lambda: f"y: got {describe(y)}, takes [{count}, {x.shape[1]}], a row for each of x or of row_index",
    )
    require(
        y.dtype == x.dtype or (x.dtype == torch.float32 and y.dtype.itemsize == 2),
        lambda: f"y: got {describe(y)}, takes x's dtype, or half precision over a float32 x (x is {describe(x)})",
    )
    require_device("y", y, x.device)
    if offsets is not None:
        check_routing(offsets, (), y)
    require_vector("gamma", gamma, x.shape[1], x.device)
    check_drop_path(drop_path, sample, x)
    require(0.0 <= dropout < 1.0, lambda: f"dropout: got {dropout}, takes a probability in [0, 1)")
    require(not dropout or seed is not None, lambda: f"seed: got none with dropout {dropout}, takes an int64 []")
    if seed is not None:
        require_tensor("seed", seed, (torch.int64,), "[]", 0)
        require_device("seed", seed, x.device)


def check_drop_path(drop_path: Tensor | None, sample: Tensor | None, x: Tensor) -> None:
    """Raise unless ``drop_path`` [samples] and ``sample`` [rows] are both absent or both fit x."""
    require((drop_path is None) == (sample is None), "drop_path, sample: got one of them, takes both or none")
    if drop_path is not None:
        require_tensor("drop_path", drop_path, (torch.float32, torch.float64), "[samples]", 1)
        require_tensor("sample", sample, (torch.int32, torch.int64), "[rows]", 1)
        require(
            sample.shape[0] == x.shape[0], lambda: f"sample: got {describe(sample)}, takes one per row, [{x.shape[0]}]"
        )
        for name, value in (("drop_path", drop_path), ("sample", sample)):
            require_device(name, value, x.device)
