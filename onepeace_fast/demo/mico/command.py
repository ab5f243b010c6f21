"""What ``onepeace-fast demo-mico`` does: run, and turn what can go wrong into one line."""

from __future__ import annotations

import argparse
from pathlib import Path

from onepeace_fast.command_line import at_least, path, stop
from onepeace_fast.info import DEMO_INSTALL, DEMO_PACKAGES, missing

DEFAULT_OUTPUT = Path("report-mico")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    several = "run this many seeds on all cores, and print medians and ranges, without a report"
    parser.add_argument("--seeds", type=at_least(1), help=several)
    folder = f"folder for what it makes (default {DEFAULT_OUTPUT})"
    parser.add_argument("--output", type=path, default=DEFAULT_OUTPUT, help=folder)


def run(arguments: argparse.Namespace) -> int:
    """Run as the options say.

    Returns:
        0: done. 2: something is missing or cannot be written, with a line on the standard error.
    """
    if absent := missing(DEMO_PACKAGES):
        return stop(f"demo-mico needs {', '.join(absent)}; type: {DEMO_INSTALL}")
    from onepeace_fast.demo.mico.run import run_one, run_seeds

    try:
        arguments.output.mkdir(parents=True, exist_ok=True)  # fail now, not after minutes of training
        if arguments.seeds:
            run_seeds(arguments.seed, arguments.seeds, arguments.output)
        else:
            run_one(arguments.seed, arguments.output)
    except ValueError as error:
        return stop(str(error))
    return 0
