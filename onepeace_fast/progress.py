"""How far long work has come, on the standard error: a bar on a terminal, a line every 30 seconds anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from importlib.util import find_spec
from typing import Any, Protocol

SECONDS = 30.0  # between two lines


class Progress(Protocol):
    """What ``progress`` returns, in tqdm's words."""

    total: int | None

    def update(self, n: int = 1) -> Any:
        """Note that ``n`` more are done."""

    def set_postfix(self, *, refresh: bool = True, **figures: str) -> None:
        """Show these figures from the next refresh on."""

    def write(self, line: str) -> None:
        """Print a line of its own to the standard output."""

    def close(self) -> None:
        """Show the end."""


def progress(description: str, unit: str, total: int | None = None, initial: int = 0) -> Progress:
    """A progress bar by tqdm where the standard error is a terminal and tqdm is installed, else lines.

    ``total`` may be unknown, and ``initial`` was done before.
    """
    if sys.stderr.isatty() and find_spec("tqdm") is not None:
        from tqdm import tqdm

        return tqdm(desc=description, total=total, initial=initial, unit=unit, mininterval=1.0)
    return Lines(description, unit, total, initial)


class Lines:
    """A line at the first update after every ``SECONDS``, and one at the end."""

    def __init__(self, description: str, unit: str, total: int | None, initial: int) -> None:
        self.total = total
        self._description, self._unit = description, unit
        self._done, self._first, self._figures = initial, initial, ""
        self._start = self._said = time.monotonic()
        self._said_done: int | None = None

    def update(self, n: int = 1) -> None:
        """Note that ``n`` more are done."""
        self._done += n
        if time.monotonic() - self._said >= SECONDS:
            self._say()

    def set_postfix(self, *, refresh: bool = True, **figures: str) -> None:
        """Show these figures from the next line on."""
        self._figures = "".join(f", {name}={value}" for name, value in figures.items())

    def write(self, line: str) -> None:
        """Print a line of its own to the standard output."""
        print(line, flush=True)

    def close(self) -> None:
        """Say how far it came, unless the last line said so."""
        if self._done not in (self._first, self._said_done):
            self._say()

    def _say(self) -> None:
        self._said, self._said_done = time.monotonic(), self._done
        seconds = self._said - self._start
        if self.total is None:
            place, left = f"{self._done:,}", ""
        else:
            place = f"{self._done:,} of {self.total:,}"
            remaining = (self.total - self._done) * seconds / max(self._done - self._first, 1)
            left = f", about {remaining:.0f} s left" if self._done < self.total else ""
        line = f"{self._description}: {place} {self._unit}s in {seconds:.0f} s{left}{self._figures}"
        with contextlib.suppress(OSError):  # a full disk costs a line, never the work
            print(line, file=sys.stderr, flush=True)
