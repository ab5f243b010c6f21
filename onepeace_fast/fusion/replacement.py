"""What stands in a module's __dict__ for one of its methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Refusal(ValueError):
    """Why a module that resembles a family's is not taken: one line of what was expected and what came."""


class Replacement:
    """One method of one module instance, computed by a fusion; the class and all other instances stay as they are.

    An object and not a function, so that a deep copy and a pickle of the model have their own, over their own modules.

    Raises:
        Refusal: the instance has one of its own in the method's place.
    """

    def __init__(self, fusion: Any, module: nn.Module, method: str, call: str) -> None:
        self.fusion, self.module, self.method, self.call = fusion, module, method, call
        self.kind = type(module)
        self.was_there = True
        if method in module.__dict__:
            raise Refusal(
                f"{method}: expected that of the class {self.kind.__name__}, got one set on the instance; take it off, "
                "fuse, then put it on again"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.fusion, self.call)(self, *args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own method for the module; a bound one would be this object again in compiled code."""
        return partial(getattr(type(self.module), self.method), self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own: transformers' trainer and generation choose arguments by it."""
        return inspect.signature(self.original)

    def change(self) -> str:
        """Why the method is not what was replaced: the module is of another class now; an empty text where it is.

        A class that only adds to the other, as FSDP2's and parametrizations' do, has the same method.
        """
        kind = type(self.module)
        if kind is self.kind or getattr(kind, self.method) is getattr(self.kind, self.method):
            return ""
        return f"expected the {self.method} of {self.kind.__name__}, got that of {kind.__name__}"

    def install(self) -> None:
        """Put it in the place of the method, unless ``remove`` found another there: a wrapper that calls it."""
        if self.was_there:
            self.module.__dict__[self.method] = self

    def remove(self) -> None:
        """Give the module its class's method back."""
        self.was_there = self.module.__dict__.get(self.method) is self
        if self.was_there:
            del self.module.__dict__[self.method]
