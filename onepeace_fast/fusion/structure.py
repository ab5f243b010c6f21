"""Whether a live module still is what it was when it was fused: classes, hooks, parameters, settings.

A fused computation reads the parameters of many modules and calls few of them. What a user put around a module since
then (LoRA, a hook, a quantised weight) would be ignored, so every call looks for it first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from operator import attrgetter
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.layers.plain import has_plain_tensors, is_plain_tensor, watched_everywhere

DISTRIBUTED = "torch.distributed"  # its hooks and wrappers make parameters whole before a module's call
TRANSFORMERS = "transformers."  # its hooks record what modules return, or let it have a gradient
RUN = frozenset({"forward", "_call_impl", "_slow_forward", "_wrapped_call_impl"})  # what of nn.Module's a call runs

MIXING = (  # of torch's modules
    nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, nn.modules.batchnorm._NormBase, nn.GroupNorm,
)  # fmt: skip


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
    children: frozenset[str]
    parameters: list[type]
    names: frozenset[str]


class Setting(NamedTuple):
    """An attribute of a module that decides the computation, as it was."""

    path: str
    owner: object
    name: str
    value: object


class Method(NamedTuple):
    """A method of a class, as it was; None where it was changed since, before a copy was made."""

    kind: type
    name: str
    function: object


class Values:
    """The numbers of a module's buffer, as they were; they are compared where it was written to or is another."""

    def __init__(self, path: str, module: nn.Module, name: str) -> None:
        self.path, self.module, self.name = path, module, name
        self.now: Tensor | None = None
        self.version, self.reason = 0, ""
        self.values = module.get_buffer(name).detach().clone()

    def change(self) -> str:
        """Why they are others; an empty text where they are not."""
        buffer = self.module._buffers.get(self.name)
        if buffer is None:
            return f"{self.path}: expected a buffer, got none"
        version = 0 if buffer.is_inference() else buffer._version
        if buffer is not self.now or version != self.version:
            self.now, self.version = buffer, version
            self.values = self.values.to(buffer.device)
            same = torch.equal(buffer, self.values)
            self.reason = "" if same else f"{self.path}: expected the values with which it was fused, got others"
        return self.reason


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
        entry: the module below it whose ``forward`` is replaced instead of the root's own.
    """

    def __init__(
        self,
        root: nn.Module,
        called: Collection[nn.Module] = (),
        exchangeable: Collection[nn.Module] = (),
        whole: Collection[nn.Module] = (),
        entry: nn.Module | None = None,
    ) -> None:
        sets = ({id(module) for module in some} for some in (called, exchangeable, whole))
        self.parts = [*_parts(root, "", *sets)]
        self.entry = root if entry is None else None
        self.methods = {kind: _methods(kind) for kind in dict.fromkeys(map(type, root.modules()))}
        self.of_root = self.methods[type(root)] - RUN  # what stands in the place of its forward is run
        self.children = _children(root)
        self.settings: list[Setting] = []
        self.values: list[Values] = []
        self.of_classes: list[Method] = []
        for kind in dict.fromkeys(part.kind for part in self.parts if not part.may_change):
            self.keep(kind, *(self.methods[kind] - RUN), "forward")

    def __getstate__(self) -> dict[str, Any]:
        # A function that a user put into a class cannot be pickled.
        methods = [(kind, name, getattr(kind, name, None) is own) for kind, name, own in self.of_classes]
        return self.__dict__ | {"of_classes": methods}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.of_classes = []
        for kind, name, is_kept in state["of_classes"]:
            self.keep(kind, name) if is_kept else self.of_classes.append(Method(kind, name, None))

    def keep(self, kind: type, *names: str) -> None:
        """Let another function in the place of these methods of a class be a change."""
        methods = [Method(kind, name, getattr(kind, name)) for name in names]
        self.of_classes += [one for one in methods if not isinstance(one.function, MethodType)]  # a classmethod is new

    def watch(self, path: str, owner: object, *names: str) -> None:
        """Let another value of these attributes of a module, or of its configuration, be a change."""
        self.settings += [Setting(f"{path}.{name}", owner, name, attrgetter(name)(owner)) for name in names]

    def watch_values(self, path: str, module: nn.Module) -> None:
        """Let other numbers in the buffers of a module below the root be a change."""
        self.values += [Values(f"{path}.{name}", module, name) for name, _ in module.named_buffers(recurse=False)]

    def mixing(self) -> str:
        """Which module in an exchangeable place is one of torch's that mix tokens; an empty text for none."""
        for part in self.parts:
            module = part.module
            is_pointwise = isinstance(module, nn.modules.conv._ConvNd) and max(module.kernel_size) == 1
            if part.may_change and isinstance(module, MIXING) and not is_pointwise:
                return f"{part.path}: expected what works token by token, got a {part.kind.__name__}"
        return ""

    def change(self) -> str:
        """What changed since, in one line; an empty text for nothing."""
        if watched_everywhere():
            return "hooks are registered for all modules"
        if self.entry is not None:
            if reason := _added(self.entry, self.children):
                return reason
            if reason := _own_method(self.entry, self.of_root):
                return f"model: {reason}"
        for kind, name, function in self.of_classes:
            if getattr(kind, name, None) is not function:
                return f"expected the {name} that {kind.__name__} had when it was fused, got another"
        for part in self.parts:
            if reason := _change(part, RUN if part.may_change else self.methods[part.kind]):
                return f"{part.path}: {reason}"
        for path, owner, name, value in self.settings:
            if (now := attrgetter(name)(owner)) != value:
                return f"{path}: expected {value!r}, as when it was fused, got {now!r}"
        return next(filter(None, [values.change() for values in self.values]), "")


def _parts(
    module: nn.Module, prefix: str, called: Collection[int], exchangeable: Collection[int], whole: Collection[int]
) -> Iterator[Part]:
    for name, child in module._modules.items():
        if child is not None and id(child) not in whole:
            path = f"{prefix}{name}"
            yield Part(
                path, module, name, child, type(child), id(child) in called, id(child) in exchangeable,
                _children(child), [*map(type, child._parameters.values())], _parameters(child),
            )  # fmt: skip
            yield from _parts(child, f"{path}.", called, exchangeable, whole)


def _change(part: Part, methods: frozenset[str]) -> str:
    if not part.may_change and (reason := _replaced(part)):
        return reason
    module = part.module
    own = module.__dict__
    if reason := _own_method(module, methods):
        return reason
    for hooks in (own["_forward_pre_hooks"], own["_forward_hooks"], own["_backward_hooks"], own["_backward_pre_hooks"]):
        if hooks and not (part.is_called and all(map(_is_obeyed, hooks.values()))):
            return "expected no hooks, got some"
    if part.may_change:
        return ""
    if reason := _added(module, part.children):
        return reason
    if [*map(type, module._parameters.values())] == part.parameters:
        return ""  # most often, and quicker than what follows
    if new := next(iter(_parameters(module) - part.names), ""):
        return f"expected no parameter {new}, got one"
    # FSDP1 keeps its tensors as plain attributes.
    if lost := next((name for name in part.names if getattr(module, name, None) is None), ""):
        return f"expected a parameter {lost}, got none"
    if not has_plain_tensors(module):
        kinds = {type(parameter) for parameter in module._parameters.values() if parameter is not None}
        if other := next((kind for kind in kinds if not is_plain_tensor(kind) and not _is_of_distributed(kind)), None):
            return f"expected plain parameters, got {other.__name__}"
    return ""


def _own_method(module: nn.Module, methods: frozenset[str]) -> str:
    own = module.__dict__
    if own.keys().isdisjoint(methods):
        return ""  # most often
    for name in own:
        if name in methods and callable(own[name]) and not isinstance(own[name], Replacement):
            return f"expected the class's {name}, got one of its own"
    return ""


def _methods(kind: type[nn.Module]) -> frozenset[str]:
    """Methods of a class that may decide what it computes: its own, and those that run a call."""
    own = {name for name in dir(kind) if not hasattr(nn.Module, name) and callable(getattr(kind, name, None))}
    return RUN | own


def _replaced(part: Part) -> str:
    module = part.parent._modules.get(part.name)
    if module is not part.module and not (part.is_called and _is_distributed_wrapper(module, part.module)):
        return f"expected the {part.kind.__name__} that was fused, got {_kind_name(module)}"
    module = part.module
    if type(module) is not part.kind and not (part.is_called and isinstance(module, part.kind)):
        return f"expected a {part.kind.__name__}, got {_kind_name(module)}"
    return ""


def _added(module: nn.Module, children: frozenset[str]) -> str:
    if len(module._modules) == len(children):
        return ""
    for name in module._modules.keys() - children:
        if (child := module._modules[name]) is not None:
            return f"expected no module {name}, got {_kind_name(child)}"
    return ""


def _children(module: nn.Module) -> frozenset[str]:
    return frozenset([name for name, child in module._modules.items() if child is not None])


def _parameters(module: nn.Module) -> frozenset[str]:
    return frozenset([name for name, parameter in module._parameters.items() if parameter is not None])


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
