"""Compile the Triton kernels of all smoke checks, into Triton's cache, where a check would compile one by one.

    python3 -m tools.gpu_run.smoke_kernels

Each check's launches are recorded on this machine's GPU, with nothing launched, and compiled in processes side by side.
"""

from __future__ import annotations

import os
import sys

import torch

from onepeace_fast import kernels
from onepeace_fast.hardware.cases import empty_tensors
from onepeace_fast.hardware.warmup import MULTIPROCESSORS, Compiled, Kernel, compile_all, listed
from onepeace_fast.kernels.launch import recording
from tools.gpu_run.plan import LEFT_OUT, SMOKE
from tools.gpu_run.smoke import checks


def needed(device: torch.device, architecture: str) -> list[Kernel]:
    """Each kernel once that a smoke check launches, forward and backward; attention's are the CUDA extension's."""
    by_name = checks(full=device.type == "cuda")
    with recording(architecture, MULTIPROCESSORS) as configurations:
        for check in (by_name[name] for name in SMOKE if not name.startswith("attention")):
            for case in check.cases(empty_tensors(device), device):
                if check.holds(case):
                    outputs = case.outputs()
                    case.gradients(outputs, [torch.empty_like(output) for output in outputs])
    return listed(configurations)


def main() -> int:
    """Compile, and print a line for each kernel."""
    if (reason := kernels.unavailable_reason()) is not None:
        print(f"no kernel is compiled: {reason}", flush=True)
        return LEFT_OUT

    def progress(done: int, of: int, one: Compiled) -> None:
        print(f"{done} of {of}, {one.name}: {one.seconds:.1f} s{' (cached)' if one.cached else ''}", flush=True)

    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    jobs = max((os.cpu_count() or 1) // 2, 1)  # the extension and the benchmark's kernels compile meanwhile
    compile_all(needed(torch.device("cuda"), architecture), architecture, jobs, progress)
    return 0


if __name__ == "__main__":
    sys.exit(main())
