"""This library's own model, where it was asked for the reference backend."""

from __future__ import annotations

from torch import nn

from onepeace_fast.fusion.family import Fusion, Refusal
from onepeace_fast.models.stack import Stack


class OwnModel(Fusion):
    """An encoder or decoder of this library: its backend is then the automatic one."""

    family = "onepeace_fast"

    def __init__(self, root: Stack) -> None:
        if root.backend != "reference":
            raise Refusal(f"backend: expected 'reference', which fuse changes, got {root.backend!r}")
        super().__init__(root)

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return isinstance(module, Stack)

    def install(self) -> None:
        super().install()
        self.root.backend = None  # type: ignore[assignment]  # a stack's attribute

    def remove(self) -> None:
        if self.is_installed:
            self.root.backend = "reference"  # type: ignore[assignment]
        super().remove()
