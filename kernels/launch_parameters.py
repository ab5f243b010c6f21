"""The launch parameters in force: those that were measured on this GPU, else the heuristic's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from onepeace_fast.kernels.launch_heuristic import Parameters, heuristic
from onepeace_fast.kernels.measured import measured_for

_used_instead: dict[str, Parameters] = {}


@functools.cache
def launch_parameters(kernel: str, gpu_name: str, element_size: int, width: int) -> Parameters:
    """The parameters of a kernel on a GPU for rows of this width of elements of so many bytes; "" is no known GPU."""
    if kernel in _used_instead:
        return _used_instead[kernel]
    measured = measured_for(gpu_name)
    return (measured and measured.parameters(kernel, element_size, width)) or heuristic(kernel, width)


@contextlib.contextmanager
def use_launch_parameters(kernel: str, parameters: Parameters) -> Iterator[None]:
    """Launch a kernel by other parameters inside, whatever its rows."""
    before = _used_instead.copy()
    _used_instead[kernel] = parameters
    launch_parameters.cache_clear()
    try:
        yield
    finally:
        _used_instead.clear()
        _used_instead.update(before)
        launch_parameters.cache_clear()
