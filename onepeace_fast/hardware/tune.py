"""What ``onepeace-fast tune`` does: time a few launch parameters of every kernel, and write the fastest down.

Candidates of an entry of the table are itself, half and twice its rows in a block, half and twice its warps, half and
twice its programs for each multiprocessor, and parameters and sums held in the other place. Each is timed by the median
device time of calls in turn, over inputs that together are several times the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast import kernels
from onepeace_fast.hardware.cases import Case, empty_tensors, kernel_cases, random_tensors
from onepeace_fast.kernels.launch import architecture_and_multiprocessors
from onepeace_fast.kernels.launch_table import SHIPPED, Table, measured_path, merged, use_table

ROWS = 9500  # a vision-language batch of 32
DTYPES = {"2": torch.bfloat16, "4": torch.float32}
MOST_WARPS, MOST_PROGRAMS = 32, 16
L2_MULTIPLE = 3
CALLS, ROUNDS = 5, 4
Entry = Mapping[str, Any]
Timer = Callable[[str, str, int, Table], float]


class Measurement(NamedTuple):
    """An entry of the table, its time, that of the shipped one, in seconds."""

    entry: Entry
    seconds: float
    shipped_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the measurement."""
    parser.add_argument("--output", type=Path, help="where to write the table (default: where the kernels look for it)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write the table.

    Returns:
        0: written. 2: there is no GPU, no Triton, no place to write, or a kernel does not run; a line says which.
    """
    if not torch.cuda.is_available():
        return _stop("tune needs a CUDA device, and torch sees none here")
    if (reason := kernels.unavailable_reason()) is not None:
        return _stop(f"tune needs Triton: {reason}")
    output = arguments.output or measured_path()
    architecture, _ = architecture_and_multiprocessors(torch.device("cuda", torch.cuda.current_device()))
    if output.is_dir():
        return _stop(f"--output: got the folder {output}, takes a file")
    draft = output.with_name(f"{output.name}.new")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()  # now rather than after minutes of measuring
        try:
            draft.write_text(json.dumps(measure(architecture, device_time), indent=1) + "\n", encoding="utf-8")
            draft.replace(output)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        return _stop(f"{error.filename or output}: {error.strerror or error}")
    except RuntimeError as error:
        return _stop(f"tune: {error}")
    print(f"{output} has the launch parameters of {architecture}; `onepeace-fast info` says which table is in force")
    return 0


def candidates(entry: Entry) -> Iterator[Entry]:
    """What is tried in place of an entry, itself first."""
    yield dict(entry)
    bounds = {"block_rows": 64, "num_warps": MOST_WARPS, "programs_per_multiprocessor": MOST_PROGRAMS}
    for name, most in bounds.items():
        if entry[name] is not None:
            yield from ({**entry, name: n} for n in (entry[name] // 2, entry[name] * 2) if 1 <= n <= most)
    yield {**entry, "held_in": "registers" if entry.get("held_in") == "memory" else "memory"}


def with_entry(table: Table, path: tuple[str, str, str, str], entry: Entry) -> Table:
    """A table with another entry at (kernel, architecture, bytes of an element, width class)."""
    kernel, architecture, size, width = path
    return merged(table, {kernel: {architecture: {size: {width: dict(entry)}}}})


def measure(architecture: str, time: Timer, say: Callable[[str], None] = print) -> Table:
    """The fastest candidate for every entry of the table on this architecture, in a table of that architecture alone.

    ``time`` gives the seconds of a kernel, for a size of elements and a width, by a table; a candidate that cannot be
    launched raises RuntimeError.
    """
    result: Table = {}
    for kernel, by_architecture in SHIPPED.items():
        by_size = next(iter(by_architecture.values()))
        for size, by_width in by_size.items():
            for width in by_width:
                path = (kernel, architecture, size, width)
                best = _fastest(path, time)
                result.setdefault(kernel, {}).setdefault(architecture, {}).setdefault(size, {})[width] = best.entry
                gain = best.shipped_seconds / best.seconds
                say(f"{kernel}, {size} bytes, width {width}: {1e6 * best.seconds:.1f} us, {gain:.2f}x, {best.entry}")
    return result


def _fastest(path: tuple[str, str, str, str], time: Timer) -> Measurement:
    kernel, architecture, size, width = path
    shipped = _shipped_entry(path)
    times: list[tuple[float, Entry]] = []
    for entry in candidates(shipped):
        try:
            times.append((time(kernel, size, int(width), with_entry(SHIPPED, path, entry)), entry))
        except RuntimeError as error:
            if not times:
                raise RuntimeError(f"{kernel}: the shipped launch parameters do not run on {architecture}") from error
    seconds, entry = min(times, key=lambda found: found[0])
    return Measurement(entry, seconds, times[0][0])


def _shipped_entry(path: tuple[str, str, str, str]) -> Entry:
    kernel, architecture, size, width = path
    return merged(SHIPPED, {kernel: {architecture: {}}})[kernel][architecture][size][width]


def device_time(kernel: str, size: str, width: int, table: Table) -> float:
    """Median device time of a kernel's case, forward or backward, in seconds."""
    device = torch.device("cuda", torch.cuda.current_device())
    from triton.errors import TritonError

    try:
        with use_table(table):
            return _median_time(list(rotated_calls(kernel, DTYPES[size], width, device)))
    except TritonError as error:  # more shared memory or registers than there are
        raise RuntimeError(str(error)) from error


def rotated_calls(
    kernel: str, dtype: torch.dtype, width: int, device: torch.device, cache: int | None = None
) -> Iterator[Callable[[], object]]:
    """Calls of a kernel on inputs of their own, which together are several times the L2 cache."""
    sizes = case_of(kernel, width, dtype, empty_tensors(torch.device("meta")), torch.device("cpu")).leaves
    bytes_of_one = sum(leaf.numel() * leaf.element_size() for leaf in sizes.values())
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cache is None else cache
    for seed in range(max(2, -(-L2_MULTIPLE * cache // bytes_of_one))):
        case = case_of(kernel, width, dtype, random_tensors(device, seed), device)
        yield _forward_call(case) if kernel == case.entries[0] else _backward_call(case)


def case_of(kernel: str, width: int, dtype: torch.dtype, make: Callable[..., Tensor], device: torch.device) -> Case:
    """The case that times an entry of the table: the first that is launched by it."""
    return next(case for case in kernel_cases(ROWS, width, dtype, make, device) if kernel in case.entries)


def _forward_call(case: Case) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return case.call(**case.leaves)

    return call


def _backward_call(case: Case) -> Callable[[], object]:
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}
    result = case.call(**leaves)
    outputs: Sequence[Tensor] = [result] if isinstance(result, Tensor) else result
    incoming = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), incoming, retain_graph=True)


def _median_time(calls: Sequence[Callable[[], object]]) -> float:
    """Each call by its events; the device waits until the calls of a round are queued, so that it never waits later."""
    times = []
    for turn in range(ROUNDS + 1):  # the first compiles and warms up
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        events = []
        for i in range(max(CALLS, len(calls))):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[i % len(calls)]()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        if turn:
            times += [start.elapsed_time(stop) / 1e3 for start, stop in events]
    return statistics.median(times)


def _stop(line: str) -> int:
    print(line, file=sys.stderr)
    return 2
