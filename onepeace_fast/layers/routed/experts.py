"""What the routed modules share: their experts' parameters, and the way of tokens through packed rows."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from onepeace_fast.checks import describe, require
from onepeace_fast.layers.plain import is_plain, is_watched
from onepeace_fast.route_plan import RoutePlan

Kind = TypeVar("Kind", bound=nn.Module)


class RoutedModule(nn.Module, ABC):
    """What computes each token by the weights of its modality: ``_rows`` over packed rows, and around it their way."""

    @property
    @abstractmethod
    def _modalities(self) -> int | None:
        """How many it has weights for; None where its parts say it when they are called."""

    @abstractmethod
    def _rows(self, rows: Tensor, plan: RoutePlan) -> Tensor:
        """Packed rows [C, width], each through the weights of its modality."""

    @overload
    def forward(self, x: Tensor, plan: RoutePlan, *, packed: bool = False) -> Tensor: ...
    @overload
    def forward(self, x: Mapping[str, Tensor], plan: RoutePlan, *, packed: bool = False) -> dict[str, Tensor]: ...
    def forward(
        self, x: Tensor | Mapping[str, Tensor], plan: RoutePlan, *, packed: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """Each token through the weights of its modality.

        Args:
            x: floating point tokens in their own order, [..., width] for a plan of interleaved tokens, or by modality
                [rows, length, width] for one of padded batches; with ``packed`` the plan's rows [C, width].
            plan: the route plan.
            packed: whether x, and what comes out, are packed rows.

        Returns:
            As x, with as many columns as the module gives; padding and inert tokens are zero.

        Raises:
            ValueError: a plan of another number of modalities, or x that does not fit it.
        """
        modalities = self._modalities
        if modalities is not None and len(plan.modalities) != modalities:
            raise ValueError(
                f"plan: expected one of {modalities} modalities, one for each expert of this "
                f"{type(self).__name__}, got one of {len(plan.modalities)}, {list(plan.modalities)}"
            )
        if packed:
            if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[0] != plan.capacity:
                raise ValueError(f"x: expected packed rows of the plan, [{plan.capacity}, dim], got {describe(x)}")
            return self._rows(x, plan)
        if isinstance(x, Tensor):
            require(x.dim() > 1, lambda: f"x: expected tokens [..., dim], got {describe(x)}")
            rows = plan.unpack_interleaved(self._rows(plan.pack(x), plan))
            return rows.view(*x.shape[:-1], rows.shape[1])
        return plan.unpack(self._rows(plan.pack(x), plan))


def is_routed(module: nn.Module) -> bool:
    """Whether a module is a routed one, or was put around one: it takes the plan."""
    return isinstance(module, RoutedModule) or any([isinstance(inner, RoutedModule) for inner in module.modules()])


def with_plan(name: str, kind: str, module: nn.Module, rows: Tensor, plan: RoutePlan) -> Tensor:
    """Packed rows through a routed module, or through what was put in its place; raise where that takes no plan."""
    if not isinstance(module, RoutedModule) and not _takes_plan(module):
        raise ValueError(
            f"{name}: expected a module that is called with packed rows and a plan, (rows, plan, packed=True), as "
            f"{kind} is, got a {type(module).__name__} that is not"
        )
    return module(rows, plan, packed=True)


def _takes_plan(module: nn.Module) -> bool:
    if torch.compiler.is_compiling():
        return True  # the call itself raises
    try:
        inspect.signature(module.forward).bind(None, None, packed=True)
    except TypeError:
        return False
    return True


def without_inert(out: Tensor, plan: RoutePlan) -> Tensor:
    """Packed rows with zeros in the inert ones, where there may be some."""
    if sum(plan.row_counts) == plan.capacity:
        return out
    return out.masked_fill((plan.modality == len(plan.modalities))[:, None], 0)


def require_list(experts: Sequence[nn.Module], what: str) -> None:
    """Raise unless there is a list of modules, one at least."""
    if not isinstance(experts, Sequence | nn.ModuleList | nn.Sequential) or isinstance(experts, str):
        raise ValueError(f"{what}: expected a list with one module for each modality, got a {type(experts).__name__}")
    require(len(experts) > 0, f"{what}: expected at least one expert, got none")
    for m, expert in enumerate(experts):
        if not isinstance(expert, nn.Module):
            raise ValueError(f"{what}: expected modules, got {describe(expert)} as expert {m}")


def parameter_list(experts: Sequence[nn.Module], name: str, what: str) -> nn.ParameterList | None:
    """The parameter of a name of each expert, the very ones and of one shape, dtype and device; None where none has it.

    Raises:
        ValueError: experts of which some lack it, or that differ.
    """
    found = [getattr(expert, name, None) for expert in experts]
    if all(parameter is None for parameter in found):
        return None
    first = found[0]
    for m, parameter in enumerate(found):
        if not isinstance(parameter, nn.Parameter) or not isinstance(first, nn.Parameter):
            raise ValueError(f"{what}: expected a parameter {name!r} in all experts or in none, got one in some")
        same = parameter.shape == first.shape and parameter.dtype == first.dtype and parameter.device == first.device
        if not same:
            raise ValueError(
                f"{what}: expected experts of one width, dtype and device, got a {name} {describe(first)} in expert 0 "
                f"and {describe(parameter)} in expert {m}"
            )
    return nn.ParameterList(found)


def listed(parameters: nn.ParameterList) -> list[Tensor]:
    """The tensors of a parameter list; past its item access, which takes the host longer than some of the ops.

    Raises:
        ValueError: a list with hooks, as of ``torch.nn.utils.prune`` or the old weight_norm: a list is never called.
    """
    if parameters._forward_pre_hooks:
        raise ValueError(
            "weight, bias: expected experts' parameters without hooks, which a list never calls, got one with; make it "
            "permanent, as prune.remove does, or take torch.nn.utils.parametrizations"
        )
    if type(parameters) is nn.ParameterList:
        own, names = parameters._parameters, [str(m) for m in range(len(parameters))]
        if all([name in own for name in names]):  # whose order is that of the last assignments
            return [own[name] for name in names]  # type: ignore[misc]  # a list has no empty place
    return [*parameters]  # parametrisations, and what shards a model, put plain tensors in their place


def require_plain(experts: Sequence[nn.Module], kind: type[Kind], what: str) -> list[Kind]:
    """The experts; raise unless there is one, and each is of a kind of torch's own, with its own weights, unwatched."""
    plain: list[Kind] = []
    require_list(experts, what)
    for m, expert in enumerate(experts):
        if not is_plain(expert, kind):
            got = type(expert).__name__
            got = f"a {got} with hooks, a forward or weights of its own" if got == kind.__name__ else f"a {got}"
            raise ValueError(f"{what}: expected a plain nn.{kind.__name__} of each modality, got {got} as expert {m}")
        plain.append(expert)
    return plain


def modules_at(experts: Sequence[nn.Module], name: str | Sequence[nn.Module], what: str) -> list[nn.Module]:
    """The module of a name in each expert, or the modules that are given; raise where an expert has none."""
    if not isinstance(name, str):
        require_list(name, what)
        require(len(name) == len(experts), f"{what}: expected one of each of {len(experts)} experts, got {len(name)}")
        return [*name]
    found = []
    for m, expert in enumerate(experts):
        try:
            found.append(expert.get_submodule(name))
        except AttributeError:
            there = [inner for inner, _ in expert.named_modules() if inner]
            raise ValueError(f"{what}: expected one of {there} of expert {m}, got {name!r}") from None
    return found


def refuse_what_is_left(
    experts: Sequence[nn.Module], found: Mapping[str, Sequence[nn.Module]], activation: str
) -> None:
    """Raise where an expert has parameters, or a module that computes something, that no module of ``found`` has."""
    for m, expert in enumerate(experts):
        named = [modules[m] for modules in found.values()]
        taken = {id(parameter) for module in named for parameter in module.parameters()}
        left = [name for name, parameter in expert.named_parameters() if id(parameter) not in taken]
        require(not left, f"experts: expected names for all parameters of expert {m}, got none for {left}")
        refuse_unread(expert, named, f"expert {m}", "experts", activation)


def refuse_unread(
    expert: nn.Module, read: Sequence[nn.Module], title: str, what: str, activation: str | None = None
) -> None:
    """Raise where an expert has hooks, dropout or another computing module of torch's outside the modules ``read``.

    What a class of the model's own computes only its author can tell, as of the expert itself: such a one is taken.
    """
    known = {id(inner) for module in read for inner in module.modules()}
    for name, module in expert.named_modules():
        if id(module) in known:
            continue
        place = f"{name!r} of {title}" if name else title
        require(not is_watched(module), f"{what}: expected none with hooks, which are not called, got {place} with")
        if isinstance(module, nn.modules.dropout._DropoutNd):
            require(
                not module.p,
                f"{what}: expected none with dropout, which is not computed here, got {place} with {module.p}; set its "
                "p to 0 and apply dropout to the result",
            )
        elif name and _computes(module) and _activation(module) != activation:
            besides = f" and the activation {activation!r}" if activation else ""
            raise ValueError(
                f"{what}: expected nothing but what is named{besides} to be computed, got {place}, a "
                f"{' '.join(repr(module).split())}; take it out if nothing calls it"
            )


# A bare Module is a place for others.
_COMPUTE_NOTHING = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)


def _computes(module: nn.Module) -> bool:
    return is_of_torch(module) and type(module) not in _COMPUTE_NOTHING


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module is of a class of ``torch.nn``, so that what it computes is known."""
    return type(module).__module__.startswith("torch.nn.modules.")


def _activation(module: nn.Module) -> str:
    """The name of the activation that a module computes; empty for any other."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "silu" if type(module) is nn.SiLU else "relu" if type(module) is nn.ReLU else ""


def on_meta(build: Callable[[], Kind]) -> Kind:
    """A module without memory, whose parameters are put in afterwards."""
    with torch.device("meta"):
        return build()
