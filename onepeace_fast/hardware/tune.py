"""What ``onepeace-fast tune`` does: time a few launch parameters of every kernel, and write the fastest down.

Candidates are those of the heuristic, half and twice its rows in a block, half and twice its warps, half and twice its
programs for each multiprocessor. Each is timed by the median device time of calls in turn, over inputs that together
are several times the L2 cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast import kernels
from onepeace_fast.hardware.cases import Case, empty_tensors, kernel_cases, random_tensors
from onepeace_fast.info import versions
from onepeace_fast.kernels.launch import architecture_and_multiprocessors
from onepeace_fast.kernels.launch_heuristic import KERNELS, WIDTHS, Parameters, heuristic, widest, width_class
from onepeace_fast.kernels.launch_parameters import use_launch_parameters
from onepeace_fast.kernels.measured import MeasuredGPU, gpu_name, measured_for, user_folder, write_measured

ROWS = 9500  # a vision-language batch of 32
DTYPES = {"2": torch.bfloat16, "4": torch.float32}
MOST_ROWS, MOST_WARPS, MOST_PROGRAMS = 64, 32, 16
L2_MULTIPLE = 3
CALLS, ROUNDS = 5, 4
Timer = Callable[[str, str, int, Parameters], float]


class Measurement(NamedTuple):
    """The fastest launch parameters of a kernel for a size of elements and a width, and their time, in seconds."""

    kernel: str
    size: str
    width: int
    parameters: Parameters
    seconds: float
    heuristic_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the measurement."""
    text = "only the class of rows of this width; repeat it for more (default: all classes)"
    parser.add_argument("--width", type=_width, action="append", help=text)
    parser.add_argument("--minutes", type=float, help="begin no measurement after so many minutes (default: no limit)")


def _width(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= WIDTHS[-1]:
        raise argparse.ArgumentTypeError(f"expected a width from 1 to {WIDTHS[-1]}, got {text}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write the GPU's file after each kernel and width.

    Returns:
        0: written. 2: there is no GPU, no Triton, no place to write, or a kernel does not run; a line says which.
    """
    if not torch.cuda.is_available():
        return _stop("tune needs a CUDA device, and torch sees none here")
    if (reason := kernels.unavailable_reason()) is not None:
        return _stop(f"tune needs Triton: {reason}")
    device, stop = torch.device("cuda", torch.cuda.current_device()), None
    if arguments.minutes is not None:
        stop = time.monotonic() + 60 * arguments.minutes
    try:
        measured = measured_for(gpu_name(device)) or unproved(device)
        path = write_measured(measured, user_folder())  # now rather than after minutes of measuring
        work = [*todo(arguments.width or WIDTHS)]
        done = 0
        for found in measure(work, device_time, stop):
            measured = with_measurement(measured, found)
            write_measured(measured, user_folder())
            done += 1
    except OSError as error:
        return _stop(f"{error.filename or user_folder()}: {error.strerror or error}")
    except (RuntimeError, ValueError) as error:
        return _stop(f"tune: {error}")
    rest = "" if done == len(work) else f", {len(work) - done} were left out as --minutes says"
    print(f"{path} has the launch parameters of {measured.name}: {done} measured{rest}")
    if not measured.parity:
        print("the fused backend is automatic once `onepeace-fast selftest` has passed")
    return 0


def unproved(device: torch.device) -> MeasuredGPU:
    """The file of a GPU of which nothing is known yet."""
    architecture, _ = architecture_and_multiprocessors(device)
    today = datetime.date.today().isoformat()
    return MeasuredGPU(gpu_name(device), architecture, versions(), today, False, {}, {})


def with_measurement(measured: MeasuredGPU, found: Measurement) -> MeasuredGPU:
    """With these launch parameters in place of earlier ones; what the heuristic says by itself is left out.

    A launch that is new was timed and not compared with anything: the file waits for the selftest again.
    """
    table = {
        kernel: {size: dict(by_width) for size, by_width in by_size.items()}
        for kernel, by_size in measured.launch_parameters.items()
    }
    by_width = table.setdefault(found.kernel, {}).setdefault(found.size, {})
    by_width.pop(str(found.parameters.block_width), None)
    if found.parameters != heuristic(found.kernel, found.width):
        by_width[str(found.parameters.block_width)] = entry_of(found.parameters)
    table = {
        kernel: sizes
        for kernel, by_size in table.items()
        if (sizes := {size: entries for size, entries in by_size.items() if entries})
    }
    parity = measured.parity and table == measured.launch_parameters
    return dataclasses.replace(measured, launch_parameters=table, parity=parity)


def entry_of(parameters: Parameters) -> dict[str, Any]:
    """As the file holds them: without the class, and without what is left as it is."""
    defaults = Parameters._field_defaults
    given = parameters._asdict().items()
    return {name: value for name, value in given if name != "block_width" and (name, value) not in defaults.items()}


def todo(widths: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """Kernels, sizes of elements and widths to measure: of each class the widest that was asked for."""
    classes = {width_class(width): width for width in sorted(widths)}
    for kernel in KERNELS:
        for size in DTYPES:
            yield from ((kernel, size, width) for width in classes.values() if width <= widest(kernel))


def candidates(parameters: Parameters) -> Iterator[Parameters]:
    """What is tried in place of launch parameters, these first."""
    yield parameters
    bounds = {"block_rows": MOST_ROWS, "num_warps": MOST_WARPS, "programs_per_multiprocessor": MOST_PROGRAMS}
    for name, most in bounds.items():
        if (now := getattr(parameters, name)) is not None:
            yield from (parameters._replace(**{name: n}) for n in (now // 2, now * 2) if 1 <= n <= most)


def measure(
    work: Sequence[tuple[str, str, int]], timer: Timer, stop: float | None = None, say: Callable[[str], None] = print
) -> Iterator[Measurement]:
    """The fastest candidate for every kernel, size and width, until ``stop`` by the monotonic clock.

    ``timer`` gives the seconds of a kernel, for a size of elements and a width, by launch parameters; a candidate that
    cannot be launched raises RuntimeError.
    """
    for kernel, size, width in work:
        if stop is not None and time.monotonic() >= stop:
            return
        best = _fastest(kernel, size, width, timer)
        gain = best.heuristic_seconds / best.seconds
        say(f"{kernel}, {size} bytes, width {width}: {1e6 * best.seconds:.1f} us, {gain:.2f}x, {best.parameters}")
        yield best


def _fastest(kernel: str, size: str, width: int, timer: Timer) -> Measurement:
    times: list[tuple[float, Parameters]] = []
    for parameters in candidates(heuristic(kernel, width)):
        try:
            times.append((timer(kernel, size, width, parameters), parameters))
        except RuntimeError as error:
            if not times:
                raise RuntimeError(f"{kernel}: the heuristic's launch parameters do not run: {error}") from error
    seconds, parameters = min(times, key=lambda found: found[0])
    return Measurement(kernel, size, width, parameters, seconds, times[0][0])


def device_time(kernel: str, size: str, width: int, parameters: Parameters) -> float:
    """Median device time of a kernel's case, forward or backward, in seconds."""
    device = torch.device("cuda", torch.cuda.current_device())
    from triton.errors import TritonError

    try:
        with use_launch_parameters(kernel, parameters):
            return median_time(list(rotated_calls(kernel, DTYPES[size], width, device)))
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
    outputs = case.outputs()
    incoming = [torch.randn_like(output) for output in outputs]
    return lambda: case.gradients(outputs, incoming, retain_graph=True)


def median_time(calls: Sequence[Callable[[], object]]) -> float:
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
