"""What the kernels of a layer would take on GPUs that need not be here, as a model has it: python -m tools.kernel_model

It compiles every launch of the routed FFN and of the operations between products, reads the machine code, and prints
tables, beside the last committed one. Exit code 1: a pipeline that is not as its launch asks, a spill, or a launch or
strategy that is worse than in that table. ``make kernels`` prints it. How to read it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.kernel_model import comparison, measured, table
from tools.kernel_model.compiled import Compiled, compile_all
from tools.kernel_model.constants import constants
from tools.kernel_model.launches import Shape
from tools.kernel_model.pipeline import is_known

PROGRAM = "python -m tools.kernel_model"


def report(found: table.Result, before: tuple[Path, table.Result] | None) -> int:
    """Print the tables, the faults, and what changed; returns the exit code."""
    from onepeace_fast.info import format_table

    for heading, rows in table.tables(found, before and before[1]):
        print(f"\n{heading}\n{format_table(rows, indent='')}")
    print()
    faults = [
        (architecture, name, fault)
        for architecture, code in found["code"].items()
        for name, record in code.items()
        for fault in record["faults"]
    ]
    lines = [fault for fault in faults if not is_known(*fault)]
    for fault in faults:
        print(("FAULT {}, {}: {}" if fault in lines else "known: {}, {}: {}").format(*fault))
    worse: list[str] = []
    if before is not None:
        path, old = before
        if table.comparable(found, old):
            worse = comparison.regressions(found, old)
            for line in worse:
                print(f"WORSE {line}")
            for line in comparison.gains(found, old):
                print(f"better {line}")
        else:
            print(f"{path.name} is of another shape: nothing is compared with it")
    against = "nothing to compare with" if before is None else f"{len(worse)} worse than in {before[0].name}"
    print(f"{table.TITLE}: {len(lines)} faults, {against}")
    return 1 if lines or worse else 0


def run(
    shape: Shape, gpus: Sequence[str], workers: int, measurements: Sequence[Path] = (), write: bool = False,
    folder: Path = table.FOLDER,
) -> int:  # fmt: skip
    """Compile, estimate, print and compare; returns the exit code."""
    known = {one.gpu: one for one in (measured.read(path, shape) for path in measurements)}
    architectures = list(dict.fromkeys(constants().gpus[gpu].architecture for gpu in gpus))
    kernels: list[Compiled] = compile_all(shape, architectures, workers)
    found = table.result(shape, kernels, gpus, known)
    last = table.last_file(folder)
    before = None if last is None else (last, table.load(last))
    code = report(found, before)
    if write:
        print(f"Written to {table.write(found, folder, before and before[1])}")
    return code


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; returns 0, 1 for what is worse or a fault, 2 where it cannot run."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="A cost model of the compiled kernels; nothing is run.")
    parser.add_argument("--gpu", action="append", choices=constants().gpus, help="only this GPU; repeat it")
    parser.add_argument("--rows", type=_positive, action="append", metavar="N", help="rows of a modality; repeat it")
    parser.add_argument("--width", type=_positive, help="columns of a row (default: 1536)")
    parser.add_argument("--hidden", type=_positive, help="columns within the FFN (default: 4 times the width)")
    parser.add_argument(
        "--workers", type=_positive, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    text = "a file of times that benchmarks/gpu.py wrote, in place of what the model says of them; repeat it"
    parser.add_argument("--measured", type=Path, action="append", metavar="FILE", help=text)
    parser.add_argument("--write", action="store_true", help=f"write the tables into {table.FOLDER.name}/")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(f"{PROGRAM}: expected no TRITON_INTERPRET, got 1: the interpreter compiles nothing")
        return 2
    from onepeace_fast import kernels

    if (reason := kernels.unavailable_reason()) is not None:
        print(f"{PROGRAM}: {reason}")
        return 2
    usual = Shape()
    width = options.width or usual.width
    shape = Shape(tuple(options.rows or usual.counts), width, options.hidden or 4 * width)
    try:
        return run(shape, options.gpu or list(constants().gpus), options.workers, options.measured or (), options.write)
    except (OSError, ValueError) as error:
        print(f"{PROGRAM}: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
