"""One gated feed-forward network per modality, on contiguous row ranges of packed tokens.

    h = activation(z W0^T) * (z W1^T),   y = LayerNorm(h) W2^T + b2,   out = residual + drop_path * gamma * y

with W0, W1, W2, b2 and the Sub-LayerNorm of the row's modality (GeGLU: Shazeer, arXiv 2002.05202; Sub-LayerNorm: Wang
et al., arXiv 2210.06423; routing: ONE-PEACE, arXiv 2305.11172). Without W1 there is no gate: h = activation(z W0^T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast.ops import routed_ffn_per_modality as per_modality
from onepeace_fast.ops.arguments import autocast_dtype, check_offsets, check_row_index
from onepeace_fast.ops.gated_sub_ln import ACTIVATION_BACKWARD, ACTIVATIONS, statistics
from onepeace_fast.ops.layer_norm import normalize, normalize_backward
from onepeace_fast.ops.operation import define, launcher, no_gradient, only_needed, register_gradient, regroup
from onepeace_fast.ops.packed_rows import row_slices
from onepeace_fast.ops.residual import residual_backward_reference, residual_reference, row_factor
from onepeace_fast.ops.routed_ffn_arguments import check, chosen_strategy


def routed_ffn_reference(
    z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor], norm_bias: Sequence[Tensor],
    w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor, row_counts: Sequence[int], residual: Tensor | None,
    gamma: Tensor | None, drop_path: Tensor | None, sample: Tensor | None, row_index: Tensor | None, activation: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns out and what the backward pass reads: u = z W0^T, v = z W1^T, y (for gamma), mean and rstd of h."""
    rows_total, hidden = z.shape[0], w0[0].shape[0]
    y = z.new_zeros(rows_total, w2[0].shape[0])
    u = z.new_empty(rows_total, hidden)
    v = torch.empty_like(u) if w1 else None
    mean, rstd = (statistics(z, norm_weight) for _ in range(2))
    for m, mine in enumerate(row_slices(offsets, row_counts)):
        torch.mm(z[mine], w0[m].t(), out=u[mine])
        h = ACTIVATIONS[activation](u[mine])
        if w1:
            torch.mm(z[mine], w1[m].t(), out=v[mine])
            h = h.mul_(v[mine])
        if norm_weight:
            h, mean[mine], rstd[mine] = normalize(h, norm_weight[m], norm_bias[m], eps)
        y[mine] = F.linear(h, w2[m], b2[m] if b2 else None)
    if residual is None:
        return y, u, v, y, mean, rstd
    if row_index is not None:
        out, *_ = residual_reference(
            residual, y, gamma, drop_path, sample, 0.0, None, row_index, offsets, None, None, eps
        )
    else:
        factor = row_factor(y, y.dtype, gamma, drop_path, sample, 0.0, None)
        out = (residual + (y if factor is None else y * factor)).to(residual.dtype).contiguous()
    return out, u, v, y, mean, rstd


def routed_ffn_backward_reference(
    grad: Tensor, z: Tensor, w0: Sequence[Tensor], w1: Sequence[Tensor], norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor], w2: Sequence[Tensor], b2: Sequence[Tensor], offsets: Tensor,
    row_counts: Sequence[int], gamma: Tensor | None, drop_path: Tensor | None, sample: Tensor | None, row_index: Tensor | None,
    u: Tensor | None, v: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, activation: str, eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """With dy = grad * drop_path * gamma and n = LayerNorm(h):

    db2 = sum dy, dW2 = dy^T n, dh = LayerNorm'(dy W2), du = activation'(u) dh v, dv = dh activation(u), dW0 = du^T z,
    dW1 = dv^T z, dz = du W0 + dv W1, dgamma = sum grad * drop_path * y.

    u and v are computed again where they were not kept. ``needs`` is one flag per parameter in the order of the lists,
    then gamma's. Returns dz, the parameters' gradients in that order and dgamma, empty where none is needed.
    """
    lists = (w0, w1, norm_weight, norm_bias, w2, b2)
    gradients = [parameter.new_empty(0) for group in lists for parameter in group]
    starts = [sum(len(group) for group in lists[:i]) for i in range(len(lists))]

    def needed(which: int, m: int) -> bool:
        return bool(lists[which]) and needs[starts[which] + m]

    def store(which: int, m: int, value: Tensor) -> None:
        gradients[starts[which] + m] = value.to(lists[which][m].dtype)

    groups = list(row_slices(offsets, row_counts))
    if u is None:
        u, v = per_modality.project(z, w0, w1, groups)
    _, dy_all, dgamma, *_ = residual_backward_reference(
        grad, None, y if needs[-1] else None, gamma, drop_path, sample, 0.0, None, row_index, offsets, None, None, None, None,
        None, z.dtype, [needs[-1], False, False],
    )  # fmt: skip
    dz = torch.zeros_like(z, memory_format=torch.contiguous_format)
    for m, mine in enumerate(groups):
        dy, z_m, u_m = dy_all[mine], z[mine], u[mine]
        activated = ACTIVATIONS[activation](u_m)
        h = activated * v[mine] if w1 else activated
        if needed(5, m):
            store(5, m, dy.sum(0))
        if needed(4, m):
            n = normalize(h, norm_weight[m], norm_bias[m], eps)[0] if norm_weight else h
            store(4, m, dy.t() @ n)
        dh = dy @ w2[m]
        if norm_weight:
            norm_needs = (needed(2, m), needed(3, m))
            dh, dweight, dbias = normalize_backward(dh, h, mean[mine], rstd[mine], norm_weight[m], (True, *norm_needs))
            for which, need, value in zip((2, 3), norm_needs, (dweight, dbias), strict=True):
                if need:
                    store(which, m, value)
            dh = dh.to(z.dtype)
        du = ACTIVATION_BACKWARD[activation](dh * v[mine] if w1 else dh, u_m)
        if needed(0, m):
            store(0, m, du.t() @ z_m)
        if w1:
            dv = dh.mul_(activated)
            if needed(1, m):
                store(1, m, dv.t() @ z_m)
            torch.addmm(du @ w0[m], dv, w1[m], out=dz[mine])
        else:
            torch.mm(du, w0[m], out=dz[mine])
    return dz, gradients, dgamma


def _run(
    z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, row_counts, residual, gamma, drop_path, sample, row_index, activation,
    eps, strategy, fold_norm, keep_products, keep_y, by_kernel,
):  # fmt: skip
    """The forward pass by its strategy; what is not kept comes out empty."""
    check_offsets(offsets)
    if row_index is not None:
        check_row_index(row_index, offsets, residual)
    arguments = (z, w0, w1, norm_weight, norm_bias, w2, b2, offsets)
    scaled = (residual, gamma, drop_path, sample, row_index, activation, eps)
    folded = _folded(z, w2, norm_weight, strategy)
    if by_kernel and strategy == "grouped":
        kernel = launcher("routed_ffn", "routed_ffn")
        out, u, v, y, mean, rstd = kernel(*arguments, *scaled, fold_norm, keep_products, keep_y, folded)
    else:
        run = per_modality.routed_ffn if by_kernel and strategy == "per_modality" else routed_ffn_reference
        out, u, v, y, mean, rstd = run(*arguments, row_counts, *scaled)
    kept = (u if keep_products else None, v if keep_products else None, y if keep_y and residual is not None else None)
    return out, *(z.new_empty(0) if value is None else value for value in kept), mean, rstd, folded


def _folded(z: Tensor, w2: Sequence[Tensor], norm_weight: Sequence[Tensor], strategy: str) -> Tensor:
    """Room for W2 g and W2 b + b2 of each modality, float32 [2, G, width], which the grouped strategy keeps."""
    shape = (2, len(w2), w2[0].shape[0]) if norm_weight and strategy == "grouped" else (0,)
    return z.new_zeros(shape, dtype=torch.float32)


def _run_backward(
    grad, z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, row_counts, gamma, drop_path, sample, row_index, u, v, y, mean,
    rstd, folded, activation, eps, strategy, needs, by_kernel,
):  # fmt: skip
    """The backward pass by its strategy."""
    u, v = (None, None) if not u.numel() and z.numel() else (u, v if w1 else None)
    if by_kernel and strategy == "grouped":
        if u is None:
            u, v, *_ = launcher("routed_ffn", "hidden")(z, w0, w1, (), offsets, activation, eps, True, False)
        return launcher("routed_ffn_backward", "routed_ffn_backward")(
            grad, z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, gamma, drop_path, sample, row_index, u, v, y, mean, rstd,
            folded, activation, needs,
        )  # fmt: skip
    arguments = (
        grad,
        z,
        w0,
        w1,
        norm_weight,
        norm_bias,
        w2,
        b2,
        offsets,
        row_counts,
        gamma,
        drop_path,
        sample,
        row_index,
    )
    saved = (u, v, y, mean, rstd)
    if by_kernel and strategy == "per_modality":
        return per_modality.routed_ffn_backward(*arguments, *saved, activation, needs)
    return routed_ffn_backward_reference(*arguments, *saved, activation, eps, needs)


def _fake(
    z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, row_counts, residual, gamma, drop_path, sample, row_index, activation,
    eps, strategy, fold_norm, keep_products, keep_y,
):  # fmt: skip
    y = z.new_empty(z.shape[0], w2[0].shape[0])
    u, v = (z.new_empty((z.shape[0], w0[0].shape[0]) if kept else 0) for kept in (keep_products, keep_products and w1))
    out = y if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    saved_y = y if keep_y and residual is not None else z.new_empty(0)
    row_statistics = (statistics(z, norm_weight) for _ in range(2))
    return out, u, v, saved_y, *row_statistics, _folded(z, w2, norm_weight, strategy)


def _fake_backward(
    grad, z, w0, w1, norm_weight, norm_bias, w2, b2, offsets, row_counts, gamma, drop_path, sample, row_index, u, v, y, mean,
    rstd, folded, activation, eps, strategy, needs,
):  # fmt: skip
    parameters = (*w0, *w1, *norm_weight, *norm_bias, *w2, *b2)
    gradients = [torch.empty_like(p) if n else p.new_empty(0) for p, n in zip(parameters, needs, strict=False)]
    dgamma = torch.empty_like(gamma) if needs[-1] else z.new_empty(0)
    return torch.empty_like(z, memory_format=torch.contiguous_format), gradients, dgamma


_LISTS = "Tensor[] w0, Tensor[] w1, Tensor[] norm_weight, Tensor[] norm_bias, Tensor[] w2, Tensor[] b2"
_ROWS = "Tensor? gamma, Tensor? drop_path, Tensor? sample, Tensor? row_index"
_op = define(
    "routed_ffn",
    f"(Tensor z, {_LISTS}, Tensor offsets, SymInt[] row_counts, Tensor? residual, {_ROWS}, str activation, float eps,"
    " str strategy, bool fold_norm, bool keep_products, bool keep_y)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: _run(*arguments, by_kernel=False),
    _fake,
    kernel=lambda *arguments: _run(*arguments, by_kernel=True),
)
_backward_op = define(
    "routed_ffn_backward",
    f"(Tensor grad, Tensor z, {_LISTS}, Tensor offsets, SymInt[] row_counts, {_ROWS}, Tensor u, Tensor v, Tensor y,"
    " Tensor mean, Tensor rstd, Tensor folded, str activation, float eps, str strategy, bool[] needs)"
    " -> (Tensor, Tensor[], Tensor)",
    lambda *arguments: _run_backward(*arguments, by_kernel=False),
    _fake_backward,
    kernel=lambda *arguments: _run_backward(*arguments, by_kernel=True),
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    (
        z,
        *lists,
        offsets,
        row_counts,
        residual,
        gamma,
        drop_path,
        sample,
        row_index,
        activation,
        eps,
        strategy,
        _,
        _,
        _,
    ) = inputs
    out, u, v, y, mean, rstd, folded = output
    ctx.mark_non_differentiable(u, v, y, mean, rstd, folded)
    ctx.row_counts, ctx.has_residual = row_counts, residual is not None
    ctx.settings = activation, eps, strategy
    ctx.list_lengths = [len(group) for group in lists]
    parameters = [parameter for group in lists for parameter in group]
    y = out if residual is None and folded.numel() else y
    ctx.save_for_backward(z, offsets, gamma, drop_path, sample, row_index, u, v, y, mean, rstd, folded, *parameters)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    z, offsets, gamma, drop_path, sample, row_index, u, v, y, mean, rstd, folded, *parameters = ctx.saved_tensors
    list_needs = [list(ctx.needs_input_grad[1 + i] or ()) for i in range(len(ctx.list_lengths))]
    needs = [*(need for group in list_needs for need in group), ctx.needs_input_grad[10]]
    dz, gradients, dgamma = _backward_op(
        grad, z, *regroup(parameters, ctx.list_lengths), offsets, ctx.row_counts, gamma, drop_path, sample, row_index,
        u, v, y, mean, rstd, folded, *ctx.settings, needs,
    )  # fmt: skip
    grouped = regroup(gradients, ctx.list_lengths)
    return (
        dz,
        *(only_needed(group, need) for group, need in zip(grouped, list_needs, strict=True)),
        None,
        no_gradient(ctx.row_counts),
        grad if ctx.has_residual else None,
        dgamma if needs[-1] else None,
        *(None,) * 9,
    )


register_gradient("routed_ffn", _setup_context, _backward)


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
    fold_norm: bool | None = None,
) -> Tensor:
    """The gated feed-forward network of each row's modality, with Sub-LayerNorm, LayerScale, DropPath and residual.

    Args:
        z: floating point [N, width], modality-major: rows offsets[m] to offsets[m + 1] are those of modality m.
        w0, w1: one [hidden, width] per modality; gate and value projections. ``w1`` None: no gate.
        w2: one [width, hidden] per modality; output projections.
        b2: one [width] per modality, or None.
        offsets: int32 [G + 1], the plan's.
        row_counts: the plan's row counts, where the host knows them. Without them all but the grouped strategy read
            offsets on the host, since each modality's products are launched from there.
        norm_weight, norm_bias: one [hidden] per modality, Sub-LayerNorm; None for none.
        residual: floating point [rows, width], added to the scaled result; without it gamma, drop_path and row_index are refused.
        gamma, drop_path, sample: LayerScale and DropPath as in ``onepeace_fast.ops.residual``.
        row_index: int32 [N], the row of the residual that each row of z comes back to; all others keep theirs bit by bit.
        activation: "gelu" (exact, by erf), "gelu_tanh" or "silu".
        eps: of the Sub-LayerNorm.
        recompute: keep neither of z W0^T and z W1^T for the backward pass, which computes them again.
        strategy: "grouped" (products of all modalities in one launch, and all else inside them), "per_modality" (a vendor
            product for each, a kernel between them) or "reference"; None: what was measured to be the fastest on
            this GPU, "per_modality" where nothing was, and "grouped" on a GPU without ``row_counts``, where it takes z.
            A CPU runs the reference.
        fold_norm: in the grouped strategy, apply the Sub-LayerNorm behind the output product; False applies it before, by
            a kernel of its own. None folds but in float16: the fold stores h * norm_weight before it is normalised,
            which is not finite beyond 65504. Where a row of h has a mean far above its deviation the fold loses digits:
            at 16 times its error was 1.4 times the other's, and as large as that of plain PyTorch.

    Returns:
        [N, width], or the residual's shape and dtype. Rows past offsets[G] get the residual, else zero. Under autocast
        the matrix products run in autocast's dtype. A parameter without rows gets a zero gradient, a frozen one none.

    Raises:
        ValueError: a dtype, shape, device, name or width that does not fit.
    """
    has_gate = w1 is not None
    w0, w1, w2, b2, norm_weight, norm_bias = (list(v or ()) for v in (w0, w1, w2, b2, norm_weight, norm_bias))
    if (dtype := autocast_dtype(z)) is not None:
        z = z.to(dtype)
        w0, w1, w2, b2 = ([tensor.to(dtype) for tensor in tensors] for tensors in (w0, w1, w2, b2))
    lists = {"w0": w0, "w1": w1, "norm_weight": norm_weight, "norm_bias": norm_bias, "w2": w2, "b2": b2}
    check(z, lists, has_gate, offsets, row_counts, residual, gamma, drop_path, sample, row_index, activation, eps)
    strategy = chosen_strategy(strategy, z, w0[0].shape[0], len(w0), row_counts)
    fold_norm = z.dtype != torch.float16 if fold_norm is None else fold_norm
    leaves = (z, *(parameter for group in lists.values() for parameter in group), gamma)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    y_needed = gamma is not None or (len(norm_weight) > 0 and strategy == "grouped")
    return _op(
        z, *lists.values(), offsets, row_counts, residual, gamma, drop_path, sample, row_index, activation, eps, strategy,
        fold_norm, differentiable and not recompute, differentiable and y_needed,
    )[0]  # fmt: skip
