"""What a run shows: TensorBoard's event files and how far it has come. A full disk costs curves, never the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from onepeace_fast.progress import progress

FOLDER = "tensorboard"


class Logs:
    """Numbers of the steps of one run, for the main process. ``with`` closes the bar and the files.

    Args:
        output: the run's folder; event files go into its ``tensorboard``.
        step, steps: optimizer steps done, and of the whole run.
        every: steps between two entries, each the mean over them.
        pairs: of one optimizer step, over all processes.
    """

    def __init__(self, output: Path, step: int, steps: int, every: int, pairs: int) -> None:
        self._folder, self._every, self._pairs = output / FOLDER, every, pairs
        self._writer: SummaryWriter | None = None
        self._failed = False
        self._next = step + 1  # a killed run's entries from here on are hidden: these steps are computed again
        self._losses: list[tuple[int, float]] = []  # the mean of each entry and how many steps it is of
        self._bar = progress("Training", "step", steps, initial=step)
        self._begin()

    def __enter__(self) -> Logs:
        self._hook, threading.excepthook = threading.excepthook, self._on_thread_failure
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer is not None:
            self._attempt(self._writer.close)
        threading.excepthook = self._hook

    def _on_thread_failure(self, failure: threading.ExceptHookArgs) -> None:
        """Leave out the traceback of TensorBoard's writing thread: its error comes back from the next entry."""
        writing = type(failure.thread).__module__.startswith("tensorboard.")
        if not (writing and isinstance(failure.exc_value, OSError)):
            self._hook(failure)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a finished step."""
        self._bar.update()
        for name, value in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if step % self._every and step != self._bar.total:
            return
        means = {name: total / self._count for name, total in self._sums.items()}
        means["samples_per_second"] = self._count * self._pairs / (time.perf_counter() - self._start)
        self._bar.set_postfix(loss=f"{means['loss']:.4g}", rate=f"{means['learning_rate']:.3g}", refresh=False)
        self._losses = [*self._losses[:1], (self._count, means["loss"])]
        self._attempt(lambda: self._write(step, means))
        self._begin()

    def summary(self) -> str:
        """How the loss went: its first entry and its last."""
        shown = [f"{loss:.4g} (mean of {count} {'step' if count == 1 else 'steps'})" for count, loss in self._losses]
        return f"Loss: {' at first, '.join(shown)}{' at the end' * (len(shown) - 1)}"

    def _begin(self) -> None:
        self._sums: dict[str, float] = {}
        self._count, self._start = 0, time.perf_counter()

    def _write(self, step: int, means: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(self._folder, purge_step=self._next)
        for name, value in means.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._next, self._failed = step + 1, False

    def _attempt(self, action: Callable[[], None]) -> None:
        """Run what writes event files; where it fails, say so once and try new files at the next entry."""
        try:
            action()
        except OSError as error:
            if not self._failed:
                self.say(f"{self._folder}: curves cannot be written: {error.strerror or error}; training goes on")
            self._writer, self._failed = None, True
