"""Compile every kernel for GPUs that need not be there, as each launch would be compiled, and hold it to its limits.

    python -m tools.compile_kernels [--all] [--workers N] [--width N] [--gpu sm_NN] [--only rows|products]

Each launch of the heuristic and each tile is compiled in each form of ``onepeace_fast.hardware.cases``, through the
operations themselves; nothing is launched. Left to itself it compiles the kernels over rows for sm_80 and sm_90, since
their launches are the same everywhere, and the matrix products for every GPU that tiles are chosen for. A fault is a
spill, more registers or shared memory than a program may have, an access to a row tensor of a width that is divisible
by 16 which is not 16 bytes wide, a loop over rows that should copy rows ahead and does not, or a matrix product without
the chip's own instructions for it (from sm_90 on, loads by descriptors too). What the tiles of the matrix products come
to at one batch is printed as well. This needs a process of its own: Triton's interpreter compiles nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

WIDTHS = (256, 384, 768, 1536, 3072, 6144)  # one in each width class
ROW_GPUS = ("sm_80", "sm_90")
PRODUCT_WIDTHS = (768, 1536)  # the tiles of matrix products are the same for all; other GPUs compile the first
PARTS = ("rows", "products")
ROWS = 9500  # a batch of 32 pairs: enough for as many programs as a launch may have
FULL_ACCESS = 16
HEADINGS = ("kernel", "GPU", "width", "compiled", "registers", "shared", "programs/SM", "B/element", "faults")


class Result(NamedTuple):
    """One compiled configuration."""

    key: str
    kernel: str
    architecture: str
    width: int
    form: str
    warps: int
    registers: int
    shared: int
    programs: int
    bytes_per_element: int
    faults: tuple[str, ...]

    @property
    def row(self) -> tuple[str, ...]:
        """As a row of the table, but for its last cells."""
        figures = (self.registers, self.shared, self.programs, self.bytes_per_element)
        return (self.kernel, self.architecture, str(self.width), *map(str, figures))


@contextlib.contextmanager
def target(capability: int) -> Iterator[None]:
    """Let Triton believe that this GPU is there; only what needs no GPU works inside."""
    from triton.runtime.driver import driver

    from onepeace_fast.hardware.warmup import stand_in

    kept = "_active" if hasattr(driver, "_active") else "active"  # Triton 3.4
    before = getattr(driver, kept)
    driver.set_active(stand_in(capability))
    try:
        yield
    finally:
        setattr(driver, kept, before)


def inspect(configuration: Any, architecture: str, width: int, rows: int = ROWS) -> Result:
    """Compile a configuration for an architecture as its launch would be, and find its faults."""
    from torch import Tensor

    from tools.cubin import CHIPS, accesses, bytes_per_element, missing_instructions, pointer_parameters, usage

    chip, warps = CHIPS[architecture], configuration.num_warps
    with target(chip.capability):
        compiled = configuration.kernel.warmup(grid=(1,), **configuration.keywords)
    found = accesses(compiled.asm["ptx"], pointer_parameters(compiled))
    tensors = {name: value for name, value in configuration.arguments.items() if isinstance(value, Tensor)}
    sizes = {name: t.element_size() for name, t in tensors.items() if _is_row_tensor(t, rows, width)}
    used = usage(compiled)
    return Result(
        f"{architecture} {compiled.hash}", configuration.kernel.__name__, architecture, width,
        configuration.name, warps, used.registers, used.shared,
        chip.programs_at_once(used.registers, used.shared, warps), bytes_per_element(found, sizes),
        (
            *_faults(chip, used, warps, found, sizes),
            *_waits(configuration, compiled.asm["ptx"], found, sizes),
            *(f"no {name} in a matrix product" for name in missing_instructions(compiled, architecture)),
        ),
    )  # fmt: skip


def _waits(configuration: Any, ptx: str, found: Sequence[Any], sizes: dict[str, int]) -> Iterator[str]:
    """Where a loop of several stages waits for the row that it has just asked for."""
    if configuration.constants.get("STAGES", 1) > 1:
        for tensor in sorted({tensor for kind, tensor, _ in found if kind == "load" and tensor in sizes}):
            yield f"load of {tensor}: not copied ahead"
        if not re.search(r"cp\.async\.wait_group\s+[1-9]", ptx):
            yield "no copy is under way while a row is computed"


def _is_row_tensor(tensor: Any, rows: int, width: int) -> bool:
    """Whether a tensor has a row for each token of the batch, or of the part of it that DropPath keeps."""
    from onepeace_fast.hardware.cases import HIDDEN_FACTOR

    is_wide = width > 1 and tensor.dim() == 2 and tensor.shape[1] in (width, HIDDEN_FACTOR * width)
    return is_wide and 2 * tensor.shape[0] > rows


def _faults(chip: Any, used: Any, warps: int, found: Sequence[Any], sizes: dict[str, int]) -> Iterator[str]:
    if used.local:
        yield f"spills: {used.local} bytes of local memory"
    registers = used.registers * 32 * warps
    if used.registers > chip.registers_of_thread or registers > chip.registers:
        yield f"registers: {used.registers} for each of {32 * warps} threads"
    if 32 * warps > chip.threads_of_program:
        yield f"threads: {32 * warps}, of at most {chip.threads_of_program}"
    if used.shared > chip.shared_of_program:
        yield f"shared memory: {used.shared} bytes, of at most {chip.shared_of_program}"
    if any(access.tensor == "?" for access in found):
        yield "an access whose tensor cannot be told"
    for kind, tensor, width in sorted(set(found)):
        if tensor in sizes and width < FULL_ACCESS:
            yield f"{kind} of {tensor}: {width} bytes wide, not {FULL_ACCESS}"


def configurations(architecture: str, width: int, dtype: Any, parts: Sequence[str] = PARTS) -> list[Any]:
    """What the operations of these parts would launch on a GPU of this architecture, forward and backward."""
    import torch

    from onepeace_fast.hardware.cases import empty_tensors, kernel_cases, product_cases
    from onepeace_fast.kernels.launch import recording
    from onepeace_fast.ops.kernel_choice import force_kernels
    from tools.cubin import CHIPS

    cpu = torch.device("cpu")
    chip = recording(architecture, CHIPS[architecture].multiprocessors)
    with force_kernels(True), _no_vendor_products(), chip as found:
        cases = [*kernel_cases(ROWS, width, dtype, empty_tensors(cpu), cpu)] if "rows" in parts else []
        if "products" in parts:
            cases += product_cases(ROWS, width, dtype, empty_tensors(cpu), cpu)
        for case in cases:
            outputs = case.outputs()
            case.gradients(outputs, [torch.empty_like(output) for output in outputs])
    return found


@contextlib.contextmanager
def _no_vendor_products() -> Iterator[None]:
    """Leave the vendor's products out, which take a CPU minutes: nobody looks at what they give."""
    import torch

    def mm(left: Any, right: Any, out: Any = None) -> Any:
        return left.new_empty(left.shape[0], right.shape[1]) if out is None else out

    def addmm(added: Any, left: Any, right: Any, out: Any = None) -> Any:
        return mm(left, right, out)

    with mock.patch.multiple(torch, mm=mm, addmm=addmm):
        yield


class Job(NamedTuple):
    """What one process compiles."""

    architecture: str
    width: int
    dtype: str
    part: str


def work(job: Job) -> list[Result]:
    """Compile one part at one width of one dtype for one architecture."""
    import torch

    torch.set_num_threads(1)
    results: dict[str, Result] = {}
    for configuration in configurations(job.architecture, job.width, getattr(torch, job.dtype), (job.part,)):
        result = inspect(configuration, job.architecture, job.width)
        results.setdefault(result.key, result)
    return list(results.values())


def jobs(widths: Sequence[int] = WIDTHS, gpus: Sequence[str] = (), parts: Sequence[str] = PARTS) -> list[Job]:
    """What is compiled for the GPUs that are named, or without any for all of them.

    float16 is launched as bfloat16 is, and compiled at one width; the tensor cores multiply no float32.
    """
    from tools.cubin import CHIPS

    chosen = []
    for gpu in gpus or CHIPS:
        full = bool(gpus) or gpu in ROW_GPUS
        for width in reversed(widths):
            dtypes = ("bfloat16", "float32", "float16") if width == PRODUCT_WIDTHS[0] else ("bfloat16", "float32")
            for dtype in dtypes:
                if full and "rows" in parts:
                    chosen.append(Job(gpu, width, dtype, "rows"))
                compiled = width in PRODUCT_WIDTHS if full else width == PRODUCT_WIDTHS[0] and dtype == "bfloat16"
                if compiled and dtype != "float32" and "products" in parts:
                    chosen.append(Job(gpu, width, dtype, "products"))
    return chosen


def compile_all(workers: int, chosen: Sequence[Job]) -> list[Result]:
    """Every configuration of the jobs once, compiled by other processes into a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            found = {result.key: result for part in pool.imap_unordered(work, chosen) for result in part}
    return sorted(found.values(), key=lambda result: (result.kernel, result.architecture, result.width, result.form))


def table(results: Sequence[Result], every: bool) -> list[tuple[str, ...]]:
    """Rows of text: each configuration, or of each kernel, architecture and width the one with most registers."""
    if every:
        return [
            (*HEADINGS[:3], *HEADINGS[4:], "form"),
            *((*result.row, "; ".join(result.faults) or "none", result.form) for result in results),
        ]
    groups: dict[tuple[str, str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.kernel, result.architecture, result.width), []).append(result)
    rows = [HEADINGS]
    for group in groups.values():
        most = max(group, key=lambda result: (result.registers, result.shared)).row
        faults = sum(len(result.faults) for result in group)
        rows.append((*most[:3], str(len(group)), *most[3:], str(faults) if faults else "none"))
    return rows


def report(results: Sequence[Result], gpus: Sequence[str], every: bool = False) -> int:
    """Print the table, each fault, and one line; returns the exit code, 1 also where a GPU has no configuration."""
    from onepeace_fast.info import format_table
    from tools.products import COUNTS, rows

    print(format_table(table(results, every), indent=""))
    print(f"\nMatrix products of the routed FFN at {sum(COUNTS)} rows, by their tiles:")
    print(format_table(list(rows(gpus)), indent=""))
    for result in results if not every else ():
        if result.faults:
            print(f"FAULT {result.architecture} width {result.width}, {result.form}: {'; '.join(result.faults)}")
    faults = sum(len(result.faults) for result in results)
    counts = {name: sum(result.architecture == name for result in results) for name in gpus}
    numbers = ", ".join(f"{name}: {count} configurations" for name, count in counts.items())
    print(f"{numbers}; {faults} faults")
    return 1 if faults or not all(counts.values()) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and return 0 where there is no fault."""
    from tools.cubin import CHIPS

    parser = argparse.ArgumentParser(prog="make kernels", description="Compile every kernel for GPUs of every kind.")
    parser.add_argument("--all", action="store_true", help="a row for every configuration")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--width", type=int, action="append", choices=WIDTHS, help="only rows of this width; repeat it")
    text = "only for this GPU, and every kernel for it; repeat it"
    parser.add_argument("--gpu", action="append", choices=CHIPS, help=text)
    parser.add_argument("--only", choices=PARTS, help="only the kernels over rows, or only the matrix products")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("make kernels: expected no TRITON_INTERPRET, got 1: the interpreter compiles nothing")
        return 2
    from onepeace_fast import kernels

    if (reason := kernels.unavailable_reason()) is not None:
        print(f"make kernels: {reason}")
        return 2
    chosen = jobs(options.width or WIDTHS, options.gpu or (), (options.only,) if options.only else PARTS)
    if not chosen:
        print(f"make kernels: expected a width of {PRODUCT_WIDTHS} for matrix products, got {options.width}")
        return 2
    gpus = list(dict.fromkeys(job.architecture for job in chosen))
    return report(compile_all(options.workers, chosen), gpus, options.all)


if __name__ == "__main__":
    sys.exit(main())
