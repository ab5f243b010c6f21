"""Plant faults, one after another, each in a copy of this checkout, and see the tests fail.

    python -m tools.mutants [NAME...]

The folder ``faults`` has them, one file for each area of the code. A fault says where it is planted by structure: a
file, in it a function, class or constant (``inside``), and in that a fragment that occurs there once, or the
``occurrence`` that is meant. Lines, indentation and comments do not matter. ``new`` takes the fragment's place, and
``tests`` must fail, in Triton's interpreter or, for csrc, with the sources built for this CPU. The same tests must pass
where nothing is planted. A mutant is caught only where a test fails in a comparison of values or by what a sanitizer
says: an error at import, or a kernel that does not compile or run, catches nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.mutants.fault import read_faults
from tools.mutants.replay import control, replay


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay, print a line each, and return 0 where the control passed and every mutant was caught."""
    parser = argparse.ArgumentParser(prog="make mutants", description="Plant faults and see the tests fail.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these faults")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="at once (default: one a core)")
    options = parser.parse_args(arguments)
    faults = read_faults()
    if unknown := set(options.names) - {fault.name for fault in faults}:
        known = ", ".join(fault.name for fault in faults)
        print(f"make mutants: expected one of {known}, got {', '.join(sorted(unknown))}")
        return 2
    faults = [fault for fault in faults if not options.names or fault.name in options.names]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.workers) as pool:
        cache = Path(name).resolve()
        unplanted = pool.submit(control, faults, cache)
        outcomes = [pool.submit(replay, fault, cache) for fault in faults]
        print(f"control      {unplanted.result().word}: {unplanted.result().detail}", flush=True)
        for fault, outcome in zip(faults, outcomes, strict=True):
            print(f"{outcome.result().word:12} {fault.name}: {outcome.result().detail}", flush=True)
    caught = sum(outcome.result().word == "caught" for outcome in outcomes)
    passed = unplanted.result().word == "passed"
    print(f"{caught} of {len(faults)} mutants caught; control {'passed' if passed else 'FAILED'}")
    return 0 if passed and caught == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
