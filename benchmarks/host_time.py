"""Host time of the ops without a launch: past the dispatcher, and by the registered op, in one interleaved run.

    python -m benchmarks.host_time [ROUNDS]

It runs without a GPU: Triton's launchers do all that they do before a launch, on tensors of a CPU, and launch nothing.
Values that only a CPU's host would read are not read. Medians of one thread's CPU time, in microseconds; ``backward``
is the whole of ``torch.autograd.backward`` with its accumulation into fresh gradients.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from onepeace_fast import kernels
from onepeace_fast.hardware.cases import Case, kernel_cases, product_cases, random_tensors
from onepeace_fast.kernels import launch
from onepeace_fast.ops import arguments, operation

ROWS, WIDTH, DTYPE, WARM = 64, 64, torch.bfloat16, 20
# As a layer calls them.
MEASURED = (
    "routed_ffn, grouped: Sub-LN, gamma, drop_path, residual", "routed_ffn, grouped: silu, row index, recompute",
    "routed_ffn, grouped: gelu_tanh alone", "layer_norm, weight, bias",
    "residual_layer_norm, gamma, drop_path, float32 stream",
)  # fmt: skip


def cases() -> dict[str, Case]:
    """The measured cases by their names."""
    cpu = torch.device("cpu")
    where = ROWS, WIDTH, DTYPE, random_tensors(cpu), cpu
    found = {
        f"{case.operation}, {case.variant}": case for make in (product_cases, kernel_cases) for case in make(*where)
    }
    return {name: found[name] for name in MEASURED}


@contextmanager
def no_launches() -> Iterator[None]:
    """Take the kernels on a CPU, launch none of them, and read no value on the host."""
    before = kernels.INTERPRETED, launch.Configuration.launch
    on_host = arguments.is_on_host
    kernels.INTERPRETED, launch.Configuration.launch = True, lambda self, grid: None
    arguments.is_on_host = lambda x: False
    try:
        yield
    finally:
        kernels.INTERPRETED, launch.Configuration.launch = before
        arguments.is_on_host = on_host


@contextmanager
def by_the_dispatcher() -> Iterator[None]:
    """Let every call go to the registered op."""
    before, operation.is_eager = operation.is_eager, lambda tensors: False
    try:
        yield
    finally:
        operation.is_eager = before


def measure(case: Case) -> tuple[float, float]:
    """Microseconds of one forward and one backward pass."""
    for leaf in case.leaves.values():
        leaf.requires_grad_().grad = None
    start = time.thread_time_ns()
    out = case.call(**case.leaves)
    forward = time.thread_time_ns() - start
    outputs = [out] if isinstance(out, torch.Tensor) else [*out]
    gradients = [torch.ones_like(output) for output in outputs]
    start = time.thread_time_ns()
    torch.autograd.backward(outputs, gradients)
    return forward / 1e3, (time.thread_time_ns() - start) / 1e3


def run(rounds: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """Medians of each case, "direct" and by the "dispatcher"."""
    measured = cases()
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {"direct": [], "dispatcher": []} for name in measured
    }
    with no_launches():
        for _ in range(WARM + rounds):
            for name, case in measured.items():
                times[name]["direct"].append(measure(case))
                with by_the_dispatcher():
                    times[name]["dispatcher"].append(measure(case))
    return {
        name: {way: tuple(map(statistics.median, zip(*found[WARM:], strict=True))) for way, found in ways.items()}
        for name, ways in times.items()
    }


def main() -> None:
    """Print a line for each case."""
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"{'host time, us':57} {'forward':>8} {'registered':>11} {'backward':>9} {'registered':>11}")
    for name, ways in run(rounds).items():
        (forward, backward), (forward_op, backward_op) = ways["direct"], ways["dispatcher"]
        print(f"{name:57} {forward:8.0f} {forward_op:11.0f} {backward:9.0f} {backward_op:11.0f}")


if __name__ == "__main__":
    main()
