"""Which modules' parameters may be read past their ``forward``, and what runs where they may not.

The fused path reads the parameters of several modules for one kernel. That is what these modules compute only as long
as each is of torch's own class, unwrapped, with plain tensors and without hooks. Any other is called as it stands: on
packed rows [rows, width], so it must work row by row.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from onepeace_fast import kernels
from onepeace_fast.ops.kernel_choice import kernels_forced
from onepeace_fast.ops.packed_rows import row_slices
from onepeace_fast.route_plan import RoutePlan
from onepeace_fast.structures import Routing

Kind = TypeVar("Kind", bound=nn.Module)
# A fake tensor is what tracing puts in place of a plain one.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, type(None))


def is_plain(module: nn.Module | None, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a module computes what ``kind`` does with its parameters, and nothing watches or changes its call."""
    return type(module) is kind and not is_watched(module) and has_plain_tensors(module)


def has_plain_tensors(module: nn.Module) -> bool:
    """Whether a module's own parameters are plain tensors."""
    return all([type(parameter) in _PLAIN_TENSORS for parameter in module._parameters.values()])  # faster than lazily


def is_plain_tensor(kind: type) -> bool:
    """Whether a tensor's class is torch's own, or what tracing puts in its place."""
    return kind in _PLAIN_TENSORS


def inside(module: nn.Module, kind: type[Kind]) -> Kind:
    """The module of a kind that a module is, or that it was put around: checkpoint_wrapper, DDP, a user's own class."""
    found = next((inner for inner in module.modules() if isinstance(inner, kind)), None)
    if found is None:
        raise ValueError(f"expected a {kind.__name__} or a module around one, got {type(module).__name__}")
    return found


def embedding_table(embedding: nn.Module, rows: int) -> Tensor:
    """The vectors of all ``rows`` ids: an embedding's very weight, or what its call gives where that may differ."""
    if is_plain(embedding, nn.Embedding) and not watched_everywhere():
        settings = (embedding.padding_idx, embedding.max_norm, embedding.scale_grad_by_freq or None)
        if settings == (None, None, None):
            return embedding.weight
    return embedding(torch.arange(rows, device=device_of(embedding)))


def device_of(module: nn.Module) -> torch.device | None:
    """The device of a module's parameters and buffers; None without any."""
    return next(iter([tensor.device for tensor in (*module.parameters(), *module.buffers())]), None)


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, or a ``forward`` of its own."""
    own = module.__dict__
    hooks = own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def refuse_advancing(model: nn.Module) -> None:
    """Raise where a module's weight advances with every call: calls for several passes at once are not several calls.

    Raises:
        ValueError: spectral_norm, old or new, in training mode.
    """
    advancing = [module for module in model.modules() if module.training and _is_spectral(module)]
    if advancing:
        name = next(name for name, module in model.named_modules() if module is advancing[0])
        raise ValueError(
            f"{name}: expected a weight that only an optimizer changes, got spectral_norm, whose every call in "
            "training changes it; the fused backend calls a module once for all passes: take backend='reference'"
        )


def _is_spectral(module: nn.Module) -> bool:
    old = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    return old or isinstance(module, _SpectralNorm)


def calls_as(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a call of a module runs ``kind.forward``, and nothing watches or changes it."""
    return getattr(type(module), "forward", None) is kind.forward and not is_watched(module)


def watched_everywhere() -> bool:
    """Whether hooks are registered for all modules."""
    return bool(
        torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def calls_modules(x: Tensor) -> bool:
    """Whether modules are called on packed rows: on a CPU, where no kernel runs, that costs less than an op.

    Not under autocast, whose dtypes the ops choose, nor in compiled code, which is to hold the ops.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return not (kernels.INTERPRETED or kernels_forced())


def are_plain(part: str, modules: Sequence[nn.Module], kind: type[nn.Module]) -> bool:
    """``is_plain`` of each; where one is not, say once that ``part`` runs through its modules."""
    everywhere = watched_everywhere()
    for module in modules:
        if everywhere or not is_plain(module, kind):
            unfused(part, module, kind)
            return False
    return True


def unfused(part: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Say once that a part runs through its modules, and because of which."""
    got, plain = type(module).__name__, kind.__name__
    got = f"a {got} with hooks, a forward, weights or settings of its own" if got == plain else got
    _say_once(
        f"{part}: expected a plain {plain}, to be fused, got {got}; this part runs through its modules and costs time"
    )


def _say_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def by_modality(modules: Sequence[nn.Module], x: Tensor, plan: RoutePlan) -> Tensor:
    """Every row [rows, width] through the module of its modality; inert rows come out as zero.

    Without the plan's row counts the host reads its offsets, which waits for a device and is said once.
    """
    if not plan.row_counts and plan.offsets.device.type != "cpu":
        _say_once(
            "plan: expected row counts that the host knows, got none with modules that are not fused; the host waits "
            "for the device in every layer; build the plan by from_lengths, or from_masks without capacity"
        )
    ranges = list(row_slices(Routing(plan.offsets, plan.row_counts)))
    outputs = [module(x[rows]) for module, rows in zip(modules, ranges, strict=True)]
    inert = x.shape[0] - ranges[-1].stop
    return torch.cat([*outputs, outputs[0].new_zeros(inert, outputs[0].shape[1])])
