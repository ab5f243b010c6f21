"""What ``onepeace-fast selftest`` does: every operation and every gradient against float64, on the device at hand.

Exact is an operation's reference in float64, plain PyTorch the reference in the dtype under test, both on the
CPU; the bound is that of ``onepeace_fast.tolerance``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast import cuda_extension, kernels
from onepeace_fast.hardware.cases import (
    Case,
    kernel_cases,
    pairs,
    product_cases,
    random_tensors,
    specified_cases,
    timed_routed_ffn,
)
from onepeace_fast.hardware.tune import median_time, unproved
from onepeace_fast.info import SENDING_IN, format_table
from onepeace_fast.kernels.launch import architecture_and_multiprocessors, launched
from onepeace_fast.kernels.measured import gpu_name, measured_for, user_folder, write_measured
from onepeace_fast.kernels.tile_table import refusal
from onepeace_fast.ops.kernel_choice import force_kernels
from onepeace_fast.progress import progress
from onepeace_fast.tolerance import DTYPES, HALF, compare

CPU = torch.device("cpu")
SMALL, REAL = ((1, 64), (7, 63), (40, 1536)), ((257, 768), (1000, 6144), (9500, 1536))  # rows, width
FEW_ROWS = 70
TIMED = ((1000, 1536), (9500, 1536))  # rows, in ascending order, and width of the strategies
PRODUCTS = ((70, 64), (1000, 768))  # rows and width of matrix products
HEADINGS = ("operation", "form", "dtype", "runs", "tensor", "error", "allowed", "ok")


class Result(NamedTuple):
    """A case, and of all its comparisons the one that comes nearest to its bound, or goes furthest past it."""

    operation: str
    variant: str
    dtype: torch.dtype
    by_kernel: bool
    tensor: str
    error: float
    allowed: float
    kind: str = ""

    @property
    def kept(self) -> bool:
        """Whether the rule is; an error that is not a number breaks it."""
        return self.error <= self.allowed

    @property
    def closeness(self) -> float:
        """What part of the bound is used up."""
        if self.kept:
            return self.error / self.allowed if self.allowed else 0.0
        return math.inf if not self.allowed or math.isnan(self.error) else self.error / self.allowed

    @property
    def row(self) -> tuple[str, ...]:
        """As a row of the table."""
        runs, ok = "kernel" if self.by_kernel else "reference", "yes" if self.kept else "NO"
        dtype = str(self.dtype).removeprefix("torch.")
        return self.operation, self.variant, dtype, runs, self.tensor, f"{self.error:.2e}", f"{self.allowed:.2e}", ok


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the self-test."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to test (default: the GPU if torch sees one)")


def run(arguments: argparse.Namespace) -> int:
    """Test, print the table and one line, and on a GPU write down in its file of measurements what came out.

    Returns:
        0: every comparison is within the rule. 1: one is not. 2: there is no such device, or its file cannot be read or
        written; a line says which.
    """
    gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not gpu:
        line = "selftest --device: got cuda and torch sees no CUDA device here; leave the option out, or take cpu"
        print(line, file=sys.stderr)
        return 2
    device = torch.device(arguments.device or ("cuda" if gpu else "cpu"))
    try:
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
            require_supported(device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return _test(device)
    except OSError as error:
        print(f"{error.filename or user_folder()}: {error.strerror or error}", file=sys.stderr)
        return 2


def require_supported(device: torch.device) -> None:
    """Raise ValueError in one line for a GPU that is too old, or one with a damaged file of measurements."""
    architecture, _ = architecture_and_multiprocessors(device)
    if (reason := refusal(architecture)) is not None:
        raise ValueError(f"selftest: {reason}; use the backend reference there")
    measured_for(gpu_name(device))


def _test(device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    print(f"{what_it_shows(device)}\n", flush=True)
    try:
        results = list(check(device))
    except Exception:
        if on_gpu and (path := withdraw(device)) is not None:
            print(f"{path} no longer makes the fused backend automatic", file=sys.stderr)
        raise
    print(format_table([HEADINGS, *(result.row for result in results)], indent=""))
    faults = sum(not result.kept for result in results)
    by_kernel = sum(result.by_kernel for result in results)
    own = "" if on_gpu else ", which on a CPU is compared with itself and float64"
    print(
        f"selftest on {device}: {len(results)} rows, {by_kernel} by kernels, {len(results) - by_kernel} by the "
        f"reference{own}; {faults} faults"
    )
    if on_gpu and faults:
        path = withdraw(device)
        print("nothing was written" if path is None else f"{path} no longer makes the fused backend automatic")
    elif on_gpu:
        path = approve(device)
        print(f"{path} says so: from now on the fused backend is automatic on {gpu_name(device)}; {SENDING_IN}")
    return 1 if faults else 0


def what_it_shows(device: torch.device) -> str:
    """What a pass on this device is evidence of, and of what it is none."""
    exact = "with float64, forward and backward"
    if device.type == "cuda":
        where = f"{gpu_name(device)}: compares every operation {exact}, and times the strategies if all pass."
        return f"selftest on {where} Rows marked kernel ran on this GPU."
    if _interpreted(device):
        first = f"compares the Triton kernels, in Triton's interpreter, {exact}; not in bfloat16, where it errs."
        second = "No kernel runs on a GPU here, and no CUDA kernel runs at all."
    else:
        first = f"compares every operation's reference in PyTorch {exact}."
        second = "No Triton or CUDA kernel runs here: this says nothing about a GPU."
    return f"selftest on a CPU: {first}\n{second}"


def withdraw(device: torch.device) -> Path | None:
    """Say in the user's file of a GPU that it did not pass, where the file in force says that it did."""
    measured = measured_for(gpu_name(device))
    if measured is None or not measured.parity:
        return None
    return write_measured(dataclasses.replace(measured, parity=False), user_folder())


def approve(device: torch.device) -> Path:
    """Time the strategies and write the user's file of a GPU that passed; launch parameters stay as they were."""
    known = measured_for(gpu_name(device)) or unproved(device)
    fresh = unproved(device)
    strategies = {**known.strategies, "routed_ffn": timed_strategies(device)}
    return write_measured(
        dataclasses.replace(fresh, parity=True, strategies=strategies, launch_parameters=known.launch_parameters),
        user_folder(),
    )


def timed_strategies(device: torch.device, shapes: Sequence[tuple[int, int]] = TIMED) -> list[dict[str, Any]]:
    """The classes of rows of the routed FFN, each with the strategy that was faster at its shape, in bfloat16."""
    found = {}
    for rows, width in shapes:
        times = {name: seconds_of_strategy(name, rows, width, device) for name in ("per_modality", "grouped", "hybrid")}
        found[rows] = times
        said = ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in times.items())
        print(f"routed_ffn, forward and backward, {rows} rows of width {width}: {said}")
    return [{"width": None, **one} for one in strategy_classes(found)]


def strategy_classes(times: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Classes of rows in ascending order, each with its fastest strategy, by the times at some numbers of rows.

    Between two measured numbers of rows with different winners a class ends in the middle of their ratio.
    """
    result: list[dict[str, Any]] = []
    last = 0
    for rows, by_strategy in times.items():
        fastest = min(by_strategy, key=by_strategy.__getitem__)
        if result and result[-1]["strategy"] != fastest:
            result[-1]["rows"] = math.isqrt(last * rows)
        if not result or result[-1]["strategy"] != fastest:
            result.append({"rows": None, "strategy": fastest})
        last = rows
    return result


def seconds_of_strategy(strategy: str, rows: int, width: int, device: torch.device) -> float:
    """Median device time of a forward and a backward pass."""
    case = timed_routed_ffn(rows, width, torch.bfloat16, random_tensors(device), device, strategy)
    incoming = [torch.randn_like(output) for output in case.outputs()]
    return median_time([lambda: case.gradients(case.outputs(), incoming)])


def check(device: torch.device) -> Iterator[Result]:
    """A row for every form of every operation in every dtype: the worst of all sizes."""
    of_dtype = {dtype: _groups(dtype, device) for dtype in _dtypes(device)}
    shown = progress("selftest", "group", sum(map(len, of_dtype.values())))
    for dtype, groups in of_dtype.items():
        worst: dict[tuple[str, str], Result] = {}
        for group in groups:
            shown.set_postfix(dtype=str(dtype).removeprefix("torch."), refresh=False)
            for on_cpu, on_device in group:
                for result in compare_case(on_cpu, on_device, dtype):
                    key = (result.operation, result.variant)
                    if key not in worst or result.closeness > worst[key].closeness:
                        worst[key] = result
            shown.update()
        yield from worst.values()
    shown.close()


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """The dtypes that can be tested there: the interpreter's arithmetic in bfloat16 is wrong without a word."""
    return [dtype for dtype in DTYPES if not _interpreted(device) or dtype != torch.bfloat16]


def _interpreted(device: torch.device) -> bool:
    return kernels.INTERPRETED and device.type == "cpu"


def _groups(dtype: torch.dtype, device: torch.device) -> list[Iterator[tuple[Case, Case]]]:
    """The same case on the CPU and on the device; a group holds those of one size, made where it is asked."""
    sizes = SMALL if device.type == "cpu" else (*SMALL, *REAL)
    groups = [pairs(partial(kernel_cases, *size, dtype), device, seed) for seed, size in enumerate(sizes)]
    groups.append(pairs(partial(specified_cases, FEW_ROWS, dtype), device))
    if (device.type == "cuda" and dtype in HALF) or kernels.INTERPRETED:
        products = PRODUCTS if device.type == "cuda" else PRODUCTS[:1]
        groups += [pairs(partial(product_cases, *size, dtype), device) for size in products]
    return groups


def compare_case(on_cpu: Case, on_device: Case, dtype: torch.dtype) -> Iterator[Result]:
    """Every output and gradient of a case, and every slice of it that the case names."""
    counts = [launches()]

    def counted(**leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = on_device.call(**leaves)
        counts.append(launches())
        return result

    actual, given = outputs_and_gradients(dataclasses.replace(on_device, call=counted))
    at_start, after_forward = counts
    forward_by_kernel, backward_by_kernel = after_forward > at_start, launches() > after_forward
    with force_kernels(False):
        plain, _ = outputs_and_gradients(on_cpu, given)
    exact, _ = outputs_and_gradients(on_cpu, given, torch.float64)
    for name, value in actual.items():
        slices = on_cpu.slices.get(name, ())
        by_kernel = forward_by_kernel if name.startswith("out") else backward_by_kernel
        for found in compare(value.cpu(), plain[name], exact[name], slices):
            tensor = name if found.part is ... else f"{name} (part)"
            figures = found.error, found.allowed, found.kind
            yield Result(on_cpu.operation, on_cpu.variant, dtype, by_kernel, tensor, *figures)


def launches() -> int:
    """How many kernels and passes of the CUDA extension this process has launched."""
    return launched() + cuda_extension.launched()


def outputs_and_gradients(
    case: Case, given: list[Tensor] | None = None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs (out0, out1, ...) and the gradient of every leaf, for the given gradients of the outputs or random ones.

    ``dtype`` is what the leaves are converted to. Returns the gradients of the outputs too, on the CPU.
    """
    leaves = {name: leaf.detach().to(dtype or leaf.dtype) for name, leaf in case.leaves.items()}
    case = dataclasses.replace(case, leaves=leaves)
    outputs = case.outputs()
    if given is None:
        make = random_tensors(CPU, seed=1000)
        given = [make(*output.shape, dtype=output.dtype) for output in outputs]
    incoming = [gradient.to(output) for gradient, output in zip(given, outputs, strict=True)]
    gradients = case.gradients(outputs, incoming)
    named = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    return {**named, **dict(zip(leaves, gradients, strict=True))}, given
