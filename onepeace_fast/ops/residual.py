"""The residual connection of a branch, and the LayerNorm that follows it.

    out = x + keep * gamma * dropout(y),   normed = LayerNorm(out)

gamma is LayerScale (Touvron et al., arXiv 2103.17239), keep DropPath's factor of the row's sample (Huang et al., arXiv
1603.09382). The residual stream may be float32 while the branch is half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_tensor, require_vector
from onepeace_fast.ops._dropout import dropout_factor
from onepeace_fast.ops._library import accumulation_dtype, define, register_gradient
from onepeace_fast.ops.layer_norm import normalize, normalize_backward


def row_factor(
    y: Tensor, gamma: Tensor | None, keep: Tensor | None, sample: Tensor | None, dropout: float, seed: Tensor | None
) -> Tensor | None:
    """keep * gamma * dropout's factor, broadcastable to y, in at least float32; None where all are absent."""
    dtype = torch.promote_types(torch.float32, y.dtype)
    factor = None if gamma is None else gamma.to(dtype)
    if keep is not None:
        per_row = keep.to(dtype)[sample.long(), None]
        factor = per_row if factor is None else factor * per_row
    if dropout:
        drop = dropout_factor(seed, y.shape, dropout).to(dtype)
        factor = drop if factor is None else factor * drop
    return factor


def residual_specification(
    x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, sample: Tensor | None, dropout: float,
    seed: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns out in x's dtype and, with a norm, normed in y's dtype, mean and rstd; otherwise empty tensors."""
    factor = row_factor(y, gamma, keep, sample, dropout, seed)
    out = (x + (y if factor is None else y * factor)).to(x.dtype).contiguous()
    if norm_weight is None:
        return out, *(x.new_empty(0) for _ in range(3))
    normed, mean, rstd = normalize(out, norm_weight, norm_bias, eps)
    return out, normed.to(y.dtype), mean, rstd


def residual_backward_specification(
    grad: Tensor | None, grad_normed: Tensor | None, y: Tensor, gamma: Tensor | None, keep: Tensor | None,
    sample: Tensor | None, dropout: float, seed: Tensor | None, out: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With total = grad + LayerNorm'(grad_normed): dx = total, dy = total * factor, dgamma = sum(total * keep * y).

    ``needs`` says which of gamma, norm_weight, norm_bias are needed; the others' gradients are empty.
    """
    dweight = dbias = None
    total = grad
    if grad_normed is not None:
        total, dweight, dbias = normalize_backward(grad_normed, out, mean, rstd, norm_weight, (True, *needs[1:]))
        total = total if grad is None else total.add_(grad)
    factor = row_factor(y, gamma, keep, sample, dropout, seed)
    dy = total if factor is None else total * factor
    dgamma = y.new_empty(0)
    if needs[0]:
        scaled = row_factor(y, None, keep, sample, dropout, seed)
        dgamma = (total * (y if scaled is None else y * scaled)).sum(0).to(gamma.dtype)
    dx, dy = total.to(out.dtype).contiguous(), dy.to(y.dtype).contiguous()
    return (
        dx.clone() if dx is grad else dx,
        dy.clone() if dy is dx or dy is grad else dy,
        dgamma,
        _parameter_gradient(norm_weight, dweight) if needs[1] else y.new_empty(0),
        _parameter_gradient(norm_bias, dbias) if needs[2] else y.new_empty(0),
    )


def _parameter_gradient(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """A norm whose output received no gradient still owes zeros."""
    return torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)


def _fake(x, y, gamma, keep, sample, dropout, seed, norm_weight, norm_bias, eps):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if norm_weight is None:
        return out, *(x.new_empty(0) for _ in range(3))
    statistics = x.new_empty((x.shape[0], 1), dtype=accumulation_dtype(x.dtype))
    return out, torch.empty_like(y, memory_format=torch.contiguous_format), statistics, torch.empty_like(statistics)


def _fake_backward(
    grad, grad_normed, y, gamma, keep, sample, dropout, seed, out, norm_weight, norm_bias, mean, rstd, needs
):
    parameters = (gamma, norm_weight, norm_bias)
    return (
        torch.empty_like(out),
        torch.empty_like(y, memory_format=torch.contiguous_format),
        *(torch.empty_like(p) if n else y.new_empty(0) for p, n in zip(parameters, needs, strict=True)),
    )


_op = define(
    "residual",
    "(Tensor x, Tensor y, Tensor? gamma, Tensor? keep, Tensor? sample, float dropout, Tensor? seed,"
    " Tensor? norm_weight, Tensor? norm_bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    residual_specification,
    _fake,
)
_backward_op = define(
    "residual_backward",
    "(Tensor? grad, Tensor? grad_normed, Tensor y, Tensor? gamma, Tensor? keep, Tensor? sample, float dropout,"
    " Tensor? seed, Tensor out, Tensor? norm_weight, Tensor? norm_bias, Tensor mean, Tensor rstd, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    residual_backward_specification,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, y, gamma, keep, sample, dropout, seed, norm_weight, norm_bias, _ = inputs
    out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dropout = dropout
    ctx.save_for_backward(y, gamma, keep, sample, seed, out, norm_weight, norm_bias, mean, rstd)


def _backward(ctx: Any, grad: Tensor | None, grad_normed: Tensor | None, *_: Any) -> tuple:
    y, gamma, keep, sample, seed, out, norm_weight, norm_bias, mean, rstd = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (2, 7, 8)]
    if norm_weight is None:
        grad_normed = None
    if grad is None and grad_normed is None:
        return (None,) * 10
    dx, dy, dgamma, dweight, dbias = _backward_op(
        grad, grad_normed, y, gamma, keep, sample, ctx.dropout, seed, out, norm_weight, norm_bias, mean, rstd, needs
    )
    dgamma, dweight, dbias = (g if n else None for g, n in zip((dgamma, dweight, dbias), needs, strict=True))
    return dx, dy, dgamma, None, None, None, None, dweight, dbias, None


register_gradient("residual", _setup_context, _backward)


def residual(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    sample: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + keep * gamma * dropout(y).

    Args:
        x: floating point [rows, width], the residual stream.
        y: floating point [rows, width], the branch.
        gamma: [width], LayerScale.
        keep: float32 [samples], DropPath's factor of each sample; needs ``sample``.
        sample: int32 [rows], sample of each row.
        dropout: probability in [0, 1) to zero an element of y; needs ``seed``.
        seed: int64 [] on y's device; the random numbers depend on it and on the element's place alone.

    Returns:
        [rows, width] in x's dtype.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    _check(x, y, gamma, keep, sample, dropout, seed)
    return _op(x, y, gamma, keep, sample, dropout, seed, None, None, 1e-5)[0]


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    sample: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``residual`` and the LayerNorm behind it: returns out in x's dtype and LayerNorm(out) in y's dtype.

    ``norm_weight`` and ``norm_bias`` are [width]; everything else is as in ``residual``.
    """
    _check(x, y, gamma, keep, sample, dropout, seed)
    require(norm_weight is not None, "norm_weight: got None, takes a floating-point vector; see residual() for none")
    require(eps > 0, lambda: f"eps: got {eps}, takes a positive number")
    require_vector("norm_weight", norm_weight, x.shape[1], x.device)
    require_vector("norm_bias", norm_bias, x.shape[1], x.device)
    return _op(x, y, gamma, keep, sample, dropout, seed, norm_weight, norm_bias, eps)[:2]


def _check(
    x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, sample: Tensor | None, dropout: float,
    seed: Tensor | None,
) -> None:  # fmt: skip
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    require_tensor("x", x, floats, "[rows, width]", 2)
    require_tensor("y", y, floats, "[rows, width]", 2)
    require(y.shape == x.shape, lambda: f"y: got {describe(y)}, takes x's shape, {list(x.shape)}")
    require_device("y", y, x.device)
    require_vector("gamma", gamma, x.shape[1], x.device)
    check_keep(keep, sample, x)
    require(0.0 <= dropout < 1.0, lambda: f"dropout: got {dropout}, takes a probability in [0, 1)")
    require(not dropout or seed is not None, lambda: f"seed: got none with dropout {dropout}, takes an int64 []")
    if seed is not None:
        require_tensor("seed", seed, (torch.int64,), "[]", 0)
        require_device("seed", seed, x.device)


def check_keep(keep: Tensor | None, sample: Tensor | None, x: Tensor) -> None:
    """Raise unless ``keep`` [samples] and ``sample`` [rows] are both absent or both fit x."""
    require((keep is None) == (sample is None), "keep, sample: got one of them, takes both or none")
    if keep is not None:
        require_tensor("keep", keep, (torch.float32, torch.float64), "[samples]", 1)
        require_tensor("sample", sample, (torch.int32, torch.int64), "[rows]", 1)
        require(
            sample.shape[0] == x.shape[0], lambda: f"sample: got {describe(sample)}, takes one per row, [{x.shape[0]}]"
        )
        for name, value in (("keep", keep), ("sample", sample)):
            require_device(name, value, x.device)
