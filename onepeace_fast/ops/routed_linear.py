"""One linear layer per modality, on contiguous row ranges of packed tokens.

    y = x W^T + b,   with W and b of the row's modality

(routing: ONE-PEACE, arXiv 2305.11172). Rows past the last modality are inert and come out as zero.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device
from onepeace_fast.kernels.launch import architecture_and_multiprocessors
from onepeace_fast.kernels.tile_table import MAX_MODALITIES, refusal
from onepeace_fast.ops.arguments import (
    autocast_dtype,
    check_offsets,
    check_routing,
    require_lists,
    require_one_per_modality,
    require_rows,
)
from onepeace_fast.ops.operation import Gradient, Operation
from onepeace_fast.ops.packed_rows import row_slices
from onepeace_fast.ops.routed_ffn_arguments import TILE_ALIGNMENT
from onepeace_fast.structures import (
    Needs,
    RoutedLinearGradients,
    RoutedLinearInputs,
    RoutedLinearOutputs,
    RoutedLinearSaved,
    Routing,
)


def routed_linear_reference(given: RoutedLinearInputs) -> RoutedLinearOutputs:
    """A matrix product for each modality; without row counts the offsets are read on the host."""
    x, weight, bias, routing = given
    check_offsets(routing, x.shape[0])
    y = x.new_empty(x.shape[0], weight[0].shape[0])
    ranges = list(row_slices(routing))
    for m, rows in enumerate(ranges):
        if bias:
            torch.addmm(bias[m], x[rows], weight[m].t(), out=y[rows])
        else:
            torch.mm(x[rows], weight[m].t(), out=y[rows])
    y[ranges[-1].stop :] = 0
    return RoutedLinearOutputs(y)


def routed_linear_backward_reference(saved: RoutedLinearSaved, needs: Needs) -> RoutedLinearGradients:
    """dx = dy W,  dW = dy^T x,  db = sum dy over the rows of each modality."""
    dy, x, weight, routing = saved
    ranges = list(row_slices(routing))
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs.x else None
    if dx is not None:
        for m, rows in enumerate(ranges):
            torch.mm(dy[rows], weight[m], out=dx[rows])
    return RoutedLinearGradients(
        dx,
        [dy[rows].t() @ x[rows] if need else None for rows, need in zip(ranges, needs.weight, strict=True)],
        [dy[ranges[m]].sum(0) if need else None for m, need in enumerate(needs.bias)],
    )


def _by_kernel(given: RoutedLinearInputs) -> RoutedLinearOutputs:
    """By one launch for all modalities where the host does not know their rows, else a vendor's product for each."""
    if not _is_grouped(given.x, given.weight, given.routing):
        return routed_linear_reference(given)
    from onepeace_fast.kernels.routed_linear import routed_linear_forward

    check_offsets(given.routing, given.x.shape[0])
    return routed_linear_forward(given)


def _backward_by_kernel(saved: RoutedLinearSaved, needs: Needs) -> RoutedLinearGradients:
    if not _is_grouped(saved.x, saved.weight, saved.routing):
        return routed_linear_backward_reference(saved, needs)
    from onepeace_fast.kernels.routed_linear import routed_linear_backward

    return routed_linear_backward(saved, needs)


def _is_grouped(x: Tensor, weight: Sequence[Tensor], routing: Routing) -> bool:
    """Whether grouped products compute it: where the row counts are unknown, and they take these tensors."""
    if routing.row_counts:
        return False
    reason = _untaken_by_tiles(x, weight[0].shape[0], len(weight))
    if reason is not None and x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(f"row_counts: expected the plan's inside a graph capture, got none; {reason}")
        _warn_of_host_read(reason)
    return reason is None


@functools.cache
def _warn_of_host_read(reason: str) -> None:
    warnings.warn(
        f"row_counts: got none, so that every call waits to read the offsets on the host; {reason}", stacklevel=2
    )


def _untaken_by_tiles(x: Tensor, columns: int, modalities: int) -> str | None:
    """Why one launch for all modalities cannot take these tensors, in one line."""
    multiple = TILE_ALIGNMENT // x.element_size()
    for name, size in (("x", x.shape[1]), ("weight", columns)):
        if size % multiple:
            of = "columns" if name == "x" else "rows"
            return f"{name}: one launch for all modalities takes multiples of {multiple} {of}, got {size}"
    if x.is_cuda and (reason := refusal(architecture_and_multiprocessors(x.device)[0])) is not None:
        return f"x: {reason}"
    half = x.dtype in (torch.float16, torch.bfloat16)
    if not half and (x.is_cuda or x.dtype != torch.float32):
        return f"x: one launch for all modalities takes float16 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    if modalities > MAX_MODALITIES:
        return f"offsets: one launch takes at most {MAX_MODALITIES} modalities, got {modalities}"
    return None


def _fake(given: RoutedLinearInputs) -> RoutedLinearOutputs:
    return RoutedLinearOutputs(given.x.new_empty(given.x.shape[0], given.weight[0].shape[0]))


def _fake_backward(saved: RoutedLinearSaved, needs: Needs) -> RoutedLinearGradients:
    x, weight = saved.x, saved.weight
    return RoutedLinearGradients(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needs.x else None,
        [w.new_empty(w.shape) if need else None for w, need in zip(weight, needs.weight, strict=True)],
        [weight[m].new_empty(weight[m].shape[0]) if need else None for m, need in enumerate(needs.bias)],
    )


ROUTED_LINEAR = Operation(
    "routed_linear",
    RoutedLinearInputs,
    RoutedLinearOutputs,
    reference=routed_linear_reference,
    kernel=_by_kernel,
    fake=_fake,
    gradient=Gradient(
        RoutedLinearSaved, RoutedLinearGradients, routed_linear_backward_reference, _backward_by_kernel,
        _fake_backward,
    ),
)  # fmt: skip


def routed_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    *,
    offsets: Tensor,
    row_counts: Sequence[int] = (),
) -> Tensor:
    """x W^T + b of each row's modality.

    Args:
        x: floating point [N, width], modality-major: rows offsets[m] to offsets[m + 1] are those of modality m.
        weight: one [columns, width] per modality in x's dtype.
        bias: one [columns] per modality in x's dtype, or None.
        offsets: int32 [G + 1], the plan's.
        row_counts: the plan's row counts, where the host knows them. A GPU then runs the vendor's product for each
            modality. Without them it runs all in one launch in half precision, where width and columns are multiples
            of 8; otherwise every call reads the offsets on the host, which a warning says once.

    Returns:
        [N, columns] in x's dtype. Rows past offsets[G] are zero. Under autocast it runs in autocast's dtype. A
        parameter without rows gets a zero gradient, a frozen one none.

    Raises:
        ValueError: a dtype, shape or device that does not fit.
    """
    require_rows("x", x)
    require_lists(weight=weight, bias=bias)
    if (dtype := autocast_dtype(x)) is not None:
        x = x.to(dtype)
        weight, bias = (some and [w.to(dtype) for w in some] for some in (weight, bias))
    weights, biases, routing = list(weight), list(bias or ()), Routing(offsets, tuple(row_counts))
    _check(x, weights, biases, routing)
    return ROUTED_LINEAR(RoutedLinearInputs(x, weights, biases, routing))[0]


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], routing: Routing) -> None:
    """Raise unless all arguments fit together."""
    check_routing(routing, x)
    modalities = len(routing.offsets) - 1
    require(modalities > 0, "offsets: expected at least one modality, got none")
    require_one_per_modality("weight", weights, modalities, optional=False)
    require_one_per_modality("bias", biases, modalities)
    columns = weights[0].shape[0] if isinstance(weights[0], Tensor) and weights[0].dim() else 0
    dtype, device = x.dtype, x.device
    for name, tensors, shape in (("weight", weights, (columns, x.shape[1])), ("bias", biases, (columns,))):
        for m, tensor in enumerate(tensors):
            fits = tensor.dtype == dtype and tensor.shape == shape and tensor.device == device
            if not fits or tensor.layout != torch.strided:
                require_device(f"{name}[{m}]", tensor, device)
                wanted = f"dense {str(dtype).removeprefix('torch.')}, as x has, {list(shape)}"
                raise ValueError(f"{name}[{m}]: expected {wanted}, got {describe(tensor)}")
