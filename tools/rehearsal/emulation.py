"""The emulated GPU as one context, to be entered before ``onepeace_fast.ops`` is imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tools.rehearsal import cuda_calls, native, two_devices
from tools.rehearsal.driver import Driver
from tools.rehearsal.two_devices import DeviceMixError, EmulatedTensor


@contextlib.contextmanager
def emulated_gpu(driver: Driver | None = None, architecture: str = "sm_90") -> Iterator[None]:
    """One GPU inside. Kernels are compiled and launched by ``driver``; without one their launches are only counted."""
    if "onepeace_fast.ops" in sys.modules:
        raise RuntimeError("emulated_gpu: expected to come before the import of onepeace_fast.ops, got it afterwards")
    if driver is not None:
        architecture = driver.architecture
        driver.activate()
    native.install_device_guard(native.build_folder())
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_calls.answered(architecture))
        with two_devices.noting_implementations():
            import onepeace_fast.ops  # noqa: F401
        stack.callback(_rehearse_launches(driver))
        stack.enter_context(cuda_calls.Autocast())
        stack.enter_context(two_devices.EmulatedDevice())
        # Some versions of torch keep the class of an emulated parameter: to the layers it is what a GPU's own would be.
        from onepeace_fast.layers import plain

        plain._PLAIN_TENSORS = (*plain._PLAIN_TENSORS, EmulatedTensor)
        yield


def _rehearse_launches(driver: Driver | None) -> Any:
    """Check every launch's tensors, count it, and hand it to the driver if there is one; return what undoes this."""
    from onepeace_fast import kernels

    if kernels.unavailable_reason() is not None:
        return lambda: None
    from onepeace_fast.kernels.launch import Configuration

    original = Configuration.launch

    def launch(configuration: Any, grid: tuple[int, ...]) -> None:
        for name, value in configuration.arguments.items():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and not isinstance(tensor, EmulatedTensor):
                    kernel = configuration.kernel.__name__
                    raise DeviceMixError(f"{kernel}: expected {name} on cuda:0, got a CPU tensor")
        two_devices.State.launches += 1
        if driver is not None:
            original(configuration, grid)

    Configuration.launch = launch
    return lambda: setattr(Configuration, "launch", original)
