"""Options of the benchmarks, their threads, and the tables that are printed after them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401  inductor needs it, and it must come before the distutils that others import

from benchmarks.support import machine, peers, results  # noqa: E402
from benchmarks.support.peers import peer  # noqa: E402, F401
from benchmarks.support.report import Report, write_json  # noqa: E402
from benchmarks.support.timing import REPLAY  # noqa: E402
from tools.scratch import use_scratch  # noqa: E402

use_scratch()

REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add this suite's options."""
    group = parser.getgroup("onepeace_fast benchmarks")
    group.addoption("--threads", type=int, default=1, help="threads of torch on a CPU (default: 1)")
    group.addoption("--case-seconds", type=float, default=3.0, help="time for each timed case (default: 3)")
    group.addoption("--full", action="store_true", help="on a CPU also compiled peers and the long cases")
    group.addoption("--results", type=Path, help="also write what was measured to a JSON file in this folder")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the written order, whatever a plugin made of it: the tables follow it."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))
        if item.get_closest_marker("full") and not item.config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="takes long: with --full alone"))
    if all(item.path.parent == Path(__file__).parent for item in items):
        items.sort(key=lambda item: (item.path, list(item.callspec.indices.values())))


def pytest_configure(config: pytest.Config) -> None:
    """Start an empty report."""
    config.stash[REPORT] = Report()


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Report:
    """Where a benchmark puts its rows."""
    return pytestconfig.stash[REPORT]


@pytest.fixture
def case_seconds(pytestconfig: pytest.Config) -> float:
    """About how long one case may take."""
    return pytestconfig.getoption("--case-seconds")


@pytest.fixture(autouse=True)
def threads(pytestconfig: pytest.Config) -> Iterator[int]:
    """Run with a fixed number of threads."""
    before, chosen = torch.get_num_threads(), pytestconfig.getoption("--threads")
    torch.set_num_threads(chosen)
    yield chosen
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables, and write them where that was asked for."""
    report = config.stash[REPORT]
    if not report.rows and not report.sections:
        return
    device, full = peers.device_here(), config.getoption("--full")
    terminalreporter.section("onepeace_fast", sep="=")
    terminalreporter.write_line("\n\n".join(filter(None, (results.text(report.sections), report.text()))))
    if report.sections:
        for name, reason in peers.here(device, full)[1].items():
            terminalreporter.write_line(f"{name} is not measured: {reason}")
    if folder := config.getoption("--results"):
        found = results.begun(device, report.sections)
        found["machine"]["threads"] = config.getoption("--threads")
        path = folder / machine.file_name(device.type.replace("cuda", "gpu"), found["machine"], found["date"])
        write_json(path, found | {"measured": report.measured(), "table": report.text()})
        terminalreporter.write_line(f"\nWritten to {path}")
