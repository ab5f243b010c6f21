"""What ``onepeace-fast merge`` does: average checkpoints into one."""

from __future__ import annotations

import argparse
import os

from onepeace_fast.command_line import path, stop
from onepeace_fast.merging.files import check_out, write
from onepeace_fast.merging.merge import combine, read_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    text = "a checkpoint and its weight; the weights sum to 1"
    parser.add_argument("models", nargs="+", type=_weighted, metavar="CHECKPOINT=WEIGHT", help=text)
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="where the average goes, in their form")


def run(arguments: argparse.Namespace) -> int:
    """Average as the arguments say.

    Returns:
        0: done. 2: something does not fit, with a line on the standard error.
    """
    try:
        sources, weights = read_all(arguments.models)
        check_out(sources, arguments.out)
        write(sources, combine(sources, weights), arguments.out)
    except ValueError as error:
        return stop(str(error))
    print(f"{arguments.out}: the average of {len(sources)} models")
    return 0


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        if name:
            return os.path.expanduser(name), float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected CHECKPOINT=WEIGHT, such as a.pt=0.5, got {text!r}")
