"""Forbid whatever makes the host wait for a device, without a device.

Tensors are fake ones on the meta device (autograd on fake CUDA tensors needs a build of torch with CUDA). Reading a
value, or a size that depends on values, raises there by itself; a copy to the host does not, so it is refused here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")


class HostCopyError(RuntimeError):
    """A tensor on the device was copied to the host."""


SYNCHRONIZED = (DataDependentOutputException, DynamicOutputShapeException, HostCopyError)


class _NoHostCopy(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if function.overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.device == DEVICE and result.device != DEVICE:
                raise HostCopyError(f"{function} copies from the device to the host")
        return result


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """Raise one of ``SYNCHRONIZED`` where code inside would make the host wait for ``DEVICE``."""
    with FakeTensorMode(allow_non_fake_inputs=True), _NoHostCopy():
        yield
