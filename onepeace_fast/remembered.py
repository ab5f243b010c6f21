"""Tensors that follow from plain arguments alone, made once for many calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from onepeace_fast.ops.operation import is_untransformed

KEPT = 64  # sets of arguments
Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


def is_captured() -> bool:
    """Whether a CUDA graph takes what is launched now; a build of torch for CPUs cannot be asked."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def remembered(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Keep what ``make`` gives for the last arguments, as tensors that autograd takes, though made in inference mode.

    A call that is traced, or that a mode of PyTorch looks at, makes its own: kept, its fake tensors would be given to
    every later call. So does one in a graph capture, whose tensors have no values but in the graph.
    """
    kept = functools.lru_cache(maxsize=KEPT)(make)

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        if torch.compiler.is_compiling() or not is_untransformed(()) or is_captured():
            return make(*args, **kwargs)
        with torch.inference_mode(False):
            return kept(*args, **kwargs)  # type: ignore[arg-type]  # they are hashable

    return functools.update_wrapper(call, kept)
