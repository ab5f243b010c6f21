"""What stands in a module's __dict__ for one of its methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Replacement:
    """One method of one module instance, computed by a fusion; the class and all other instances stay as they are.

    An object and not a function, so that a deep copy and a pickle of the model have their own, over their own modules.
    """

    def __init__(self, fusion: Any, module: nn.Module, method: str, call: str) -> None:
        self.fusion, self.module, self.method, self.call = fusion, module, method, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.fusion, self.call)(self, *args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own method, bound to the module."""
        return getattr(type(self.module), self.method).__get__(self.module)

    def install(self) -> None:
        """Put it in the place of the method."""
        self.module.__dict__[self.method] = self

    def remove(self) -> None:
        """Give the module its class's method back."""
        if self.module.__dict__.get(self.method) is self:
            del self.module.__dict__[self.method]
