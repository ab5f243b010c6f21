"""Whether a live module still is what it was when it was fused: classes, hooks, parameters.

A fused computation reads the parameters of many modules and calls few of them. What a user put around a module since
then (LoRA, a hook, a quantised weight) would be ignored, so every call looks for it first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.layers.plain import has_plain_tensors, is_plain_tensor, watched_everywhere

DISTRIBUTED = "torch.distributed"  # its hooks and wrappers make parameters whole before a module's call
TRANSFORMERS = "transformers."  # its hooks record what modules return, or let it have a gradient


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module among ranks, which must agree on which of its parameters have a gradient."""
    sharded = any(kind.__name__ == "FSDPModule" and _is_of_distributed(kind) for kind in type(module).__mro__)
    return sharded and dist.get_world_size() > 1


class Part(NamedTuple):
    """A module below the root, and where it stands."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Module
    kind: type[nn.Module]
    is_called: bool
    may_change: bool


class Structure:
    """The modules below a root, as they stood at first.

    Args:
        root: the module whose computation is replaced; its own hooks run in any case.
        called: modules below it that the fused computation calls by their ``__call__``, so that what torch.distributed
            put around them runs: those of FSDP2, and the checkpoint wrapper; so do hooks of transformers.
        exchangeable: those of them that another module may take the place of, LoRA's for instance: what stands there is
            called, token by token.
        whole: modules below it that are called with what the model's own code would give them: anything may be changed
            in them.
    """

    def __init__(
        self,
        root: nn.Module,
        called: Collection[nn.Module] = (),
        exchangeable: Collection[nn.Module] = (),
        whole: Collection[nn.Module] = (),
    ) -> None:
        sets = ({id(module) for module in some} for some in (called, exchangeable, whole))
        self.parts = [*_parts(root, "", *sets)]

    def change(self) -> str:
        """What changed since, in one line; an empty text for nothing."""
        if watched_everywhere():
            return "hooks are registered for all modules"
        for part in self.parts:
            if reason := _change(part):
                return f"{part.path}: {reason}"
        return ""


def _parts(
    module: nn.Module, prefix: str, called: Collection[int], exchangeable: Collection[int], whole: Collection[int]
) -> Iterator[Part]:
    for name, child in module._modules.items():
        if child is not None and id(child) not in whole:
            path = f"{prefix}{name}"
            yield Part(path, module, name, child, type(child), id(child) in called, id(child) in exchangeable)
            yield from _parts(child, f"{path}.", called, exchangeable, whole)


def _change(part: Part) -> str:
    if not part.may_change and (reason := _replaced(part)):
        return reason
    module = part.module
    own = module.__dict__
    if "forward" in own and not isinstance(own["forward"], Replacement):
        return "expected the class's forward, got one of its own"
    for hooks in (own["_forward_pre_hooks"], own["_forward_hooks"], own["_backward_hooks"], own["_backward_pre_hooks"]):
        if hooks and not (part.is_called and all(map(_is_obeyed, hooks.values()))):
            return "expected no hooks, got some"
    if not part.may_change and not has_plain_tensors(module):
        kinds = {type(parameter) for parameter in module._parameters.values() if parameter is not None}
        if other := next((kind for kind in kinds if not is_plain_tensor(kind) and not _is_of_distributed(kind)), None):
            return f"expected plain parameters, got {other.__name__}"
    return ""


def _replaced(part: Part) -> str:
    module = part.parent._modules.get(part.name)
    if module is not part.module and not (part.is_called and _is_distributed_wrapper(module, part.module)):
        return f"expected the {part.kind.__name__} that was fused, got {_kind_name(module)}"
    module = part.module
    if type(module) is not part.kind and not (part.is_called and isinstance(module, part.kind)):
        return f"expected a {part.kind.__name__}, got {_kind_name(module)}"
    return ""


def _kind_name(module: nn.Module | None) -> str:
    return type(module).__name__


def _is_of_distributed(value: object) -> bool:
    return (getattr(value, "__module__", None) or "").startswith(DISTRIBUTED)


def _is_obeyed(hook: object) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith((DISTRIBUTED, TRANSFORMERS))


def _is_distributed_wrapper(module: nn.Module | None, inner: nn.Module) -> bool:
    """Whether a module is around another, itself or by more of its kind: FSDP around the checkpoint wrapper."""
    if module is None or not _is_of_distributed(type(module)):
        return False
    return any(child is inner or _is_distributed_wrapper(child, inner) for child in module.children())
