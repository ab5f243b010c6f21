"""Launching kernels: parameters measured before or by a rule, never tuned on first use; one function that launches."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast.kernels.launch_heuristic import Parameters
from onepeace_fast.kernels.launch_parameters import launch_parameters
from onepeace_fast.kernels.measured import gpu_name

_asking = threading.Lock()  # one thread at a time replaces Triton's hook and puts it back
INTERPRETER = ("sm_90", 4)  # architecture and multiprocessors where there is no GPU


class Configuration(NamedTuple):
    """A kernel and all that it is launched with, by the names of its parameters; of one that is recorded the grid."""

    kernel: Any
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    max_registers: int | None = None
    num_stages: int | None = None
    grid: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The kernel's name and what tells this configuration from its others."""
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        dtypes = " ".join(f"{name}:{str(value.dtype).removeprefix('torch.')}" for name, value in tensors.items())
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        stages = "" if self.num_stages is None else f" num_stages={self.num_stages}"
        return f"{self.kernel.__name__} {dtypes} {constants} num_warps={self.num_warps}{stages}"

    @property
    def keywords(self) -> dict[str, Any]:
        """What the kernel is called with; FP fusion is set since Triton's default for it depends on the version."""
        options = {"num_warps": self.num_warps, "maxnreg": self.max_registers, "enable_fp_fusion": True}
        if self.num_stages is not None:
            options["num_stages"] = self.num_stages
        return {**self.arguments, **self.constants, **options}

    def launch(self, grid: tuple[int, ...]) -> None:
        """Launch a grid of programs on the device and the current stream of the first tensor.

        Raises:
            RuntimeError: inside the capture of a graph, which takes no compiling, and Triton holds no such kernel yet.
        """
        device = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(device):
            if device.is_cuda and torch.cuda.is_current_stream_capturing() and not self.is_loaded():
                raise RuntimeError(
                    f"{self.kernel.__name__}: expected a warm-up call before the capture, got the first call with such "
                    "arguments inside it; run the step once on a side stream, then capture it"
                )
            # A context of its own: autograd's threads see no allocator set elsewhere, and the caller's own one stays.
            contextvars.copy_context().run(self._launch_here, grid)

    def is_loaded(self) -> bool:
        """Whether Triton holds the kernel compiled for these arguments and loaded; nothing is compiled."""
        from triton import knobs

        thread = threading.get_ident()
        with _asking:
            before = knobs.runtime.jit_cache_hook

            def compile_nothing(**details: Any) -> bool:
                return threading.get_ident() == thread or bool(before and before(**details))

            knobs.runtime.jit_cache_hook = compile_nothing
            try:
                compiled = self.kernel.warmup(grid=(1,), **self.keywords)
            finally:
                knobs.runtime.jit_cache_hook = before
        return compiled is not None and compiled.module is not None

    def _launch_here(self, grid: tuple[int, ...]) -> None:
        import triton

        triton.set_allocator(_workspace)
        self.kernel[grid](**self.keywords)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel puts the descriptors that it makes; the caching allocator aligns to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class _Recorder(NamedTuple):
    architecture: str
    multiprocessors: int
    configurations: list[Configuration]


_launched = 0
_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("onepeace_fast_recorder", default=None)


@contextlib.contextmanager
def recording(architecture: str, multiprocessors: int) -> Iterator[list[Configuration]]:
    """Collect what the launchers called inside would launch on such a GPU, and launch nothing.

    They may then be called with tensors on the meta device.
    """
    recorder = _Recorder(architecture, multiprocessors, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.configurations
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    num_warps: int,
    max_registers: int | None = None,
    num_stages: int | None = None,
) -> None:
    """Launch a kernel; every launch of this package comes through here."""
    configuration = Configuration(kernel, arguments, constants, num_warps, max_registers, num_stages)
    if (recorder := _recorder.get()) is not None:
        recorder.configurations.append(configuration._replace(grid=grid))
    else:
        global _launched
        _launched += 1
        configuration.launch(grid)


def launch_over_rows(
    kernel: Any, programs: int, arguments: Mapping[str, Any], parameters: Parameters, **constants: Any
) -> None:
    """Launch a kernel whose programs each walk over a share of the rows."""
    constants |= {
        "PARTS": parameters.parts, "BLOCK_ROWS": parameters.block_rows,
        "BLOCK_WIDTH": parameters.block_width // parameters.parts,
    }  # fmt: skip
    launch(kernel, (programs,), arguments, constants, parameters.num_warps, parameters.max_registers)


def stages(parameters: Parameters, *read: Tensor | None) -> int:
    """Stages of a loop over rows that reads these row tensors: 3 hold two rows ahead in shared memory, 1 holds none.

    Every GPU since sm_80 has 100 KB for the programs of a multiprocessor. A program of several rows at a time has too
    few registers for what copies them.
    """
    bytes_per_element = sum([tensor.element_size() for tensor in read if tensor is not None])
    held = 2 * parameters.block_width * bytes_per_element
    programs = parameters.programs_per_multiprocessor  # None: a program ends with its first rows
    return 3 if parameters.block_rows == 1 and programs is not None and programs * held <= 96 * 1024 else 1


def launched() -> int:
    """How many kernels this process has launched."""
    return _launched


@functools.cache
def _device_properties(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def architecture_and_multiprocessors(device: torch.device) -> tuple[str, int]:
    """What the launchers plan for on a device."""
    if (recorder := _recorder.get()) is not None:
        return recorder.architecture, recorder.multiprocessors
    return _device_properties(device.index) if device.type == "cuda" else INTERPRETER


def parameters_for(kernel: str, x: Tensor, rows: int) -> tuple[Parameters, int]:
    """The parameters of a kernel for row tensors like ``x``, and the number of programs for so many rows."""
    _, multiprocessors = architecture_and_multiprocessors(x.device)
    name = gpu_name(x.device) if _recorder.get() is None else ""
    parameters = launch_parameters(kernel, name, x.element_size(), x.shape[1])
    blocks = cdiv(rows, parameters.block_rows)
    resident = multiprocessors * (parameters.programs_per_multiprocessor or blocks)
    return parameters, max(1, min(blocks, resident))


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient rounded up; Triton's own function takes the host ten times as long."""
    return -(-dividend // divisor)


def unit_columns(x: Tensor | None) -> Tensor | None:
    """``x`` itself where its columns lie side by side, whatever the distance of its rows, else a copy that does."""
    return x if x is None or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def compact(x: Tensor | None) -> Tensor | None:
    """A tensor whose elements lie side by side, None where there is none."""
    return None if x is None else x.contiguous()
