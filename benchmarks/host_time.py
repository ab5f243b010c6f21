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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from onepeace_fast import kernels, layer_norm, residual_layer_norm, routed_ffn
from onepeace_fast.kernels import launch
from onepeace_fast.ops import operation

MODALITIES, WIDTH, HIDDEN, COUNTS, SAMPLES = 3, 64, 128, (20, 30, 14), 4
ROWS, WARM = sum(COUNTS), 20
Case = Callable[[], Tensor | tuple[Tensor, ...]]


class Leaves:
    """Parameters and inputs, whose gradients are dropped before each backward pass."""

    def __init__(self) -> None:
        self.all: list[Tensor] = []

    def new(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random numbers that require a gradient."""
        leaf = torch.randn(*shape, dtype=dtype).requires_grad_()
        self.all.append(leaf)
        return leaf

    def clear(self) -> None:
        """Drop all gradients."""
        for leaf in self.all:
            leaf.grad = None


def cases(leaves: Leaves) -> dict[str, Case]:
    """The ops as a layer calls them."""
    offsets = torch.tensor([sum(COUNTS[:m]) for m in range(MODALITIES + 1)], dtype=torch.int32)
    row_index = torch.randperm(ROWS + 16)[:ROWS].int()
    x, y, z = leaves.new(ROWS, WIDTH, dtype=torch.float32), leaves.new(ROWS, WIDTH), leaves.new(ROWS, WIDTH)
    stream = leaves.new(ROWS + 16, WIDTH, dtype=torch.float32)
    gamma, weight, bias = (leaves.new(WIDTH) for _ in range(3))
    shapes = {"w0": (HIDDEN, WIDTH), "w1": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN)}
    products = {name: [leaves.new(*shape) for _ in COUNTS] for name, shape in shapes.items()}
    vectors = {"b2": (WIDTH,), "norm_weight": (HIDDEN,), "norm_bias": (HIDDEN,)}
    full = products | {name: [leaves.new(*shape) for _ in COUNTS] for name, shape in vectors.items()}

    def scaling(rows: int) -> dict[str, Tensor]:
        return {"drop_path": torch.ones(SAMPLES), "sample": torch.arange(rows, dtype=torch.int32) % SAMPLES}

    of_rows, of_stream = scaling(ROWS), scaling(ROWS + 16)
    how = {"offsets": offsets, "row_counts": COUNTS, "strategy": "grouped"}
    return {
        "routed_ffn, everything": lambda: routed_ffn(z, **full, **how, residual=x, gamma=gamma, **of_rows),
        "routed_ffn, row index": lambda: routed_ffn(
            z, **full, **how, residual=stream, gamma=gamma, **of_stream, row_index=row_index
        ),
        "routed_ffn, products alone": lambda: routed_ffn(z, **products, **how),
        "layer_norm": lambda: layer_norm(y, weight, bias),
        "residual_layer_norm": lambda: residual_layer_norm(x, y, gamma, weight, bias, **of_rows),
    }


@contextmanager
def no_launches() -> Iterator[None]:
    """Take the kernels on a CPU, launch none of them, and read no value on the host."""
    before = kernels.INTERPRETED, launch.Configuration.launch
    module = sys.modules["onepeace_fast.ops.routed_ffn"]
    checks = module.check_offsets, module.check_row_index
    kernels.INTERPRETED, launch.Configuration.launch = True, lambda self, grid: None
    module.check_offsets = module.check_row_index = lambda *_: None
    try:
        yield
    finally:
        kernels.INTERPRETED, launch.Configuration.launch = before
        module.check_offsets, module.check_row_index = checks


@contextmanager
def by_the_dispatcher() -> Iterator[None]:
    """Let every call go to the registered op."""
    before, operation.is_eager = operation.is_eager, lambda tensors: False
    try:
        yield
    finally:
        operation.is_eager = before


def measure(case: Case, leaves: Leaves) -> tuple[float, float]:
    """Microseconds of one forward and one backward pass."""
    leaves.clear()
    start = time.thread_time_ns()
    out = case()
    forward = time.thread_time_ns() - start
    outputs = [out] if isinstance(out, Tensor) else [*out]
    gradients = [torch.ones_like(output) for output in outputs]
    start = time.thread_time_ns()
    torch.autograd.backward(outputs, gradients)
    return forward / 1e3, (time.thread_time_ns() - start) / 1e3


def run(rounds: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """Medians of each case, "direct" and by the "dispatcher"."""
    leaves = Leaves()
    measured = cases(leaves)
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {"direct": [], "dispatcher": []} for name in measured
    }
    with no_launches():
        for _ in range(WARM + rounds):
            for name, case in measured.items():
                times[name]["direct"].append(measure(case, leaves))
                with by_the_dispatcher():
                    times[name]["dispatcher"].append(measure(case, leaves))
    return {
        name: {way: tuple(map(statistics.median, zip(*found[WARM:], strict=True))) for way, found in ways.items()}
        for name, ways in times.items()
    }


def main() -> None:
    """Print a line for each case."""
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"{'host time, us':28} {'forward':>8} {'registered':>11} {'backward':>9} {'registered':>11}")
    for name, ways in run(rounds).items():
        (forward, backward), (forward_op, backward_op) = ways["direct"], ways["dispatcher"]
        print(f"{name:28} {forward:8.0f} {forward_op:11.0f} {backward:9.0f} {backward_op:11.0f}")


if __name__ == "__main__":
    main()
