"""The routed FFN by a vendor product for each modality, and one kernel over the rows of all between the products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast.ops.operation import regroup
from onepeace_fast.ops.packed_rows import row_slices

_ops = torch.ops.onepeace_fast


def project(
    z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], groups: Sequence[slice]
) -> tuple[Tensor, Tensor | None]:
    """u = z W0^T and v = z W1^T, None without a gate."""
    u = z.new_empty(z.shape[0], w0[0].shape[0])
    v = torch.empty_like(u) if w1 else None
    for m, rows in enumerate(groups):
        torch.mm(z[rows], w0[m].t(), out=u[rows])
        if w1:
            torch.mm(z[rows], w1[m].t(), out=v[rows])
    return u, v


def routed_ffn(
    z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor], norm_bias: Sequence[Tensor],
    w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor, row_counts: Sequence[int], residual: Tensor | None,
    gamma: Tensor | None, drop_path: Tensor | None, sample: Tensor | None, row_index: Tensor | None, activation: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, u, v, y, mean and rstd of h."""
    groups = list(row_slices(offsets, row_counts))
    u, v = project(z, w0, w1, groups)
    n, mean, rstd = _ops.gated_sub_ln(u, v, norm_weight, norm_bias, offsets, row_counts, activation, eps)
    y = z.new_empty(z.shape[0], w2[0].shape[0])
    for m, mine in enumerate(groups):
        if b2:
            torch.addmm(b2[m], n[mine], w2[m].t(), out=y[mine])
        else:
            torch.mm(n[mine], w2[m].t(), out=y[mine])
    if residual is None:
        y[groups[-1].stop :] = 0
        return y, u, v, y, mean, rstd
    out, *_ = _ops.residual(residual, y, gamma, drop_path, sample, 0.0, None, row_index, offsets, None, None, eps)
    return out, u, v, y, mean, rstd


def routed_ffn_backward(
    grad: Tensor, z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor], w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor,
    row_counts: Sequence[int], gamma: Tensor | None, drop_path: Tensor | None, sample: Tensor | None, row_index: Tensor | None,
    u: Tensor | None, v: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, activation: str, needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """What the backward reference returns, by the same formulas."""
    groups = list(row_slices(offsets, row_counts))
    lists = (w0, w1, norm_weight, norm_bias, w2, b2)
    w0_needs, w1_needs, weight_needs, bias_needs, w2_needs, b2_needs = regroup(needs, [len(group) for group in lists])
    if u is None:
        u, v = project(z, w0, w1, groups)
    if gamma is None and drop_path is None and row_index is None:
        dy = grad.to(z.dtype)
    else:
        _, dy, dgamma, *_ = _ops.residual_backward(
            grad, None, y if needs[-1] else None, gamma, drop_path, sample, 0.0, None, row_index, offsets, None, None, None,
            None, None, z.dtype, [needs[-1], False, False],
        )  # fmt: skip
    dn = torch.empty_like(u)
    for m, mine in enumerate(groups):
        torch.mm(dy[mine], w2[m], out=dn[mine])
    du, dv, dweights, dbiases, n = _ops.gated_sub_ln_backward(
        dn, u, v, mean, rstd, norm_weight, norm_bias, offsets, row_counts, activation, weight_needs, bias_needs,
        any(w2_needs),
    )  # fmt: skip
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    for m, mine in enumerate(groups):
        torch.mm(du[mine], w0[m], out=dz[mine])
        if w1:
            dz[mine].addmm_(dv[mine], w1[m])
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
        left[rows].t() @ right[rows] if need else left.new_empty(0)
        for rows, need in zip(groups[: len(needs)], needs, strict=True)
    ]
