"""Jobs: commands that run side by side, each in a process group of its own that is ended as a whole."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.support.watchdog import LIMIT, ended_by_watchdog

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0  # seconds between the request to end and the end: a compiler is not interrupted
LAST = 1.0  # seconds for a process that was killed to be gone
TICK = 0.2  # seconds between two looks at the processes
TAIL = 400  # lines of a job's output that are kept to judge it by
MOST_LOGGED = 12 * 2**20  # bytes of the log
RESTARTS = 8

PASSED, FAILED, CUT, UNAVAILABLE = "passed", "failed", "cut short", "not available here"
Judge = Callable[[int, Sequence[str]], tuple[str, str]]


def by_exit_code(code: int, lines: Sequence[str]) -> tuple[str, str]:
    """A job has passed if its exit code is 0; else the last line that it printed says why."""
    return (PASSED, "") if code == 0 else (FAILED, f"exit code {code}: {lines[-1].strip() if lines else 'no output'}")


@dataclass(frozen=True)
class Job:
    """A command, which is told how many seconds are left for it.

    ``shown``: its lines are printed at once. ``judge`` makes a state and a note of its exit code and last lines. After
    an exit code that ``again`` accepts it is started anew, to go on with what is left. Where a ``needed`` job has not
    passed, nothing after it makes sense, nor where it failed with an exit code that ``ends_run`` accepts, which is told
    None where nothing ended the process. ``most_seconds`` are how long its ``Watchdog`` waits for the GPU's answer.
    """

    name: str
    command: Callable[[float], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    shown: bool = False
    judge: Judge = by_exit_code
    again: Callable[[int], bool] = lambda code: False
    needed: bool = False
    ends_run: Callable[[int | None], bool] = lambda code: False
    most_seconds: float | None = None


class Outcome(NamedTuple):
    """What became of a job."""

    name: str
    state: str
    seconds: float
    note: str = ""
    lines: Sequence[str] = ()
    needed: bool = False
    ends_run: bool = False


class Log:
    """Every line of every job, in one file that grows as they come."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def line(self, job: str, text: str) -> None:
        """Add a line, unless the file is full."""
        if self._file.tell() > MOST_LOGGED:
            return
        self._file.write(f"[{job}] {text}\n")
        if self._file.tell() > MOST_LOGGED:
            self._file.write("The log is full: lines after this one are not kept.\n")
        self._file.flush()


class _Running:
    """A job's process and what it has printed."""

    def __init__(self, job: Job, seconds: float) -> None:
        self.job, self.start, self.ending, self.restarts = job, time.monotonic(), 0.0, 0
        self.lines: deque[str] = deque(maxlen=TAIL)
        self.launch(seconds)

    def launch(self, seconds: float) -> None:
        self._rest = b""
        limit = {LIMIT: f"{self.job.most_seconds:g}"} if self.job.most_seconds else {}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **limit, **self.job.environment}
        self.process = subprocess.Popen(
            list(self.job.command(seconds)), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
        )  # fmt: skip
        os.set_blocking(self.process.stdout.fileno(), False)

    def read(self, log: Log) -> None:
        """Take what has been printed since."""
        while chunk := self.process.stdout.read(65536):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                self._keep(line, log)

    def finish(self, log: Log) -> None:
        """End what is left of the group, and take the last lines."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold what was killed
            self.process.wait(LAST)
        self.read(log)
        if self._rest:
            self._keep(self._rest, log)
        self.process.stdout.close()

    def _keep(self, line: bytes, log: Log) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        self.lines.append(text)
        log.line(self.job.name, text)
        if self.job.shown:
            print(text, flush=True)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def outcome(self) -> Outcome:
        seconds = time.monotonic() - self.start
        code = self.process.returncode
        if code is None:
            state, note = FAILED, "it was killed and has not ended: the device may hang"
        elif self.ending:
            state, note = CUT, f"ended after {seconds:.0f} s, at the end of its time"
        elif ended_by_watchdog(code):
            state, note = FAILED, f"no answer within {self.job.most_seconds:g} s: a kernel may hang"
        else:
            state, note = self.job.judge(code, self.lines)
        ends_run = state == FAILED and self.job.ends_run(code)
        return Outcome(self.job.name, state, seconds, note, list(self.lines), self.job.needed, ends_run)


def run_jobs(
    jobs: Sequence[Job], seconds: float, at_once: int, log: Log, tick: Callable[[], None] = lambda: None,
    keep: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Run jobs side by side, at most ``at_once``, and end the groups of those that run after ``seconds``.

    ``tick`` is called again and again meanwhile, ``keep`` with each outcome as soon as it is known. Whatever ends this
    function, no job goes on.
    """
    stop = time.monotonic() + seconds
    waiting, running, outcomes = list(jobs), [], {}
    selector = selectors.DefaultSelector()
    try:
        while waiting or running:
            while waiting and len(running) < at_once and time.monotonic() < stop:
                running.append(_Running(waiting.pop(0), stop - time.monotonic()))
                selector.register(running[-1].process.stdout, selectors.EVENT_READ)
            if waiting and not running:
                break  # the time is over
            selector.select(TICK)
            now = time.monotonic()
            for one in list(running):
                one.read(log)
                if now >= stop and not one.ending:
                    one.ending = now
                    one.signal(signal.SIGTERM)
                if one.process.poll() is None and not (one.ending and now >= one.ending + GRACE):
                    continue
                selector.unregister(one.process.stdout)
                one.finish(log)
                if not one.ending and one.restarts < RESTARTS and one.job.again(one.process.returncode):
                    one.restarts += 1
                    log.line(one.job.name, f"started again after exit code {one.process.returncode}")
                    one.launch(stop - now)
                    selector.register(one.process.stdout, selectors.EVENT_READ)
                    continue
                running.remove(one)
                outcomes[one.job.name] = one.outcome()
                keep(outcomes[one.job.name])
            tick()
    finally:
        for one in running:
            one.finish(log)
        selector.close()
    for job in waiting:
        outcomes[job.name] = Outcome(job.name, CUT, 0.0, "not started: no time was left", needed=job.needed)
    return [outcomes[job.name] for job in jobs]


def python(*arguments: str) -> Callable[[float], Sequence[str]]:
    """A command of this interpreter that does not ask how much time is left."""
    return lambda seconds: [sys.executable, *arguments]
