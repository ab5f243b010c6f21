"""Whether what a variant computes keeps the tolerance rule, beside plain PyTorch and the same in a wider dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.tolerance import compare

Values = dict[str, list[Tensor]]  # "output", "gradient" of the tokens, "parameter gradients"


class Wrong(Exception):
    """What a variant computes breaks the rule; the argument says by how much."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """What the exact values are computed in."""
    return torch.float32 if device.type == "cuda" else torch.float64


@contextmanager
def widened(parameters: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Parameters in another dtype for a while; functions that close over them see it."""
    before = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


def widen(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or several of them, in another dtype; one that needs a gradient is a new leaf."""
    if isinstance(value, tuple):
        return tuple(widen(one, dtype) for one in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def check(found: Values, plain: Values, exact: Values, slices: Sequence[Any] = ()) -> dict[str, float]:
    """The largest error over what the rule allows, of outputs, gradients of the tokens and those of parameters.

    The rule holds for each tensor, and of rows also for each of ``slices``, such as a modality's or a head's. What
    either side lacks is not compared.

    Raises:
        Wrong: an error that the rule does not allow, another shape, or a value that is not finite.
    """
    largest = {}
    for what in (what for what in found if what in plain):
        if len(found[what]) != len(plain[what]):
            raise Wrong(f"{what}: {len(found[what])} tensors, the reference has {len(plain[what])}")
        for mine, theirs, truth in zip(found[what], plain[what], exact[what], strict=True):
            if mine.shape != truth.shape:
                raise Wrong(f"{what}: shape {list(mine.shape)}, the reference has {list(truth.shape)}")
            if not mine.isfinite().all():
                raise Wrong(f"{what}: has values that are not finite")
            parts = slices if what != "parameter gradients" else ()
            for one in compare(mine, theirs, truth, parts):
                share = one.error / one.allowed if one.allowed else float(one.error > 0)
                largest[what] = max(largest.get(what, 0.0), share)
                if not one.kept:
                    raise Wrong(
                        f"{what}: {one.kind} error {one.error:.2g}, the tolerance rule allows {one.allowed:.2g}"
                    )
    return {what: round(share, 4) for what, share in largest.items()}


def values(variant: Any, output: Any, gradients: Sequence[Tensor]) -> Values:
    """What can be compared of a variant's run: rows in packed order, and the parameters' gradients in one order."""
    found: Values = {}
    if variant.rows is not None and output is not None:
        found["output"] = [variant.rows(output).detach()]
    tokens = variant.gradients_compared
    if variant.gradient_rows is not None and gradients:
        rows = [variant.gradient_rows(gradient) for gradient in gradients[:tokens]]
        found["gradient"] = [*rows[0]] if isinstance(rows[0], tuple) else rows
    if variant.parameter_gradients is not None and gradients:
        found["parameter gradients"] = list(variant.parameter_gradients(gradients[variant.inputs :]))
    return found


def exactly(
    function: Callable[..., Any], arguments: Sequence[Any], gradient: Any, parameters: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[Any, tuple[Tensor, ...]]:  # fmt: skip
    """Output and gradients of a function in a wider dtype, parameters included; all of plain PyTorch."""
    with widened(parameters, dtype):
        wide = tuple(widen(argument, dtype) for argument in arguments)
        output = function(*wide)
        needed = [argument for argument in wide if isinstance(argument, Tensor) and argument.requires_grad]
        gradients = torch.autograd.grad(output, [*needed, *parameters], widen(gradient, dtype), allow_unused=True)
    return output, gradients
