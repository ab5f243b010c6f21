"""What ``onepeace-fast demo-unival`` and ``demo-mico`` do: run, and turn what can go wrong into one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onepeace_fast.command_line import at_least, path, stop
from onepeace_fast.info import DEMO_INSTALL, DEMO_PACKAGES, missing

if TYPE_CHECKING:
    from onepeace_fast.demo.seeds import Demo


@dataclass(frozen=True)
class PaperCommand:
    """A command that tries a paper's claims: the model's name, and what imports its demo."""

    name: str
    load: Callable[[], Demo]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options of the demo."""
        parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
        several = "run this many seeds on all cores, and print medians and ranges, without a report"
        parser.add_argument("--seeds", type=at_least(1), help=several)
        output = Path(f"report-{self.name}")
        folder = f"folder for what it makes (default {output})"
        parser.add_argument("--output", type=path, default=output, help=folder)

    def run(self, arguments: argparse.Namespace) -> int:
        """Run as the options say.

        Returns:
            0: done. 2: something is missing or cannot be written, with a line on the standard error.
        """
        if absent := missing(DEMO_PACKAGES):
            return stop(f"demo-{self.name} needs {', '.join(absent)}; type: {DEMO_INSTALL}")
        demo, first = self.load(), arguments.seed
        try:
            arguments.output.mkdir(parents=True, exist_ok=True)  # fail now, not after minutes of training
            if arguments.seeds:
                demo.run_seeds(range(first, first + arguments.seeds), arguments.output)
            else:
                demo.run_one(first, arguments.output)
        except ValueError as error:
            return stop(str(error))
        return 0


def _unival() -> Demo:
    from onepeace_fast.demo.unival.run import demo

    return demo()


def _mico() -> Demo:
    from onepeace_fast.demo.mico.run import demo

    return demo()


UNIVAL = PaperCommand("unival", _unival)
MICO = PaperCommand("mico", _mico)
