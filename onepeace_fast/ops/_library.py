"""How every op is registered: schema, implementation, fake and gradient under ``torch.ops.onepeace_fast``.

An op that has a kernel runs it on CUDA tensors, and on CPU tensors where Triton's interpreter was asked for by
``TRITON_INTERPRET=1`` before the start. float64, which is for checks, runs the specification everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from onepeace_fast import kernels
from onepeace_fast.checks import describe, require, require_device, require_tensor

NAMESPACE = "onepeace_fast"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_WIDTH = 16384
# Asked once: no tracer of every supported torch knows this call.
_AUTOCAST_KINDS = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


class _Library(torch.library.Library):
    """A library whose ops refuse the derivatives that they do not have; torch would drop a tangent without a word."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        """Register ``fn``; what differentiates looks at its tensors first."""

        def checked(keyset: torch.DispatchKeySet, *arguments: Any) -> Any:
            _refuse_transforms(op_name, arguments)
            return fn(keyset, *arguments)

        super().impl(op_name, checked if dispatch_key == "Autograd" else fn, dispatch_key, **options)


def _refuse_transforms(op_name: str, arguments: Sequence[Any]) -> None:
    """Raise where a tensor carries a forward-mode tangent, or is differentiated by ``torch.func``."""
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and forward_ad._current_level < 0:
        return
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        got = "a forward-mode derivative (torch.func.jvp or torch.autograd.forward_ad)"
    elif transformed and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        got = "a derivative by torch.func"
    else:
        return
    raise RuntimeError(
        f"{NAMESPACE}::{op_name}: got {got}, takes plain reverse mode; use backward() or torch.autograd.grad, or the "
        "reference backend"
    )


_LIBRARY = _Library(NAMESPACE, "DEF")
_kernels_forced: bool | None = None


def define(
    name: str,
    signature: str,
    specification: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    kernel: str | Callable[..., Any] | None = None,
    triton: bool = True,
) -> Callable[..., Any]:
    """Define ``onepeace_fast::name`` and return the op.

    ``specification`` is its implementation wherever no kernel runs. ``kernel`` names the module of
    ``onepeace_fast.kernels`` whose function ``name`` takes the same arguments; it is imported when it first runs. Or it
    is a function that composes ops that have kernels, or without ``triton`` one that runs without Triton.
    """
    _LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))

    @functools.wraps(specification)
    def implementation(*arguments: Any) -> Any:
        # The public function has chosen the dtypes: autocast must not change what is inside, as compiled it does not.
        with torch._C._DisableAutocast():
            first = next(value for value in arguments if isinstance(value, Tensor))
            if kernel is None or not runs_kernel(name, first, triton):
                return specification(*arguments)
            return (launcher(kernel, name) if isinstance(kernel, str) else kernel)(*arguments)

    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

    def refuse_batch(*_: Any) -> None:
        raise RuntimeError(
            f"{NAMESPACE}::{name}: got a batch by torch.vmap, takes packed rows; pack all samples by one "
            "route plan, or use the reference backend"
        )

    for key in ("FuncTorchBatched", "Batched"):  # the second is that of is_grads_batched
        _LIBRARY.impl(name, refuse_batch, key)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@contextlib.contextmanager
def force_kernels(forced: bool) -> Iterator[None]:
    """Run the kernels, or with False the specifications, wherever the tensors are, in every thread; for checks."""
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
    """Whether an op's kernel runs on its first tensor; raise where it should and Triton, which it needs, cannot."""
    wanted = tensor.is_cuda or (triton and kernels.INTERPRETED and tensor.device.type == "cpu")
    if tensor.dtype == torch.float64 or not (wanted if _kernels_forced is None else _kernels_forced):
        return False
    if triton and (reason := kernels.unavailable_reason()) is not None:
        raise RuntimeError(
            f"{name}: got a tensor on {tensor.device}, takes Triton for it: {reason}; install it, or use "
            "backend='reference'"
        )
    return True


@functools.cache
def launcher(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of ``onepeace_fast.kernels``, imported when it is first asked for."""
    return getattr(importlib.import_module(f"{kernels.__name__}.{module}"), name)


def register_gradient(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register ``backward`` as the gradient of ``name``, and refuse to differentiate ``name``_backward again."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{NAMESPACE}::{name} is differentiable once: got a request for its second derivative; "
            "use the reference backend for it"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", refuse, lib=_LIBRARY)


def only_needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """A frozen parameter's gradient is None."""
    return [gradient if need else None for gradient, need in zip(gradients, needs or (), strict=True)]


def no_gradient(integers: Sequence[int]) -> list | None:
    """What a gradient returns for a list of integers: torch takes an empty list for a list of tensors."""
    return None if integers else []


def regroup(flat: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """A flat sequence as lists of these lengths."""
    groups, start = [], 0
    for length in lengths:
        groups.append(list(flat[start : start + length]))
        start += length
    return groups


def row_slices(offsets: Tensor, row_counts: Sequence[int]) -> Iterator[slice]:
    """Row range of each modality. Only without ``row_counts`` are the offsets read on the host."""
    bounds = [0]
    if row_counts:
        for count in row_counts:
            bounds.append(bounds[-1] + count)
    else:
        bounds = offsets.tolist()
    return (slice(start, stop) for start, stop in pairwise(bounds))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and scores are float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs this tensor's matrix products, None where it leaves them alone."""
    kind = tensor.device.type
    enabled = kind in _AUTOCAST_KINDS and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled and tensor.dtype != torch.float64 else None


def check_routing(offsets: Tensor, row_counts: Sequence[int], x: Tensor) -> None:
    """Raise unless a plan's ``offsets`` and ``row_counts`` fit x's rows and device."""
    require_tensor("offsets", offsets, (torch.int32,), "[modalities + 1]", 1)
    require_device("offsets", offsets, x.device)
    groups = offsets.shape[0] - 1
    fits = not row_counts or (len(row_counts) == groups and sum(row_counts) <= x.shape[0])
    require(
        fits,
        lambda: (
            f"row_counts: got {list(row_counts)}, takes one per modality, {groups}, in all at most {x.shape[0]} rows"
        ),
    )


def check_offsets(offsets: Tensor) -> None:
    """Raise where offsets decrease; the host can read them on a CPU."""
    if offsets.device.type == "cpu":
        require(
            bool((offsets.diff() >= 0).all()) and int(offsets[0]) == 0,
            lambda: f"offsets: got {offsets.tolist()}, takes row numbers from 0 on that do not decrease",
        )


def require_rows(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating-point matrix whose rows a kernel can hold."""
    require_tensor(name, x, FLOATS, "[rows, width]", 2)
    require(
        x.shape[1] <= MAX_WIDTH,
        lambda: f"{name}: got {describe(x)}, takes rows of at most {MAX_WIDTH} columns; split them",
    )


def require_row_index(rows: Tensor | None, x: Tensor) -> None:
    """Raise unless ``rows`` is absent or a row index on x's device."""
    if rows is not None:
        require_tensor("rows", rows, (torch.int32,), "[N]", 1)
        require_device("rows", rows, x.device)


def check_row_index(rows: Tensor, offsets: Tensor | None, x: Tensor) -> None:
    """Raise unless ``rows``, up to the last of ``offsets``, are distinct rows of x; the host can read them on a CPU."""
    if rows.device.type != "cpu":
        return
    rows = rows if offsets is None else rows[: int(offsets[-1])]
    least, most = (int(rows.min()), int(rows.max())) if rows.numel() else (0, -1)
    require(
        least >= 0 and most < x.shape[0],
        lambda: f"rows: got an index from {least} to {most}, takes 0 to {x.shape[0] - 1}, the rows of x",
    )
    require(rows.unique().numel() == rows.numel(), lambda: "rows: got an index that repeats a row, takes distinct rows")
