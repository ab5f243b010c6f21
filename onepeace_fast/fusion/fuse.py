"""``fuse``: the fused computation inside a live model, with the model's own parameters, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

from onepeace_fast.checks import describe, require
from onepeace_fast.comparison import compare
from onepeace_fast.fusion.families import FAMILIES
from onepeace_fast.fusion.family import MARK, Fusion, Refusal
from onepeace_fast.fusion.report import PartReport, Refused, Report

# By name: their modules take seconds to import.
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


class FusedModel:
    """The handle of a model with fused parts, as ``fuse`` returns it.

    A copy or an unpickled model has fused parts of its own: ``FusedModel(copy)`` is their handle.

    Args:
        model: the model.
        refused: what ``fuse`` did not take.

    Raises:
        ValueError: no part of the model is fused.
    """

    def __init__(self, model: nn.Module, refused: tuple[Refused, ...] = ()) -> None:
        self.model, self.refused = model, refused
        self.parts = dict(_fused_parts(model))
        require(bool(self.parts), lambda: f"model: expected one with fused parts, got {type(model).__name__} with none")

    def undo(self) -> None:
        """Give the model its own computation back, bit for bit; parameters stay what training made of them."""
        for part in self.parts.values():
            part.remove()

    def report(self, batch: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None, **settings: Any) -> Report:
        """What is fused, what is not and why, and what the calls so far computed; printed, it is tables.

        Args:
            batch: arguments of the model as ``compare`` takes them. With them the report has the comparison of the
                model as it was with the fused one: time, memory, outputs, gradients.
            settings: keyword arguments of ``compare``.
        """
        gain = None
        if batch is not None:
            settings = {"names": ("before", "fused")} | settings
            gain = compare(MethodType(self._as_it_was, self.model), self.model, batch, **settings)
        parts = tuple(PartReport.of(path, part) for path, part in self.parts.items())
        return Report(parts, self.refused, gain)

    def _as_it_was(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fused = [part for part in self.parts.values() if part.is_installed]
        for part in fused:
            part.remove()
        try:
            return model(*args, **kwargs)
        finally:
            for part in fused:
                part.install()


def fuse(model: nn.Module) -> FusedModel:
    """Find what this library knows in a live model, and compute it the fused way from now on.

    The model keeps its parameters, names, state dict, optimizer and training loop: methods of module instances are
    replaced, and no class is changed. Padding is not computed, and each modality's experts run in one op. Fuse a model
    before it is compiled or wrapped (DDP, FSDP2, checkpoint_wrapper), and on the device or before it goes there.

    Every call looks whether it may be fused. What the ops do not know (dropout of attention, requested attention
    weights, a cache), and what was changed since (LoRA, hooks, quantised weights), runs as the model's own code; the
    report says so. ``docs/fuse.md`` has a recipe for each family.

    Args:
        model: the model, with parameters in memory.

    Returns:
        The handle, with ``undo`` and ``report``.

    Raises:
        ValueError: a model that is fused, compiled or wrapped already, or on meta; nothing in it that could be fused.
            One line each; the model is then as it was.
    """
    _require_live(model)
    parts: dict[str, Fusion] = {}
    refused: list[Refused] = []
    for path, module in model.named_modules():
        if any(path == taken or path.startswith(f"{taken}.") or not taken for taken in parts):
            continue
        for family in FAMILIES:
            if family.resembles(module):
                try:
                    parts[path] = family(module)
                    break
                except Refusal as reason:
                    refused.append(Refused(path, family.family, str(reason)))
    if not parts:
        raise ValueError(_nothing_known(model, refused))
    for part in parts.values():
        part.install()
    return FusedModel(model, tuple(refused))


def _fused_parts(model: nn.Module) -> Iterator[tuple[str, Fusion]]:
    for path, module in model.named_modules():
        if (part := module.__dict__.get(MARK)) is not None:
            yield path, part


def _require_live(model: nn.Module) -> None:
    require(isinstance(model, nn.Module), lambda: f"model: expected a torch.nn.Module, got {describe(model)}")
    for path, module in model.named_modules():
        name = path or "model"
        if MARK in module.__dict__:
            raise ValueError(
                f"{name}: expected a model that is not fused, got a fused part; FusedModel(model).undo() takes it back"
            )
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{name}: expected a module that is not compiled, got a compiled one; compile it after fuse"
            )
        if wrapper := next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in WRAPPERS), ""):
            raise ValueError(f"{name}: expected a model that is not wrapped, got {wrapper}; wrap it after fuse")
    for path, parameter in model.named_parameters():
        require(not parameter.is_meta, f"{path}: expected a parameter in memory, got one on meta; load the model first")


def _nothing_known(model: nn.Module, refused: list[Refused]) -> str:
    families = ", ".join(family.family for family in FAMILIES)
    if not refused:
        return f"model: expected a part of these families: {families}; got {type(model).__name__} with none of them"
    first = refused[0]
    more = f"; {len(refused) - 1} more parts were refused" if len(refused) > 1 else ""
    return f"{first.path or 'model'}: resembles {first.family}, but {first.reason}{more}"
