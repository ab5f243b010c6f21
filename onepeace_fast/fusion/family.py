"""What a family of models gives ``fuse``: one class, whose instances are fused parts of a live model.

To add a family, write a subclass of ``FusedCall`` in a file of families/ and name it in families/__init__.py:

- ``resembles`` says by structure, never by a class's name, whether a module may be of the family.
- ``__init__`` looks closely. It raises ``Refusal`` with one line where a look-alike computes something else, and
  replaces further methods, such as those of the layers.
- ``declines`` says why one call keeps the model's own computation: what it asks for that the ops do not know.
- ``forward`` computes the call the fused way and returns what the model's own method would.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from onepeace_fast.backend import requested_backend
from onepeace_fast.fusion.replacement import Refusal as Refusal
from onepeace_fast.fusion.replacement import Replacement
from onepeace_fast.fusion.structure import Structure
from onepeace_fast.models.choice import packing_pays

TOO_LITTLE_PADDING = "on a CPU, packing pays only with more padding; use_backend('fused') packs in any case"
ON_A_CPU = "on a CPU, routing saves memory but no time; use_backend('fused') fuses in any case"
UNKNOWN = "arguments: others than the fused computation knows"
BACKEND = "use_backend('reference') asks for it"
TRACED = "torch.export or torch.jit.trace: the program holds the model's own code"
TRANSFORMED = "torch.func or a forward-mode derivative: the ops have plain reverse mode"
REPLICATE = "_replicate_for_data_parallel"  # the method by which DataParallel copies a module
MARK = "_onepeace_fast_fusion"  # of a root's __dict__: its fusion


class Fusion(ABC):
    """One module of a live model that is computed the fused way, with its own parameters.

    Attributes:
        family: what the report calls the family.
        root: the module.
        calls: how many calls were fused, under an empty text, and how many were not, under the reason.
        padded_tokens, computed_tokens: of the fused calls: tokens with padding, and those that were computed.
    """

    family: ClassVar[str]

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.calls: Counter[str] = Counter()
        self.padded_tokens = self.computed_tokens = 0

    @staticmethod
    @abstractmethod
    def resembles(module: nn.Module) -> bool:
        """Whether a module has the parts of this family, by name and kind; quick, and True for look-alikes too."""

    def install(self) -> None:
        """Put the fused computation in the place of the model's own."""
        self.root.__dict__[MARK] = self

    @property
    def is_installed(self) -> bool:
        """Whether the module is computed by this fusion, and not its own way or by a later one."""
        return self.root.__dict__.get(MARK) is self

    def remove(self) -> None:
        """Give the model its own computation back, bit for bit; nothing where it has it, or a later fusion."""
        if self.is_installed:
            del self.root.__dict__[MARK]

    def count_tokens(self, padded: int, computed: int) -> None:
        """Add a fused call's tokens to what the report says."""
        self.padded_tokens += padded
        self.computed_tokens += computed


class FusedCall(Fusion):
    """A fusion that replaces the ``forward`` of its root, and other methods of modules below it.

    Args:
        root: the module.
        called, exchangeable, whole: modules below it that the fused computation calls, see ``Structure``.
        entry: the module below it whose ``forward`` is replaced instead of the root's own.

    Raises:
        Refusal: hooks and methods of an instance below the root, parameters that are tied within it.
    """

    calls_own_forward: ClassVar[bool] = False  # whether the fused computation calls the root's class's
    arguments_known: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        cls.arguments_known = inspect.signature(cls.declines)

    def __init__(
        self,
        root: nn.Module,
        called: Collection[nn.Module] = (),
        exchangeable: Collection[nn.Module] = (),
        whole: Collection[nn.Module] = (),
        entry: nn.Module | None = None,
    ) -> None:
        super().__init__(root)
        self.replacements = [Replacement(self, root if entry is None else entry, "forward", "call")]
        self.structure = Structure(root, called, exchangeable, whole, entry)
        if not self.calls_own_forward:
            self.structure.keep(type(self.replacements[0].module), "forward")
        if reason := self.structure.change() or self.structure.mixing():
            raise Refusal(reason)
        _refuse_tied(root)

    @property
    def unread(self) -> list[Replacement]:
        """Those whose original is not called by the fused computation."""
        return self.replacements[self.calls_own_forward :]

    @abstractmethod
    def declines(self, *args: Any, **kwargs: Any) -> str:
        """Why this call of the root keeps the model's own computation; an empty text where it is fused."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The root's call, fused: the same outputs in the same form."""

    def replace(self, module: nn.Module, method: str, call: str) -> None:
        """Let a method of a module below the root be ``self.call(replacement, *args, **kwargs)``.

        ``replacement.module`` is the module, ``replacement.original`` its own method.
        """
        self.replacements.append(Replacement(self, module, method, call))

    def call(self, replacement: Replacement, *args: Any, **kwargs: Any) -> Any:
        """The root's forward: fused, or where this call or a change of the model forbids it, the model's own."""
        if not self.is_installed:
            return replacement.original(*args, **kwargs)  # a wrapper that was put around it calls it still
        reason = self._declines(*args, **kwargs)
        if not reason:
            reason = self.structure.change() or next(filter(None, [one.change() for one in self.unread]), "")
        self.calls[reason] += 1
        return replacement.original(*args, **kwargs) if reason else self.forward(*args, **kwargs)

    def _declines(self, *args: Any, **kwargs: Any) -> str:
        if is_exported():
            return TRACED
        if is_transformed():
            return TRANSFORMED
        if requested_backend(None) == "reference":
            return BACKEND
        try:
            self.arguments_known.bind(self, *args, **kwargs)
        except TypeError:
            return UNKNOWN  # the model's own code names what is wrong, or takes it
        return self.declines(*args, **kwargs)

    def install(self) -> None:
        super().install()
        self.root.__dict__[REPLICATE] = refuse_replicas
        for replacement in self.replacements:
            replacement.install()

    def remove(self) -> None:
        if self.is_installed:
            self.root.__dict__.pop(REPLICATE, None)
        super().remove()
        for replacement in self.replacements:
            replacement.remove()


def refuse_replicas() -> None:
    """In the place of a method by which a module is replicated: a replica would compute with the module's parameters.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "model: expected a fused model on one device, got replicas of torch.nn.DataParallel; take "
        "DistributedDataParallel, or FusedModel(model).undo()"
    )


def is_exported() -> bool:
    """Whether a call is recorded as a program, which holds for other batches than this one."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Whether a call is one that the ops refuse: inside a transform of torch.func, or in forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def packing_is_chosen(x: Tensor, padded: int, packed: int, of_a_row: int) -> bool:
    """Whether a call packs its tokens: where ``use_backend`` asks, on a CPU where it pays, elsewhere always.

    Args:
        x: the tokens, for their device.
        padded, packed: rows of each.
        of_a_row: floating-point operations of the products of one row in one layer.
    """
    return x.device.type != "cpu" or requested_backend(None) == "fused" or packing_pays(padded, packed, of_a_row)


def routing_is_chosen(x: Tensor) -> str:
    """Why a call whose tokens the model routes itself, without padding, is not fused; an empty text where it is.

    A GPU fuses. A CPU does where ``use_backend`` asks: on an AMD EPYC the ops took up to a third longer
    than the modules with few tokens and as long with many, and kept 0.53 to 0.83 of the memory for the backward pass.
    """
    return ON_A_CPU if x.device.type == "cpu" and requested_backend(None) != "fused" else ""


def _refuse_tied(root: nn.Module) -> None:
    names: dict[int, str] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise Refusal(f"{name}: expected a parameter of its own, got one tied to {first}")
