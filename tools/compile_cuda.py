"""Compile the CUDA sources for GPUs that need not be there, and hold every kernel to its limits.

    python -m tools.compile_cuda

A fault is a spill or local memory, fewer thread blocks on a multiprocessor than the kernel is launched for, or a kernel
of matrix products without matrix instructions. Large ones are for vectors that shared memory does not hold. Below them:
what the backward pass reads and writes, for each element of a matrix of queries, beside the least possible.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from build_backend.cuda_toolkit import find_toolkit
from tools.cubin import CHIPS, Chip

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = {"sm_80": "sm_80", "sm_90a": "sm_90"}  # and the chip of each
HEAD_SIZES = (32, 64, 128)
PLANNED_ENTRIES = 143 + 961 + 1499  # vectors of 72 text tokens, a grid of 16 x 16 and 750 audio frames
PLANNED_ENTRIES_OF_CLS = 9
LARGE_ENTRIES = 1 << 20
SUM_THREADS = 256
SHAPES = ((64, 257, 964), (32, 257, 964), (2, 1025, 3972), (16, 750, 1502))  # samples, tokens of each, entries
HEADS = 24
HEADINGS = ("kernel", "GPU", "registers", "local", "threads", "shared", "blocks/SM", "matrix instructions", "faults")


class Plan(ctypes.Structure):
    """``LaunchPlan`` of csrc/relative_bias_attention.h."""

    _fields_ = (("threads", ctypes.c_int32), ("blocks_at_once", ctypes.c_int32), ("shared_bytes", ctypes.c_int32))


class Result(NamedTuple):
    """One kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    local: int
    threads: int
    shared: int
    at_once: int
    matrix_instructions: int
    faults: tuple[str, ...]

    @property
    def row(self) -> tuple[str, ...]:
        """As a row of the table."""
        return (*map(str, self[:-1]), "; ".join(self.faults) or "none")


def compile_library(nvcc: Path, folder: Path) -> Path:
    """All kernels for all architectures in one library, from an installation's objects where they are up to date."""
    library = folder / "kernels.so"
    targets = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in ARCHITECTURES]
    options = ["-std=c++17", "-O3", f"-I{CSRC}", *targets, "--threads", "2", "-shared", "-Xcompiler", "-fPIC"]
    sources = [installed_object(source) or source for source in sorted(CSRC.glob("*.cu"))]
    subprocess.run(list(map(str, [nvcc, *options, *sources, "-o", library])), check=True)
    return library


def installed_object(source: Path) -> Path | None:
    """What an editable installation compiled from a source, unless something changed since or an architecture lacks."""
    compiled = CSRC.parent / "build" / "cuda" / f"{source.name}.o"
    if not compiled.exists():
        return None
    if any(path.stat().st_mtime > compiled.stat().st_mtime for path in [*CSRC.glob("*.cu*"), *CSRC.glob("*.h")]):
        return None
    found = cuobjdump(compiled, "--list-elf")
    return compiled if all(f".{name}." in found for name in ARCHITECTURES) else None


def plan(library: ctypes.CDLL, kernel: str, head_dim: int, large: bool) -> Plan:
    """How a kernel is launched."""
    if kernel.startswith("sum_"):
        return Plan(SUM_THREADS, 1, 0)
    direction, cls = ("backward", PLANNED_ENTRIES_OF_CLS) if kernel == "backward_kernel" else ("forward", 0)
    function = getattr(library, f"relative_bias_attention_{direction}_plan")
    function.restype, function.argtypes = Plan, (ctypes.c_int32, ctypes.c_int64)
    return function(head_dim, LARGE_ENTRIES if large else PLANNED_ENTRIES + cls)


def describe(symbol: str) -> tuple[str, str, int, bool]:
    """A mangled kernel's name, element type and head size, if it has them, and whether it is for large vectors."""
    name, rest = re.search(r"\d([a-z][a-z_]*_kernel)(.*)", symbol).groups()
    found = re.match(r"I\d+(\w+?)Li(\d+)E(?:Lb(\d)E)?E", rest)
    return (name, found[1].strip("_"), int(found[2]), found[3] == "1") if found else (name, "", 0, False)


def moved(path: Path, chip: Chip) -> list[tuple[str, str, str, str]]:
    """Bytes that the backward pass moves for each element of a matrix of queries, and the least, as rows of a table."""
    function, rows = ctypes.CDLL(str(path)).relative_bias_attention_backward_bytes, []
    function.restype = ctypes.c_int64
    for samples, length, entries in SHAPES:
        for head_dim in HEAD_SIZES:
            elements = samples * length * HEADS * head_dim
            least = 2 * (3 + 1 + 3) + 4 / head_dim  # q, k, v, the output's gradient and log-sum-exp in; dq, dk, dv out
            found = function(samples, length, HEADS, head_dim, entries, chip.multiprocessors) / elements
            rows.append((f"{samples} x {length} tokens", str(head_dim), f"{found:.1f}", f"{least:.1f}"))
    return rows


def cuobjdump(library: Path, *options: str) -> str:
    """Run the disassembler of Triton's wheel."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def by_architecture(output: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Split what cuobjdump prints: (architecture, kernel, its text) for each ``name`` that begins one."""
    architecture = ""
    for part in re.split(r"^(?=arch = )", output, flags=re.MULTILINE):
        if found := re.match(r"arch = (\w+)", part):
            architecture = found[1]
        for function in re.split(rf"^\s*(?={name})", part, flags=re.MULTILINE)[1:]:
            yield architecture, re.search(r"(_Z\w+)", function)[1], function


def inspect(path: Path) -> list[Result]:
    """Every kernel of a library."""
    library, results = ctypes.CDLL(str(path)), []
    instructions = {
        (architecture, kernel): len(re.findall(r"\bHMMA\.", text))
        for architecture, kernel, text in by_architecture(cuobjdump(path, "-sass"), "Function : ")
    }
    for architecture, kernel, text in by_architecture(cuobjdump(path, "--dump-resource-usage"), "Function "):
        name, dtype, head_dim, large = describe(kernel)
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text).groups())
        planned, chip = plan(library, name, head_dim, large), CHIPS[ARCHITECTURES[architecture]]
        warps, matrix = planned.threads // 32, instructions[architecture, kernel]
        at_once = chip.programs_at_once(registers, planned.shared_bytes, warps)
        faults = [f"{stack + local} bytes of local memory"] if stack + local else []
        faults += [f"planned for {planned.blocks_at_once} at once"] if at_once < planned.blocks_at_once else []
        faults += [] if matrix or name.startswith("sum_") else ["no matrix instruction"]
        label = " ".join(filter(None, (name, dtype, str(head_dim or ""), large and "large")))
        results.append(
            Result(
                label, architecture, registers, stack + local, planned.threads, planned.shared_bytes, at_once,
                matrix, tuple(faults),
            )
        )  # fmt: skip
    return sorted(results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and return 0 where there is no fault; where there is no nvcc, say so and return 0."""
    from onepeace_fast.info import format_table

    toolkit = find_toolkit()
    if toolkit is None:
        print("CUDA kernels: not compiled, there is no nvcc; set CUDA_HOME, or put it on PATH")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(toolkit.nvcc, Path(folder))
        results, traffic = inspect(library), moved(library, CHIPS["sm_90"])
    print(format_table([HEADINGS, *(result.row for result in results)], indent=""))
    print()
    print(format_table([("backward", "head size", "bytes/element", "least"), *traffic], indent=""))
    faults = sum(len(result.faults) for result in results)
    counts = ", ".join(
        f"{name}: {sum(result.architecture == name for result in results)} CUDA kernels" for name in ARCHITECTURES
    )
    print(f"{counts}; {faults} faults")
    return 1 if faults or not results else 0


if __name__ == "__main__":
    sys.exit(main())
