"""The command `onepeace-fast report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from onepeace_fast.command_line import path, stop
from onepeace_fast.info import missing
from onepeace_fast.installation import install_command

PACKAGES = {"matplotlib": "matplotlib", "jinja2": "jinja2"}
DEFAULT_OUTPUT = Path("report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the report."""
    text = "results of benchmarks or of the model of the kernels, such as benchmarks/results/cpu_*.json"
    parser.add_argument("files", type=path, nargs="+", metavar="FILE", help=text)
    text = "an earlier file of times: what changed beyond the noise since then is flagged"
    parser.add_argument("--before", type=path, metavar="FILE", help=text)
    text = f"folder for the page and its pictures (default {DEFAULT_OUTPUT})"
    parser.add_argument("--output", type=path, default=DEFAULT_OUTPUT, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Write the page.

    Returns:
        0: written. 1: written, and something is worse than before beyond the noise. 2: a file or a package is missing
        or does not fit, which a line says.
    """
    if absent := missing(PACKAGES):
        return stop(f"report needs {', '.join(absent)}; type: {install_command('report')}")
    from onepeace_fast.report import page
    from onepeace_fast.report.changes import Comparison, compare
    from onepeace_fast.report.results import Results, read

    comparison: Comparison | None = None
    names: list[str] = []
    try:
        files = [read(one) for one in dict.fromkeys(arguments.files)]
        if arguments.before is not None:
            before, after = read(arguments.before), [file for file in files if isinstance(file, Results)]
            if not isinstance(before, Results):
                return stop(f"--before: expected a file of times, got the model {arguments.before}")
            if len(after) != 1:
                return stop(f"--before: expected one file of times to compare with, got {len(after)}; name one")
            comparison, names = compare(before, after[0]), [before.title, after[0].title]
            if not comparison.changes:
                return stop(f"--before: expected a figure that both files have, got none in {arguments.before}")
    except ValueError as error:
        return stop(str(error))
    written, pictures = page.write(files, arguments.output, comparison, names)
    for line in [] if comparison is None else _lines(comparison):
        print(line)
    print(f"{written}, {len(pictures)} pictures")
    return int(comparison is not None and any(change.worse for change in comparison.changes))


def _lines(comparison: object) -> list[str]:
    from onepeace_fast.report.changes import Comparison
    from onepeace_fast.report.page import _shown

    assert isinstance(comparison, Comparison)
    middle, most = comparison.noise
    lines = [
        f"{verdict} {what}: {values}, {change}, noise {noise}"
        for verdict, what, values, change, noise in map(_shown, comparison.flagged)
    ]
    return [
        *lines,
        f"{len(comparison.changes)} figures compared, {len(lines)} changed beyond the noise, which was {middle:.1%} in "
        f"the middle and {most:.1%} at most; all figures together moved by {comparison.drift:+.1%}",
    ]
