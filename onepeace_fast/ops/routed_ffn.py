"""One gated feed-forward network per modality, on contiguous row ranges of packed tokens.

    h = gelu(z W0^T) * (z W1^T),   y = LayerNorm(h) W2^T + b2,   out = residual + keep * gamma * y

with W0, W1, W2, b2 and the Sub-LayerNorm of the row's modality (GeGLU: Shazeer, arXiv 2002.05202; Sub-LayerNorm: Wang
et al., arXiv 2210.06423; routing: ONE-PEACE, arXiv 2305.11172). GELU is exact (erf).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_vector
from onepeace_fast.ops._library import (
    MAX_WIDTH,
    autocast_dtype,
    check_routing,
    define,
    no_gradient,
    only_needed,
    register_gradient,
    require_rows,
    row_slices,
)
from onepeace_fast.ops.gated_sub_ln import statistics
from onepeace_fast.ops.layer_norm import normalize, normalize_backward
from onepeace_fast.ops.residual import check_keep, row_factor

_ops = torch.ops.onepeace_fast


def routed_ffn_specification(
    z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor], norm_bias: Sequence[Tensor],
    w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor, row_counts: Sequence[int], residual: Tensor | None,
    gamma: Tensor | None, keep: Tensor | None, sample: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns out and what the backward pass reads: u = z W0^T, v = z W1^T, y (for gamma), mean and rstd of h."""
    rows_total, hidden = z.shape[0], w0[0].shape[0]
    y = z.new_zeros(rows_total, w2[0].shape[0])
    u, v = z.new_empty(rows_total, hidden), z.new_empty(rows_total, hidden)
    mean, rstd = (statistics(z, norm_weight) for _ in range(2))
    for m, rows in enumerate(row_slices(offsets, row_counts)):
        torch.mm(z[rows], w0[m].t(), out=u[rows])
        torch.mm(z[rows], w1[m].t(), out=v[rows])
        h = F.gelu(u[rows]).mul_(v[rows])
        if norm_weight:
            h, mean[rows], rstd[rows] = normalize(h, norm_weight[m], norm_bias[m], eps)
        y[rows] = F.linear(h, w2[m], b2[m] if b2 else None)
    if residual is None:
        return y, u, v, z.new_empty(0), mean, rstd
    factor = row_factor(y, y.dtype, gamma, keep, sample, 0.0, None)
    out = (residual + (y if factor is None else y * factor)).to(residual.dtype).contiguous()
    return out, u, v, z.new_empty(0) if gamma is None else y, mean, rstd


def routed_ffn_backward_specification(
    grad: Tensor, z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor], w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor,
    row_counts: Sequence[int], gamma: Tensor | None, keep: Tensor | None, sample: Tensor | None, u: Tensor, v: Tensor,
    y: Tensor, mean: Tensor, rstd: Tensor, eps: float, needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """With dy = grad * keep * gamma and n = LayerNorm(h):

    db2 = sum dy, dW2 = dy^T n, dh = LayerNorm'(dy W2), du = gelu'(u) dh v, dv = dh gelu(u), dW0 = du^T z, dW1 = dv^T z,
    dz = du W0 + dv W1, dgamma = sum grad * keep * y.

    ``needs`` is one flag per parameter in the order of the lists, then gamma's. Returns dz, the parameters' gradients
    in that order and dgamma, empty where none is needed.
    """
    lists = (w0, w1, norm_weight, norm_bias, w2, b2)
    gradients = [parameter.new_empty(0) for group in lists for parameter in group]
    starts = [sum(len(group) for group in lists[:i]) for i in range(len(lists))]

    def needed(which: int, m: int) -> bool:
        return bool(lists[which]) and needs[starts[which] + m]

    def store(which: int, m: int, value: Tensor) -> None:
        gradients[starts[which] + m] = value.to(lists[which][m].dtype)

    factor = row_factor(z, z.dtype, gamma, keep, sample, 0.0, None)
    dy_all = (grad if factor is None else grad * factor).to(z.dtype)
    dz = torch.zeros_like(z, memory_format=torch.contiguous_format)
    scaled = row_factor(z, z.dtype, None, keep, sample, 0.0, None) if needs[-1] else None
    dgamma = gamma.new_zeros(gamma.shape, dtype=torch.promote_types(torch.float32, z.dtype)) if needs[-1] else None
    for m, rows in enumerate(row_slices(offsets, row_counts)):
        dy, z_m, u_m, v_m = dy_all[rows], z[rows], u[rows], v[rows]
        if dgamma is not None:
            dgamma += (grad[rows] * (y[rows] if scaled is None else y[rows] * scaled[rows])).sum(0)
        gelu = F.gelu(u_m)
        h = gelu * v_m
        if needed(5, m):
            store(5, m, dy.sum(0))
        if needed(4, m):
            n = normalize(h, norm_weight[m], norm_bias[m], eps)[0] if norm_weight else h
            store(4, m, dy.t() @ n)
        dh = dy @ w2[m]
        if norm_weight:
            norm_needs = (needed(2, m), needed(3, m))
            dh, dweight, dbias = normalize_backward(dh, h, mean[rows], rstd[rows], norm_weight[m], (True, *norm_needs))
            for which, need, value in zip((2, 3), norm_needs, (dweight, dbias), strict=True):
                if need:
                    store(which, m, value)
            dh = dh.to(z.dtype)
        du = torch.ops.aten.gelu_backward(dh * v_m, u_m)
        dv = dh.mul_(gelu)
        if needed(0, m):
            store(0, m, du.t() @ z_m)
        if needed(1, m):
            store(1, m, dv.t() @ z_m)
        torch.addmm(du @ w0[m], dv, w1[m], out=dz[rows])
    return dz, gradients, z.new_empty(0) if dgamma is None else dgamma.to(gamma.dtype)


def routed_ffn_fused(
    z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor], norm_bias: Sequence[Tensor],
    w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor, row_counts: Sequence[int], residual: Tensor | None,
    gamma: Tensor | None, keep: Tensor | None, sample: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the specification returns, by a matrix product per modality and one kernel over all rows between them."""
    groups = list(row_slices(offsets, row_counts))
    u, v = (z.new_empty(z.shape[0], w0[0].shape[0]) for _ in range(2))
    y = z.new_empty(z.shape[0], w2[0].shape[0])
    for m, rows in enumerate(groups):
        torch.mm(z[rows], w0[m].t(), out=u[rows])
        torch.mm(z[rows], w1[m].t(), out=v[rows])
    n, mean, rstd = _ops.gated_sub_ln(u, v, norm_weight, norm_bias, offsets, row_counts, "gelu", eps)
    for m, rows in enumerate(groups):
        if b2:
            torch.addmm(b2[m], n[rows], w2[m].t(), out=y[rows])
        else:
            torch.mm(n[rows], w2[m].t(), out=y[rows])
    if residual is None:
        y[groups[-1].stop :] = 0
        return y, u, v, z.new_empty(0), mean, rstd
    out, *_ = _ops.residual(residual, y, gamma, keep, sample, 0.0, None, None, offsets, None, None, eps)
    return out, u, v, z.new_empty(0) if gamma is None else y, mean, rstd


def routed_ffn_backward_fused(
    grad: Tensor, z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor], w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor,
    row_counts: Sequence[int], gamma: Tensor | None, keep: Tensor | None, sample: Tensor | None, u: Tensor, v: Tensor,
    y: Tensor, mean: Tensor, rstd: Tensor, eps: float, needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """What the backward specification returns, by the same formulas: products, and one kernel over all rows between."""
    groups = list(row_slices(offsets, row_counts))
    lists = (w0, w1, norm_weight, norm_bias, w2, b2)
    w0_needs, w1_needs, weight_needs, bias_needs, w2_needs, b2_needs = _regroup(needs, [len(group) for group in lists])
    if gamma is None and keep is None:
        dy = grad.to(z.dtype)
    else:
        _, dy, dgamma, *_ = _ops.residual_backward(
            grad, None, y if needs[-1] else None, gamma, keep, sample, 0.0, None, None, offsets, None, None, None,
            None, None, z.dtype, [needs[-1], False, False],
        )  # fmt: skip
    dn = torch.empty_like(u)
    for m, rows in enumerate(groups):
        torch.mm(dy[rows], w2[m], out=dn[rows])
    du, dv, dweights, dbiases, n = _ops.gated_sub_ln_backward(
        dn, u, v, mean, rstd, norm_weight, norm_bias, offsets, row_counts, "gelu", weight_needs, bias_needs,
        any(w2_needs),
    )  # fmt: skip
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    for m, rows in enumerate(groups):
        torch.mm(du[rows], w0[m], out=dz[rows])
        dz[rows].addmm_(dv[rows], w1[m])
    dz[groups[-1].stop :] = 0
    gradients = [
        *_products(du, z, groups, w0_needs),
        *_products(dv, z, groups, w1_needs),
        *dweights,
        *dbiases,
        *_products(dy, n, groups, w2_needs),
        *(dy[groups[m]].sum(0) if need else dy.new_empty(0) for m, need in enumerate(b2_needs)),
    ]
    return dz, gradients, dgamma if needs[-1] else z.new_empty(0)


def _products(left: Tensor, right: Tensor, groups: Sequence[slice], needs: Sequence[bool]) -> list[Tensor]:
    """left^T right over the rows of each modality that needs it: the gradient of its weight."""
    return [
        left[rows].t() @ right[rows] if need else left.new_empty(0) for rows, need in zip(groups, needs, strict=True)
    ]


def _fake(z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, row_counts, residual, gamma, keep, sample, eps):
    y = z.new_empty(z.shape[0], w2[0].shape[0])
    u, v = (z.new_empty(z.shape[0], w0[0].shape[0]) for _ in range(2))
    saved_y = z.new_empty(0) if residual is None or gamma is None else y
    out = y if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    return out, u, v, saved_y, statistics(z, norm_weight), statistics(z, norm_weight)


def _fake_backward(
    grad, z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, row_counts, gamma, keep, sample, u, v, y, mean, rstd, eps,
    needs,
):  # fmt: skip
    parameters = (*w0, *w1, *norm_weight, *norm_bias, *w2, *b2)
    gradients = [torch.empty_like(p) if n else p.new_empty(0) for p, n in zip(parameters, needs, strict=False)]
    dgamma = torch.empty_like(gamma) if needs[-1] else z.new_empty(0)
    return torch.empty_like(z, memory_format=torch.contiguous_format), gradients, dgamma


_LISTS = "Tensor[] w0, Tensor[] w1, Tensor[] norm_weight, Tensor[] norm_bias, Tensor[] w2, Tensor[] b2"
_op = define(
    "routed_ffn",
    f"(Tensor z, {_LISTS}, Tensor offsets, SymInt[] row_counts, Tensor? residual, Tensor? gamma, Tensor? keep,"
    " Tensor? sample, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    routed_ffn_specification,
    _fake,
    kernel=routed_ffn_fused,
)
_backward_op = define(
    "routed_ffn_backward",
    f"(Tensor grad, Tensor z, {_LISTS}, Tensor offsets, SymInt[] row_counts, Tensor? gamma, Tensor? keep,"
    " Tensor? sample, Tensor u, Tensor v, Tensor y, Tensor mean, Tensor rstd, float eps, bool[] needs)"
    " -> (Tensor, Tensor[], Tensor)",
    routed_ffn_backward_specification,
    _fake_backward,
    kernel=routed_ffn_backward_fused,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, *lists, offsets, row_counts, residual, gamma, keep, sample, eps = inputs
    _, u, v, y, mean, rstd = output
    ctx.mark_non_differentiable(u, v, y, mean, rstd)
    ctx.row_counts, ctx.eps, ctx.has_residual = row_counts, eps, residual is not None
    ctx.list_lengths = [len(group) for group in lists]
    parameters = [parameter for group in lists for parameter in group]
    ctx.save_for_backward(z, offsets, gamma, keep, sample, u, v, y, mean, rstd, *parameters)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    z, offsets, gamma, keep, sample, u, v, y, mean, rstd, *parameters = ctx.saved_tensors
    list_needs = [list(ctx.needs_input_grad[1 + i] or ()) for i in range(len(ctx.list_lengths))]
    needs = [*(need for group in list_needs for need in group), ctx.needs_input_grad[10]]
    dz, gradients, dgamma = _backward_op(
        grad, z, *_regroup(parameters, ctx.list_lengths), offsets, ctx.row_counts, gamma, keep, sample,
        u, v, y, mean, rstd, ctx.eps, needs,
    )  # fmt: skip
    grouped = _regroup(gradients, ctx.list_lengths)
    return (
        dz,
        *(only_needed(group, need) for group, need in zip(grouped, list_needs, strict=True)),
        None,
        no_gradient(ctx.row_counts),
        grad if ctx.has_residual else None,
        dgamma if needs[-1] else None,
        None,
        None,
        None,
    )


def _regroup(flat: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    groups, start = [], 0
    for length in lengths:
        groups.append(list(flat[start : start + length]))
        start += length
    return groups


register_gradient("routed_ffn", _setup_context, _backward)


def routed_ffn(
    z: Tensor,
    w0: Sequence[Tensor],
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor] | None = None,
    *,
    offsets: Tensor,
    row_counts: Sequence[int] = (),
    norm_weight: Sequence[Tensor] | None = None,
    norm_bias: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    sample: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The GeGLU feed-forward network of each row's modality, with Sub-LayerNorm, LayerScale, DropPath and residual.

    Args:
        z: floating point [rows, width], modality-major: rows offsets[m] to offsets[m + 1] are those of modality m.
        w0, w1: one [hidden, width] per modality; gate and value projections.
        w2: one [width, hidden] per modality; output projections.
        b2: one [width] per modality, or None.
        offsets: int32 [G + 1], the plan's.
        row_counts: the plan's row counts, where the host knows them; without them offsets are read on the host, since
            each modality's products are launched from there.
        norm_weight, norm_bias: one [hidden] per modality, Sub-LayerNorm; None for none.
        residual: floating point [rows, width], added to the scaled result; without it gamma and keep are refused.
        gamma, keep, sample: LayerScale and DropPath as in ``onepeace_fast.ops.residual``.
        eps: of the Sub-LayerNorm.

    Returns:
        [rows, width] in the residual's dtype, else z's. Rows past offsets[G] get the residual, else zero.
        Under autocast the matrix products run in autocast's dtype. A parameter without rows gets a zero gradient, a
        frozen one none.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    w0, w1, w2, b2, norm_weight, norm_bias = (list(v or ()) for v in (w0, w1, w2, b2, norm_weight, norm_bias))
    if (dtype := autocast_dtype(z)) is not None:
        z = z.to(dtype)
        w0, w1, w2, b2 = ([tensor.to(dtype) for tensor in tensors] for tensors in (w0, w1, w2, b2))
    _check(z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, row_counts, residual, gamma, keep, sample)
    return _op(
        z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, row_counts, residual, gamma, keep, sample, eps
    )[0]  # fmt: skip


def _check(
    z: Tensor, w0: list, w1: list, norm_weight: list, norm_bias: list, w2: list, b2: list, offsets: Tensor,
    row_counts: Sequence[int], residual: Tensor | None, gamma: Tensor | None, keep: Tensor | None,
    sample: Tensor | None,
) -> None:  # fmt: skip
    require_rows("z", z)
    check_routing(offsets, row_counts, z)
    groups, width, hidden = offsets.shape[0] - 1, z.shape[1], w0[0].shape[0] if w0 else 0
    require(hidden <= MAX_WIDTH, lambda: f"w0: got {hidden} hidden columns, takes at most {MAX_WIDTH}")
    shapes = {"w0": (hidden, width), "w1": (hidden, width), "w2": (width, hidden), "b2": (width,)}
    shapes |= {"norm_weight": (hidden,), "norm_bias": (hidden,)}
    optional = ("b2", "norm_weight", "norm_bias")
    lists = {"w0": w0, "w1": w1, "norm_weight": norm_weight, "norm_bias": norm_bias, "w2": w2, "b2": b2}
    for name, tensors in lists.items():
        fits = len(tensors) == groups or (name in optional and not tensors)
        require(
            fits,
            lambda name=name, tensors=tensors: f"{name}: got {len(tensors)} tensors, takes one per modality, {groups}",
        )
        for m, tensor in enumerate(tensors):
            _check_parameter(f"{name}[{m}]", tensor, shapes[name], None if name.startswith("norm") else z.dtype)
            require_device(f"{name}[{m}]", tensor, z.device)
    require(len(norm_weight) == len(norm_bias), "norm_weight, norm_bias: got one of them, takes both or none")
    require(
        residual is not None or (gamma is None and keep is None),
        "residual: got none with gamma or keep, takes the tensor that the scaled result is added to",
    )
    if residual is not None:
        require(
            residual.is_floating_point() and residual.shape == z.shape,
            lambda: f"residual: got {describe(residual)}, takes floating point {list(z.shape)}",
        )
        require_device("residual", residual, z.device)
    require_vector("gamma", gamma, width, z.device)
    check_keep(keep, sample, z)


def _check_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Norms may have any floating-point dtype (``dtype`` None), the others z's."""
    fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    wanted = "floating point" if dtype is None else f"{str(dtype).removeprefix('torch.')}, as z has,"
    require(
        fits and tensor.dim() == len(shape) and all(a == b for a, b in zip(tensor.shape, shape, strict=True)),
        lambda: f"{name}: got {describe(tensor)}, takes {wanted} {list(shape)}",
    )
