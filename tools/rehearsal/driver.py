"""Triton's own compiler, ptxas and launcher over the driver of ``libcuda.c``: all of a launch but its execution."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tools.cubin import CHIPS
from tools.rehearsal import native
from tools.rehearsal.cuda_calls import MULTIPROCESSORS

# Bytes of shared memory that one block may ask for, by architecture.
MOST_SHARED = {name: chip.shared_of_program for name, chip in CHIPS.items()}
MOST_SHARED |= {"sm_87": MOST_SHARED["sm_80"], "sm_103": MOST_SHARED["sm_100"]}


class Driver:
    """The driver of one emulated GPU, and what Triton compiled for it and launched on it.

    With ``compiling`` False Triton goes as far as choosing the program that a launch needs, and neither compiles nor
    launches it: cheap, and the compiles are counted all the same.

    ``programs`` has what Triton needs: each by its key, with the kernel's name. They are counted whether they were
    compiled now or found in Triton's cache: as many compiles as an empty cache costs. ``seconds`` is what those took
    that were compiled now.
    """

    def __init__(self, architecture: str = "sm_90", compiling: bool = True) -> None:
        if architecture not in MOST_SHARED:
            raise ValueError(f"architecture: expected one of {', '.join(MOST_SHARED)}, got {architecture!r}")
        folder = native.build_folder()
        self.architecture, self.compiling = architecture, compiling
        self.library = ctypes.CDLL(str(native.libcuda(folder)), mode=ctypes.RTLD_GLOBAL)  # what links it finds this one
        self.library.rehearsal_launches.restype = ctypes.c_ulong
        digits = architecture.removeprefix("sm_")
        self.capability = int(digits[:-1]), int(digits[-1])
        self.library.rehearsal_device(*self.capability, MULTIPROCESSORS, MOST_SHARED[architecture])
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton_cache"))
        self.programs: dict[str, str] = {}
        self.seconds = 0.0

    def log(self, path: Path | None) -> None:
        """Append a line for each launch to a file: kernel, grid, threads of a block, bytes of shared memory."""
        self.library.rehearsal_log(None if path is None else str(path).encode())

    @property
    def launches(self) -> int:
        """How many launches the driver accepted."""
        return self.library.rehearsal_launches()

    @property
    def compiled(self) -> Counter[str]:
        """How many programs each kernel needed."""
        return Counter(self.programs.values())

    def activate(self) -> None:
        """Let Triton compile for this GPU and launch on it from now on, in this process."""
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia import driver as nvidia

        capability, target = self.capability, GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

        class Emulated(nvidia.CudaDriver):
            def __init__(self) -> None:
                self.utils = nvidia.CudaUtils()
                self.launcher_cls = nvidia.CudaLauncher
                self.get_current_device = lambda: 0
                self.set_current_device = lambda device: None
                self.get_current_stream = lambda device: 0
                self.get_device_capability = lambda device=0: capability

            def get_current_target(self) -> GPUTarget:
                return target

        def needed(*, key: Any, fn: Any, **_: Any) -> bool:
            self.programs[f"{fn.module}.{fn.name} {key}"] = fn.name
            return not self.compiling  # True: Triton leaves it at that

        def compiled(*, times: Any, cache_hit: bool, **_: Any) -> None:
            self.seconds += 0 if cache_hit else times.total / 1e6

        knobs.runtime.jit_cache_hook = needed
        knobs.compilation.listener = compiled
        triton.runtime.driver.set_active(Emulated())
