"""Steps whose kernels are compiled and launched for an emulated GPU: `python -m tools.rehearsal.step [--only NAME]`.

Prints one JSON object: programs by step and kernel, launches and seconds of compiling, and faults.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from tools.rehearsal.driver import Driver
from tools.rehearsal.emulation import emulated_gpu

WIDTH, HIDDEN = 96, 200
DTYPE = torch.bfloat16


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device="cuda")


def feed_forward(counts: tuple[int, ...], inert: int = 1, frozen: int | None = None) -> None:
    """Forward and backward pass of ``routed_ffn`` by grouped products, with every option; a modality may be frozen."""
    from onepeace_fast import routed_ffn

    rows = sum(counts) + inert
    shapes = {
        "w0": (HIDDEN, WIDTH), "w1": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN), "b2": (WIDTH,), "norm_weight": (HIDDEN,),
        "norm_bias": (HIDDEN,),
    }  # fmt: skip
    lists = {
        name: [_random(*shape).requires_grad_(m != frozen) for m in range(len(counts))]
        for name, shape in shapes.items()
    }
    offsets = [sum(counts[:m]) for m in range(len(counts) + 1)]
    out = routed_ffn(
        _random(rows, WIDTH).requires_grad_(), **lists, residual=_random(rows, WIDTH).requires_grad_(),
        gamma=_random(WIDTH).requires_grad_(), drop_path=torch.ones(2, device="cuda"),
        sample=torch.zeros(rows, dtype=torch.int32, device="cuda"), strategy="grouped",
        offsets=torch.tensor(offsets, dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    out.backward(_random(rows, WIDTH))


def case(operation: str, variant: str, width: int = WIDTH) -> Callable[[], None]:
    """Forward and backward pass of a case of ``onepeace_fast.hardware``."""

    def run() -> None:
        from onepeace_fast.hardware.cases import empty_tensors, kernel_cases

        device = torch.device("cuda")
        cases = kernel_cases(10, width, DTYPE, empty_tensors(device), device)
        one = next(case for case in cases if case.operation == operation and case.variant.startswith(variant))
        outputs = one.outputs()
        one.gradients(outputs, [torch.empty_like(output) for output in outputs])

    return run


STEPS: dict[str, Callable[[], None]] = {
    "routed_ffn": lambda: feed_forward((5, 0, 40)),
    # What must compile nothing more: other sizes and another number of rows; a modality that learns nothing.
    "routed_ffn, another batch": lambda: feed_forward((64, 17, 3), inert=0),
    "routed_ffn, a frozen modality": lambda: feed_forward((5, 0, 40), frozen=1),
    "layer_norm": case("layer_norm", "per modality"),
    "residual_layer_norm": case("residual_layer_norm", "row index"),
    "gated_sub_ln": case("gated_sub_ln", "gelu, gate, norm", HIDDEN),
}


def rehearse(names: list[str], driver: Driver) -> dict[str, Any]:
    """Run steps one after another; the programs of each are those that none before it needed."""
    found: dict[str, Any] = {"steps": {}, "faults": []}
    with emulated_gpu(driver):
        for name in names:
            before = driver.compiled
            try:
                STEPS[name]()
            except Exception as error:
                found["faults"].append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            found["steps"][name] = dict(driver.compiled - before)
    found |= {"programs": driver.programs, "launches": driver.launches, "seconds": round(driver.seconds, 1)}
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.rehearsal.step", description=__doc__)
    parser.add_argument("--only", choices=STEPS, action="append", help="a step, instead of all")
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--count-only", action="store_true", help="count the programs, compile and launch none")
    options = parser.parse_args(arguments)
    found = rehearse(options.only or list(STEPS), Driver(options.architecture, not options.count_only))
    print(json.dumps(found))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
