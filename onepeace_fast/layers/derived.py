"""Buffers that follow from a module's arguments alone, which no checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


class DerivedBuffers(nn.Module):
    """A module some of whose buffers are made again where their memory is new, as after to_empty."""

    _makers: Mapping[str, Callable[[], Tensor]] = {}

    def add_derived(self, name: str, make: Callable[[], Tensor]) -> None:
        """Register what ``make`` gives; a floating point tensor in the default dtype. On meta it stays on the CPU."""
        value, device = make(), torch.get_default_device()
        value = value.to(torch.get_default_dtype()) if value.is_floating_point() else value
        self.register_buffer(name, value if device.type == "meta" else value.to(device), persistent=False)
        self._makers = {**self._makers, name: make}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self._makers}
        super()._apply(fn, recurse)
        for name, make in self._makers.items():
            value = self._buffers[name]
            # What fn gives back as it is has its values: a dtype kept, memory that is shared.
            if value is not before[name] and value is not None and not (value.is_meta or isinstance(value, FakeTensor)):
                self._buffers[name] = make().to(value.device, value.dtype)
        return self
