"""A pytest plugin: every test's outcome on a line of its own as soon as it is known, so that no end of a run loses it.

``GPU_RUN_TESTS`` names the file that it adds to; tests whose outcome is in ``GPU_RUN_TESTED`` already, files with
colons between them, are not run again. A process whose device answers no more, as after an illegal access, ends after
the test by which that is seen; started again, it goes on after that test, as it does after one that ended its process
itself, or in which nothing answered for ``GPU_RUN_MOST_SECONDS``. ``GPU_RUN_SHARD``, as in 2/3, chooses one shard of a
file's tests.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.support.watchdog import Watchdog

DEVICE_LOST = 33  # exit code, none of pytest's own
UNFINISHED = "its process ended while it ran: by a fault, or since a kernel may hang; the log has its stack"
LOST = "it passed, but the device answers no more"
LONGEST = 4000  # characters of an error that are kept, its end


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; one that was cut off in the middle of a line counts without it."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def device_lost() -> bool:
    """Whether this process used a device that answers no more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the other shards, and what has an outcome already."""
    shard, shards = map(int, os.environ.get("GPU_RUN_SHARD", "1/1").split("/"))
    # Sorted, since another plugin may have put them into another order in each process.
    mine = set(sorted(item.nodeid for item in items)[shard - 1 :: shards])
    for name in filter(None, os.environ.get("GPU_RUN_TESTED", "").split(":")):
        mine -= {record["test"] for record in read_records(Path(name)) if "outcome" in record}
    mine -= config.pluginmanager.get_plugin("gpu_run_recorder").tested
    if left_out := [item for item in items if item.nodeid not in mine]:
        items[:] = [item for item in items if item.nodeid in mine]
        config.hook.pytest_deselected(items=left_out)


def pytest_configure(config: Any) -> None:
    """Record from the start."""
    watchdog = Watchdog(os.dup(2))  # while tests run, pytest has 2 for itself
    config.pluginmanager.register(Recorder(Path(os.environ["GPU_RUN_TESTS"]), watchdog), "gpu_run_recorder")


class Recorder:
    """Writes the records; ``tested`` are the tests that earlier processes of the same file have begun."""

    def __init__(self, path: Path, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        before = read_records(path)
        self.tested = {record["test"] for record in before}
        self.file = path.open("a", encoding="utf-8")
        for name in sorted(self.tested - {record["test"] for record in before if "outcome" in record}):
            self._write(test=name, outcome="failed", seconds=0.0, when="call", message=UNFINISHED, text=UNFINISHED)
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.passed: set[str] = set()

    def _write(self, **record: Any) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test that has begun and never ends is one that ended its process."""
        self._write(test=nodeid, began=True)
        self.watchdog.restart()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test has passed once the device has answered after it; a process that can show nothing more ends here."""
        lost = device_lost()
        if nodeid in self.passed and nodeid not in self.failed:
            fault = {"when": "call", "message": LOST, "text": LOST} if lost else {}
            self._write(test=nodeid, outcome="failed" if lost else "passed", seconds=self.seconds[nodeid], **fault)
        if lost:
            print(f"{nodeid}: the device answers no more, so this process ends", file=sys.stderr, flush=True)
            os._exit(DEVICE_LOST)
        self.watchdog.stop()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Setup, call and teardown together make the outcome."""
        name = report.nodeid
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.failed and name not in self.failed:
            self.failed[name] = report.when
            message = _reason(report)
            self._write(
                test=name, outcome="failed", seconds=self.seconds[name], when=report.when, message=message,
                text=report.longreprtext[-LONGEST:],
            )  # fmt: skip
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self._write(test=name, outcome="skipped", seconds=self.seconds[name], message=reason)
        elif report.when == "call" and report.passed:
            self.passed.add(name)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a failure."""
        if report.failed:
            text = report.longreprtext[-LONGEST:]
            self._write(test=report.nodeid, outcome="failed", seconds=0.0, when="collect", message=text, text=text)


def _reason(report: Any) -> str:
    """The error in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else report.longreprtext).split())[:500]
