"""Compile the CUDA sources for GPUs that need not be there, and hold every kernel to its limits.

    python -m tools.compile_cuda [--architectures sm_80,sm_90a]

A fault is a spill or local memory, more shared memory than the chip gives a thread block, fewer thread blocks on a
multiprocessor than the kernel is launched for, or a kernel of matrix products without matrix instructions. Compact ones
are for little shared memory beside the vectors, large ones for vectors that it does not hold; a launch has one of both
shapes. Below them: what the backward pass reads and writes, for each element of a matrix of
queries, beside the least possible.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from build_backend.cuda_toolkit import find_toolkit
from tools.cubin import CHIPS, Chip, cuobjdump

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# One of each kind, Hopper with the instructions of its own; what sm_86 gives a thread block, sm_89 gives too.
ARCHITECTURES = {"sm_90a" if name == "sm_90" else name: chip for name, chip in CHIPS.items() if name != "sm_86"}
HEAD_SIZES = ((32, 32), (64, 64), (96, 96), (128, 64), (128, 128))  # of keys and of values
PLANNED_ENTRIES = 143 + 961 + 1499  # vectors of 72 text tokens, a grid of 16 x 16 and 750 audio frames
PLANNED_ENTRIES_OF_CLS = 9
FEW_ENTRIES = 964  # of a grid of 16 x 16, where a compact thread block does not hold those
MANY_ENTRIES = 83**2  # of a grid of 42 x 42, which every thread block of the forward pass holds
LARGE_ENTRIES = 1 << 20
SUM_THREADS = 256
SHAPES = ((64, 257, 964), (32, 257, 964), (2, 1025, 3972), (16, 750, 1502))  # samples, tokens of each, entries
HEADS = 24
HEADINGS = ("kernel", "GPU", "registers", "local", "threads", "shared", "blocks/SM", "matrix instructions", "faults")
PLAN_ARGUMENTS = (ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64)
FORWARD_PLAN = ("is_compact", "is_large", "bias_capacity", "query_blocks")
BACKWARD_PLAN = ("is_compact", "is_large", "walk_key_blocks", "differences")


class Plan(ctypes.Structure):
    """``LaunchPlan`` of csrc/relative_bias_attention.h."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("threads", "thread_blocks_at_once", "shared_bytes"))


class ForwardPlan(ctypes.Structure):
    """``ForwardPlan`` of csrc/relative_bias_attention.h."""

    _fields_ = (("launch", Plan), *((name, ctypes.c_int32) for name in FORWARD_PLAN))


class BackwardPlan(ctypes.Structure):
    """``BackwardPlan`` of csrc/relative_bias_attention.h."""

    _fields_ = (("launch", Plan), *((name, ctypes.c_int32) for name in BACKWARD_PLAN))


def head_sizes(head_dim: int, value_dim: int) -> str:
    """As they are printed."""
    return str(head_dim) if value_dim in (0, head_dim) else f"{head_dim}/{value_dim}"


class Kernel(NamedTuple):
    """A kernel by its mangled name; 0 and False where it has no such parameter."""

    name: str
    dtype: str = ""
    head_dim: int = 0
    value_dim: int = 0
    compact: bool = False
    large: bool = False

    @property
    def label(self) -> str:
        """As it is printed."""
        sizes = head_sizes(self.head_dim, self.value_dim) if self.head_dim else ""
        parts = (self.name, self.dtype, sizes, self.compact and "compact", self.large and "large")
        return " ".join(filter(None, parts))


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


def compile_library(nvcc: Path, folder: Path, architectures: Sequence[str] = tuple(ARCHITECTURES)) -> Path:
    """All kernels for some architectures in one library, from an installation's objects where they are up to date."""
    targets = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in architectures]
    options = ["-std=c++17", "-O3", f"-I{CSRC}", *targets, "-Xcompiler", "-fPIC"]

    def compile_one(source: Path) -> Path:
        if (installed := installed_object(source, architectures)) is not None:
            return installed
        compiled = folder / f"{source.name}.o"
        subprocess.run(list(map(str, [nvcc, *options, "-c", source, "-o", compiled])), check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, sorted(CSRC.glob("*.cu"))))
    library = folder / "kernels.so"
    subprocess.run(list(map(str, [nvcc, "-shared", *objects, "-o", library])), check=True)
    return library


def installed_object(source: Path, architectures: Sequence[str]) -> Path | None:
    """What an editable installation compiled from a source, unless something changed since or an architecture lacks."""
    compiled = CSRC.parent / "build" / "cuda" / f"{source.name}.o"
    if not compiled.exists():
        return None
    if any(path.stat().st_mtime > compiled.stat().st_mtime for path in [*CSRC.glob("*.cu*"), *CSRC.glob("*.h")]):
        return None
    found = cuobjdump(compiled, "--list-elf")
    return compiled if all(f".{name}." in found for name in architectures) else None


def plan(library: ctypes.CDLL, kernel: Kernel, chip: Chip) -> tuple[Plan, bool]:
    """How a kernel is launched, and whether a chip launches it: of the larger backward kernel's shapes it takes one."""
    if kernel.name.startswith("attention_sum_"):
        return Plan(SUM_THREADS, 1, 0), True
    if kernel.name == "attention_backward_kernel":
        function, function.restype = library.relative_bias_attention_backward_plan, BackwardPlan
        entries = (PLANNED_ENTRIES + PLANNED_ENTRIES_OF_CLS, FEW_ENTRIES)
    else:
        function, function.restype = library.relative_bias_attention_forward_plan, ForwardPlan
        entries = (PLANNED_ENTRIES, MANY_ENTRIES)
    function.argtypes = PLAN_ARGUMENTS
    some = (LARGE_ENTRIES,) if kernel.large else entries
    limits = (chip.shared_of_program, *(other.shared_of_program for other in ARCHITECTURES.values()))
    for limit in limits:
        for entries in some:
            found = function(kernel.head_dim, kernel.value_dim, entries, limit)
            if (found.is_compact, found.is_large) == (kernel.compact, kernel.large):
                return found.launch, limit == chip.shared_of_program
    raise ValueError(f"no chip launches {kernel.label}")


def describe(symbol: str) -> Kernel:
    """What a mangled name says."""
    name, rest = re.search(r"\d([a-z][a-z_]*_kernel)(.*)", symbol).groups()
    found = re.match(r"I\d+(\w+?)Li(\d+)E(?:Li(\d+)E)?((?:Lb\dE)*)E", rest)
    if not found:
        return Kernel(name)
    flags = [flag == "1" for flag in re.findall(r"Lb(\d)E", found[4])]
    sizes = (int(found[2]), int(found[3] or 0))
    return Kernel(name, found[1].strip("_"), *sizes, flags[0] if len(flags) > 1 else False, any(flags[-1:]))


def moved(path: Path, chip: Chip) -> list[tuple[str, str, str, str]]:
    """Bytes that the backward pass moves for each element of a matrix of queries, and the least, as rows of a table."""
    function, rows = ctypes.CDLL(str(path)).relative_bias_attention_backward_bytes, []
    function.restype = ctypes.c_int64
    for samples, length, entries in SHAPES:
        for sizes in HEAD_SIZES:
            head_dim, value_dim = sizes
            elements = samples * length * HEADS * head_dim
            # q, k, v, the output's gradient and log-sum-exp in; dq, dk, dv out
            least = (2 * (4 * head_dim + 3 * value_dim) + 4) / head_dim
            limit = ctypes.c_int64(chip.shared_of_program)
            found = function(samples, length, HEADS, *sizes, entries, chip.multiprocessors, limit) / elements
            rows.append((f"{samples} x {length} tokens", head_sizes(*sizes), f"{found:.1f}", f"{least:.1f}"))
    return rows


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
        found, chip = describe(kernel), ARCHITECTURES[architecture]
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text).groups())
        planned, launched = plan(library, found, chip)
        warps, matrix, shared = planned.threads // 32, instructions[architecture, kernel], planned.shared_bytes
        at_once = chip.programs_at_once(registers, shared, warps)
        faults = [f"{stack + local} bytes of local memory"] if stack + local else []
        if launched and shared > chip.shared_of_program:
            faults.append(f"{shared} bytes of shared memory, of {chip.shared_of_program}")
        wanted = planned.thread_blocks_at_once
        faults += [f"planned for {wanted} at once"] if launched and at_once < wanted else []
        lacks = launched and not matrix and not found.name.startswith("attention_sum_")
        faults += ["no matrix instruction"] if lacks else []
        results.append(
            Result(
                found.label, architecture, registers, stack + local, planned.threads, shared,
                at_once if launched else 0, matrix, tuple(faults),
            )
        )  # fmt: skip
    return sorted(results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and return 0 where there is no fault; where there is no nvcc, say so and return 0."""
    from onepeace_fast.info import format_table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES), help="by default %(default)s")
    chosen = parser.parse_args(arguments).architectures.split(",")
    if unknown := [name for name in chosen if name not in ARCHITECTURES]:
        parser.error(f"--architectures: expected some of {','.join(ARCHITECTURES)}, got {','.join(unknown)}")
    toolkit = find_toolkit()
    if toolkit is None:
        print("CUDA kernels: not compiled, there is no nvcc; set CUDA_HOME, or put it on PATH")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(toolkit.nvcc, Path(folder), chosen)
        results, traffic = inspect(library), moved(library, ARCHITECTURES["sm_90a"])
    print(format_table([HEADINGS, *(result.row for result in results)], indent=""))
    print()
    print(format_table([("backward", "head size", "bytes/element", "least"), *traffic], indent=""))
    faults = sum(len(result.faults) for result in results)
    counts = ", ".join(
        f"{name}: {sum(result.architecture == name for result in results)} CUDA kernels" for name in chosen
    )
    print(f"{counts}; {faults} faults")
    return 1 if faults or not results else 0


if __name__ == "__main__":
    sys.exit(main())
