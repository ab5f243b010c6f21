"""Where an op runs its kernel and where its reference."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from onepeace_fast import kernels
from onepeace_fast.kernels.launch_heuristic import WIDEST

_kernels_forced: bool | None = None


@contextlib.contextmanager
def force_kernels(forced: bool) -> Iterator[None]:
    """Run Triton's kernels, or with False the references, wherever the tensors are, in every thread; for checks."""
    global _kernels_forced
    before, _kernels_forced = _kernels_forced, forced
    try:
        yield
    finally:
        _kernels_forced = before


def kernels_forced() -> bool | None:
    """What ``force_kernels`` asks for, None outside it."""
    return _kernels_forced


def runs_kernel(name: str, tensor: Tensor, triton: bool = True) -> bool:
    """Whether an op's kernel runs on its first tensor; raise where it should and Triton, which it needs, cannot.

    Rows that are wider than the kernel holds are the reference's, which a warning says once.
    """
    wanted = tensor.is_cuda or (triton and kernels.INTERPRETED and tensor.device.type == "cpu")
    if _kernels_forced is not None:
        wanted = _kernels_forced and (triton or tensor.is_cuda)
    if tensor.dtype == torch.float64 or not wanted:
        return False
    if triton and (reason := kernels.unavailable_reason()) is not None:
        raise RuntimeError(
            f"{name}: expected Triton for a tensor on {tensor.device}, got none: {reason}; install it, or use "
            "backend='reference'"
        )
    most = WIDEST.get(name.removesuffix("_backward"))
    if most is not None and tensor.shape[-1] > most:
        _warn_of_width(name, tensor.shape[-1], most)
        return False
    return True


@functools.cache
def _warn_of_width(name: str, width: int, most: int) -> None:
    warnings.warn(
        f"{name}: expected rows of at most {most} columns, which the kernel holds, got {width}; the slower reference "
        "computes them",
        stacklevel=2,
    )
