"""The tolerance rule: how far a result may lie from float64, measured against plain PyTorch in the same dtype.

Maximum and RMS error of every slice (a tensor, one modality's rows, one head) may be at most twice that of plain
PyTorch plus 4 eps(dtype) of the slice's largest magnitude. Nothing here is tuned to an op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and RMS error of a tensor."""
    difference = (value.double() - exact.double()).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_within_rule(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, slices: Sequence[object] = (...,)
) -> None:
    """Fail where ``actual`` breaks the rule in any slice; ``plain`` is PyTorch in the same dtype, ``exact`` float64."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)} is not {list(exact.shape)}"
    epsilon = torch.finfo(actual.dtype).eps
    for part in (..., *slices):
        mine, theirs, truth = actual.detach()[part], plain.detach()[part], exact.detach()[part]
        if not truth.numel():
            continue
        assert mine.isfinite().all(), f"{name}[{part}]: has values that are not finite"
        slack = 4 * epsilon * truth.abs().max().item()
        for kind, error, reference in zip(("maximum", "RMS"), errors(mine, truth), errors(theirs, truth), strict=True):
            limit = 2 * reference + slack
            assert error <= limit, (
                f"{name}[{part}]: {kind} error {error:.3g} in {actual.dtype}, at most {limit:.3g} is allowed "
                f"(plain PyTorch has {reference:.3g})"
            )
