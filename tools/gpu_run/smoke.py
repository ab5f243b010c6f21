"""One operation in bfloat16, forward and backward, against its reference: python3 -m tools.gpu_run.smoke CHECK

What ``onepeace-fast selftest`` holds an operation to, in seconds: every output and gradient by the tolerance rule.
Exact is the reference in float64, plain PyTorch that in bfloat16, both on the CPU. Returns 1 for a fault, and 33 for
one after which the device answers this process no more.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.support.watchdog import Watchdog
from onepeace_fast import cuda_extension
from onepeace_fast.hardware.cases import Case, Make, kernel_cases, pairs, product_cases, specified_cases
from onepeace_fast.hardware.selftest import compare_case, launches
from onepeace_fast.timing import describe_error
from tools.gpu_run.plan import LEFT_OUT, SMOKE
from tools.gpu_run.plugin import DEVICE_LOST, device_lost

DTYPE = torch.bfloat16
Cases = Callable[[Make, torch.device], Iterator[Case]]
INERT = 3  # rows at the end of each batch of the cases


class Check(NamedTuple):
    """Cases, of those that a function makes, whose operation begins with a name and whose form holds a text."""

    cases: Cases
    operation: str
    form: str = ""

    def holds(self, case: Case) -> bool:
        """Whether a case is this check's."""
        return case.operation.startswith(self.operation) and self.form in case.variant


def checks(full: bool) -> dict[str, Check]:
    """Every check; not ``full``: at sizes for a CPU."""
    rows, width = (300, 1536) if full else (40, 64)

    products, short = partial(product_cases, rows, width, DTYPE), partial(kernel_cases, rows, width, DTYPE)

    def tokens_of(tokens: int) -> Cases:
        return partial(specified_cases, tokens + INERT, DTYPE)

    attention = {f"attention_{tokens}": Check(tokens_of(tokens), "relative_bias_attention") for tokens in (33, 72, 257)}
    return {
        "layer_norm": Check(short, "layer_norm"),
        "residual": Check(short, "residual", "float32 stream"),
        "gated_sub_ln": Check(partial(kernel_cases, rows, 4 * width, DTYPE), "gated_sub_ln"),
        "routed_ffn": Check(tokens_of(72), "routed_ffn"),
        "grouped_ffn": Check(products, "routed_ffn", "Sub-LN"),
        "grouped_ffn_row_index": Check(products, "routed_ffn", "row index"),
        "grouped_ffn_plain": Check(products, "routed_ffn", "alone"),
        "hybrid_ffn": Check(products, "routed_ffn", "hybrid"),
        **attention,
    }


def faults(check: Check, device: torch.device, say: Callable[[str], None]) -> int:
    """Hold every case of a check against its reference; tells each case's worst tensor, and how many broke it."""
    found = cases = 0
    watchdog = Watchdog()
    watchdog.restart()
    for on_cpu, on_device in pairs(check.cases, device):
        if not check.holds(on_cpu):
            continue
        cases += 1
        before = launches()
        compared = list(compare_case(on_cpu, on_device, DTYPE))
        launched = launches() - before
        worst = max(compared, key=lambda one: one.closeness)
        broken = sum(not one.kept for one in compared)
        if device.type == "cuda" and not launched:
            say(f"{on_cpu.operation}, {on_cpu.variant}: FAULT: no kernel was launched")
            found += 1
        found += broken
        state = "ok" if not broken else f"FAULT in {broken} of {len(compared)} comparisons"
        say(f"{on_cpu.operation}, {on_cpu.variant}: {state}; {launched} launches; nearest to its bound: "
            f"{worst.tensor}, {worst.kind} error {worst.error:.2e} of {worst.allowed:.2e}")  # fmt: skip
        watchdog.restart()
    if not cases:
        raise SystemExit(f"{check.operation}: no case was found")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run one check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=[*SMOKE, "attention_33"])
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    check = checks(full=device.type == "cuda")[chosen.check]
    attends = device.type == "cuda" and check.operation == "relative_bias_attention"
    if attends and (reason := cuda_extension.unavailable_reason()) is not None:
        print(f"attention's kernels are not here: {reason}", flush=True)
        return LEFT_OUT
    reason = "seen after the last case"
    try:
        found = faults(check, device, lambda line: print(line, flush=True))
    except Exception as error:
        traceback.print_exc()
        found, reason = 1, describe_error(error)
    if device_lost():
        print(f"the device answers no more: {reason}", flush=True)
        return DEVICE_LOST
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
