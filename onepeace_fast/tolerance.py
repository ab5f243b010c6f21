"""The tolerance rule: how far a result may lie from float64, measured against plain PyTorch in the same dtype.

Maximum and RMS error of every slice (a tensor, one modality's rows, one head) may be at most twice that of plain
PyTorch plus 4 eps(dtype) of the slice's largest magnitude. Nothing here is tuned to an op.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


class Comparison(NamedTuple):
    """One kind of error of one slice of a tensor, what the rule allows, and what plain PyTorch has."""

    part: Any
    kind: str
    error: float
    allowed: float
    plain: float

    @property
    def kept(self) -> bool:
        """Whether the rule is; an error that is not a number breaks it."""
        return self.error <= self.allowed


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and RMS error of a floating-point tensor of any shape, computed in float64."""
    difference = (value.double() - exact.double()).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def compare(actual: Tensor, plain: Tensor, exact: Tensor, slices: Sequence[Any] = (...,)) -> Iterator[Comparison]:
    """Hold a tensor and each slice of it against the rule.

    Args:
        actual: floating point, any shape.
        plain: what PyTorch computes in the same dtype, in the shape of ``actual``.
        exact: the same in float64, or in float32 on a GPU.
        slices: indices of ``actual``, such as a modality's rows or a head, each held against the rule alone.
    """
    epsilon = torch.finfo(actual.dtype).eps
    for part in (..., *slices):
        mine, theirs, truth = actual.detach()[part], plain.detach()[part], exact.detach()[part]
        if not truth.numel():
            continue
        slack = 4 * epsilon * truth.abs().max().item()
        for kind, error, reference in zip(("maximum", "RMS"), errors(mine, truth), errors(theirs, truth), strict=True):
            yield Comparison(part, kind, error, 2 * reference + slack, reference)


def assert_within_rule(name: str, actual: Tensor, plain: Tensor, exact: Tensor, slices: Sequence[Any] = (...,)) -> None:
    """Fail where ``actual`` breaks the rule in any slice; the tensors are those of ``compare``.

    Raises:
        AssertionError: another shape, a value that is not finite, or a slice that breaks the rule, in one line.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)} is not {list(exact.shape)}"
    assert actual.isfinite().all(), f"{name}: has values that are not finite"
    for part, kind, error, allowed, reference in (c for c in compare(actual, plain, exact, slices) if not c.kept):
        raise AssertionError(
            f"{name}[{part}]: {kind} error {error:.3g} in {actual.dtype}, at most {allowed:.3g} is allowed "
            f"(plain PyTorch has {reference:.3g})"
        )
