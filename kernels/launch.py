"""Launching kernels: parameters from a table, never by tuning on first use, and one function that launches.

``launch_parameters.json`` holds, by kernel, GPU architecture, bytes of an element of the row tensors and width class,
what a launch is made of. A width belongs to the smallest class that holds it; an architecture without an entry takes
the nearest older one, else the oldest.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLE: dict = json.loads(Path(__file__).with_name("launch_parameters.json").read_text(encoding="utf-8"))
INTERPRETER = ("sm_90", 4)  # architecture and multiprocessors where there is no GPU


class Parameters(NamedTuple):
    """An entry of the table, and the width of the class it stands for.

    ``block_rows`` rows of ``block_width`` columns are in registers at a time, in ``parts`` of a power of two of columns
    each, so that a class may be 6144 wide; a launch has at most ``programs_per_multiprocessor`` programs for each
    multiprocessor, and each walks over its share of the rows; None: a program for every block of rows. ``held_in`` says
    where a program keeps the parameters and its sums over rows: in "registers", or in "memory" where rows are so wide
    that registers do not hold these as well. ``max_registers`` bounds a thread's registers, so that a multiprocessor
    holds more programs.
    """

    block_width: int
    block_rows: int
    num_warps: int
    programs_per_multiprocessor: int | None
    held_in: str = "registers"
    parts: int = 1
    max_registers: int | None = None


@dataclass(frozen=True)
class Configuration:
    """A kernel and all that it is launched with, by the names of its parameters."""

    kernel: Any
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    max_registers: int | None = None

    @property
    def name(self) -> str:
        """The kernel's name and what tells this configuration from its others."""
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        dtypes = " ".join(f"{name}:{str(value.dtype).removeprefix('torch.')}" for name, value in tensors.items())
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__} {dtypes} {constants} num_warps={self.num_warps}"

    @property
    def keywords(self) -> dict[str, Any]:
        """What the kernel is called with; FP fusion is set since Triton's default for it depends on the version."""
        options = {"num_warps": self.num_warps, "maxnreg": self.max_registers, "enable_fp_fusion": True}
        return {**self.arguments, **self.constants, **options}

    def launch(self, grid: tuple[int, ...]) -> None:
        """Launch a grid of programs on the device and the current stream of the first tensor."""
        device = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(device):
            self.kernel[grid](**self.keywords)


class _Recorder(NamedTuple):
    architecture: str
    configurations: list[Configuration]


_recorder: ContextVar[_Recorder | None] = ContextVar("onepeace_fast_recorder", default=None)


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Configuration]]:
    """Collect what the launchers called inside would launch on a GPU of this architecture, and launch nothing.

    They may then be called with tensors on the meta device.
    """
    recorder = _Recorder(architecture, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.configurations
    finally:
        _recorder.reset(token)


def width_classes(kernel: str, architecture: str, dtype: torch.dtype) -> list[int]:
    """The widest rows of every class that the table has for a kernel."""
    return [int(width) for width in _by_width(kernel, architecture, dtype.itemsize)]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    num_warps: int,
    max_registers: int | None = None,
) -> None:
    """Launch a kernel; every launch of this package comes through here."""
    configuration = Configuration(kernel, arguments, constants, num_warps, max_registers)
    if (recorder := _recorder.get()) is not None:
        recorder.configurations.append(configuration)
    else:
        configuration.launch(grid)


@functools.cache
def _device_properties(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def architecture_and_multiprocessors(device: torch.device) -> tuple[str, int]:
    """What the launchers plan for on a device."""
    if (recorder := _recorder.get()) is not None:
        return recorder.architecture, INTERPRETER[1]
    return _device_properties(device.index) if device.type == "cuda" else INTERPRETER


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


def _by_width(kernel: str, architecture: str, element_size: int) -> dict[str, dict]:
    known = sorted(TABLE[kernel], key=_number)
    older = [name for name in known if _number(name) <= _number(architecture)]
    return TABLE[kernel][older[-1] if older else known[0]][str(element_size)]


@functools.cache
def table_entry(kernel: str, architecture: str, element_size: int, width: int) -> Parameters:
    """The table's parameters of a kernel for rows of this width and these elements."""
    by_width = _by_width(kernel, architecture, element_size)
    block_width = min(int(block) for block in by_width if int(block) >= width)
    return Parameters(block_width, **by_width[str(block_width)])


def parameters_for(kernel: str, x: Tensor, rows: int) -> tuple[Parameters, int]:
    """The parameters of a kernel for row tensors like ``x``, and the number of programs for so many rows."""
    architecture, multiprocessors = architecture_and_multiprocessors(x.device)
    parameters = table_entry(kernel, architecture, x.element_size(), x.shape[1])
    blocks = -(-rows // parameters.block_rows)
    resident = multiprocessors * (parameters.programs_per_multiprocessor or blocks)
    return parameters, max(1, min(blocks, resident))


def unit_columns(x: Tensor) -> Tensor:
    """``x`` itself where its columns lie side by side, whatever the distance of its rows, else a copy that does."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def compact(x: Tensor | None) -> Tensor | None:
    """A tensor whose elements lie side by side, None where there is none."""
    return None if x is None else x.contiguous()
