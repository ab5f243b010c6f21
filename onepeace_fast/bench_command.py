"""`onepeace-fast bench`: the benchmarks of a checkout, shown as they run and written to a result file."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from onepeace_fast.command_line import at_least, path, stop

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("attention", "ffn", "layer", "pointwise", "step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("suite", choices=(*SUITES, "all"), metavar="SUITE", help=f"{', '.join(SUITES)}, or all of them")
    parser.add_argument(
        "--full", action="store_true", help="on a CPU also compiled peers, on a GPU also more row counts"
    )
    parser.add_argument("--seconds", type=at_least(1), default=5, help="time for each batch (default: 5)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads of torch on a CPU (default: 1)")
    parser.add_argument("--out", type=path, help="folder of the result file (default: none is written)")


def run(arguments: argparse.Namespace) -> int:
    """Measure a suite: 0, 1 where ours is wrong or failed, 2 where there is no checkout."""
    if not (ROOT / "benchmarks" / "support").is_dir():
        return stop(f"bench: expected a checkout with benchmarks/ in {ROOT}, got an installed package; run it from one")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    measure = import_module("benchmarks.bench").measure  # by its name, which a wheel does not have
    suites = SUITES if arguments.suite == "all" else (arguments.suite,)
    return measure(suites, arguments.full, arguments.seconds, arguments.threads, arguments.out)
