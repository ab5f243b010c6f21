"""What ``onepeace-fast selftest`` does: every operation and every gradient against float64, on the device at hand.

Exact is an operation's specification in float64, plain PyTorch the specification in the dtype under test, both on the
CPU; the bound is that of ``onepeace_fast.tolerance``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from onepeace_fast import cuda_extension, kernels
from onepeace_fast.hardware.cases import Case, kernel_cases, product_cases, random_tensors, specified_cases
from onepeace_fast.info import format_table
from onepeace_fast.kernels.launch import launched
from onepeace_fast.ops._library import force_kernels
from onepeace_fast.tolerance import DTYPES, HALF, compare

CPU = torch.device("cpu")
SMALL, REAL = ((1, 64), (7, 63), (40, 1536)), ((257, 768), (1000, 6144), (9500, 1536))  # rows, width
FEW_ROWS = 70
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

    @property
    def kept(self) -> bool:
        """Whether the rule is; an error that is not a number breaks it."""
        return self.error <= self.allowed

    @property
    def closeness(self) -> float:
        """What part of the bound is used up."""
        if self.error <= self.allowed:
            return self.error / self.allowed if self.allowed else 0.0
        return math.inf if not self.allowed or math.isnan(self.error) else self.error / self.allowed

    @property
    def row(self) -> tuple[str, ...]:
        """As a row of the table."""
        runs, ok = "kernel" if self.by_kernel else "specification", "yes" if self.kept else "NO"
        dtype = str(self.dtype).removeprefix("torch.")
        return self.operation, self.variant, dtype, runs, self.tensor, f"{self.error:.2e}", f"{self.allowed:.2e}", ok


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the self-test."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to test (default: the GPU if torch sees one)")


def run(arguments: argparse.Namespace) -> int:
    """Test, print the table and one line.

    Returns:
        0: every comparison is within the rule. 1: one is not. 2: there is no such device.
    """
    gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not gpu:
        line = "selftest --device: got cuda and torch sees no CUDA device here; leave the option out, or take cpu"
        print(line, file=sys.stderr)
        return 2
    device = torch.device(arguments.device or ("cuda" if gpu else "cpu"))
    results = list(check(device))
    print(format_table([HEADINGS, *(result.row for result in results)], indent=""))
    faults = sum(not result.kept for result in results)
    by_kernel = sum(result.by_kernel for result in results)
    own = "" if device.type == "cuda" else ", which on a CPU is compared with itself and float64"
    print(
        f"selftest on {device}: {len(results)} rows, {by_kernel} by kernels, {len(results) - by_kernel} by the "
        f"specification{own}; {faults} faults"
    )
    return 1 if faults else 0


def check(device: torch.device) -> Iterator[Result]:
    """A row for every form of every operation in every dtype: the worst of all sizes."""
    interpreted = kernels.INTERPRETED and device.type == "cpu"
    # The interpreter's arithmetic in bfloat16 is wrong without a word.
    for dtype in (dtype for dtype in DTYPES if not interpreted or dtype != torch.bfloat16):
        worst: dict[tuple[str, str], Result] = {}
        for on_cpu, on_device in _pairs(dtype, device):
            for result in _compare(on_cpu, on_device, dtype):
                key = (result.operation, result.variant)
                if key not in worst or result.closeness > worst[key].closeness:
                    worst[key] = result
        yield from worst.values()


def _pairs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Case, Case]]:
    """The same case on the CPU and on the device."""

    def copied(*shape: int, **how: object) -> Tensor:
        return same(*shape, **how).to(device)

    for seed, (rows, width) in enumerate(SMALL if device.type == "cpu" else (*SMALL, *REAL)):
        make, same = (random_tensors(CPU, seed) for _ in range(2))
        first = kernel_cases(rows, width, dtype, make, CPU)
        yield from zip(first, kernel_cases(rows, width, dtype, copied, device), strict=True)
    make, same = (random_tensors(CPU) for _ in range(2))
    first = specified_cases(FEW_ROWS, dtype, make, CPU)
    yield from zip(first, specified_cases(FEW_ROWS, dtype, copied, device), strict=True)
    if (device.type == "cuda" and dtype in HALF) or kernels.INTERPRETED:
        for rows, width in PRODUCTS if device.type == "cuda" else PRODUCTS[:1]:
            make, same = (random_tensors(CPU) for _ in range(2))
            first = product_cases(rows, width, dtype, make, CPU)
            yield from zip(first, product_cases(rows, width, dtype, copied, device), strict=True)


def _compare(on_cpu: Case, on_device: Case, dtype: torch.dtype) -> Iterator[Result]:
    """Every output and gradient of a case, and every slice of it that the case names."""
    launches = [_launches()]

    def counted(**leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = on_device.call(**leaves)
        launches.append(_launches())
        return result

    actual, given = outputs_and_gradients(dataclasses.replace(on_device, call=counted))
    forward_by_kernel, backward_by_kernel = launches[1] > launches[0], _launches() > launches[1]
    with force_kernels(False):
        plain, _ = outputs_and_gradients(on_cpu, given)
    exact, _ = outputs_and_gradients(on_cpu, given, torch.float64)
    for name, value in actual.items():
        slices = on_cpu.slices.get(name, ())
        by_kernel = forward_by_kernel if name.startswith("out") else backward_by_kernel
        for found in compare(value.cpu(), plain[name], exact[name], slices):
            tensor = name if found.part is ... else f"{name} (part)"
            yield Result(
                on_cpu.operation, on_cpu.variant, dtype, by_kernel, tensor, found.error, found.allowed
            )  # fmt: skip


def _launches() -> int:
    return launched() + cuda_extension.launched()


def outputs_and_gradients(
    case: Case, given: list[Tensor] | None = None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs (out0, out1, ...) and the gradient of every leaf, for the given gradients of the outputs or random ones.

    ``dtype`` is what the leaves are converted to. Returns the gradients of the outputs too, on the CPU.
    """
    leaves = {name: leaf.to(dtype or leaf.dtype).detach().requires_grad_() for name, leaf in case.leaves.items()}
    result = case.call(**leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if given is None:
        make = random_tensors(CPU, seed=1000)
        given = [make(*output.shape, dtype=output.dtype) for output in outputs]
    incoming = [gradient.to(output) for gradient, output in zip(given, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    named = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    return {**named, **dict(zip(leaves, gradients, strict=True))}, given
