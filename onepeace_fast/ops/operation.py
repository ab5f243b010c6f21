"""How every op is registered: schema, implementation, fake and gradient under ``torch.ops.onepeace_fast``.

An op that has a kernel runs it on CUDA tensors, and on CPU tensors where Triton's interpreter was asked for by
``TRITON_INTERPRET=1`` before the start. float64, which is for checks, runs the reference everywhere.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from onepeace_fast import kernels
from onepeace_fast.ops.kernel_choice import runs_kernel

NAMESPACE = "onepeace_fast"


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


def define(
    name: str,
    signature: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    kernel: str | Callable[..., Any] | None = None,
    triton: bool = True,
) -> Callable[..., Any]:
    """Define ``onepeace_fast::name`` and return the op.

    ``reference`` is its implementation wherever no kernel runs. ``kernel`` names the module of
    ``onepeace_fast.kernels`` whose function ``name`` takes the same arguments; it is imported when it first runs. Or it
    is a function that composes ops that have kernels, or without ``triton`` one that runs without Triton.
    """
    _LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))

    @functools.wraps(reference)
    def implementation(*arguments: Any) -> Any:
        # The public function has chosen the dtypes: autocast must not change what is inside, as compiled it does not.
        with torch._C._DisableAutocast():
            first = next(value for value in arguments if isinstance(value, Tensor))
            if kernel is None or not runs_kernel(name, first, triton):
                return reference(*arguments)
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
