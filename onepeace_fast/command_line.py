"""What the commands share: types of their arguments, and how they stop."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path


def path(text: str) -> Path:
    """A path, with ``~`` for the home folder."""
    return Path(os.path.expanduser(text))


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number from ``least`` on."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return parse


def stop(line: str, code: int = 2) -> int:
    """Say on the standard error why nothing more is done; the exit code."""
    print(line, file=sys.stderr)
    return code
