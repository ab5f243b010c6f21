"""Every op, the layer and a training step against every peer that runs here, forward and backward.

All variants of a section take turns in one process when its first row is asked for; each row then shows one peer's
times. On a GPU at the model's sizes, on a CPU at small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.support.peers import OWN, PEERS, PRODUCTS, Peer, device_here
from benchmarks.support.report import Report
from benchmarks.support.sections import Section
from benchmarks.support.suites import SUITES, setting, suite
from benchmarks.support.timing import show
from benchmarks.support.variants import MODES, Budget, Runner
from onepeace_fast.timing import Timing, clock_for

ROUNDS = 15
ROWS = [
    pytest.param(name, i, peer.name, mode, id=f"{name}-{i}-{peer.name}-{mode}")
    for name in SUITES
    for i in range(len(suite(name, device_here())))
    for mode in MODES
    for peer in (OWN, PRODUCTS, *PEERS)
    if name in peer.variants
]
Measured = Callable[[str, int], tuple[Section, dict[str, Any], dict[tuple[str, str], Timing]]]


@pytest.fixture(scope="module")
def measured(pytestconfig: pytest.Config) -> Measured:
    """Measures a section of a suite once."""
    device, found = device_here(), {}
    where, full = setting(device), pytestconfig.getoption("--full")

    def measure(name: str, i: int) -> tuple[Section, dict[str, Any], dict[tuple[str, str], Timing]]:
        if (name, i) not in found:
            section = suite(name, device, full)[i]
            runner = Runner(clock_for(device), Budget(pytestconfig.getoption("--case-seconds")), ROUNDS)
            runner.budget.compiling_is_free = True
            record = section.measure(where, runner)
            found.clear()  # the rows of a section follow each other
            found[name, i] = section, record, runner.timings
        return found[name, i]

    return measure


@pytest.mark.parametrize("suite_name, i, peer, mode", ROWS, indirect=["peer"])
def test_peer(
    suite_name: str, i: int, peer: Peer, mode: str, measured: Measured, benchmark: Any, report: Report
) -> None:
    """One row of a section: a peer's times in turn with all others', or why it has none."""
    section, record, timings = measured(suite_name, i)
    report.sections[section.name] = record
    assert "error" not in record, record["error"]
    names = [name for name in peer.variants[suite_name] if name in record["variants"]]
    if not names:
        pytest.skip(f"{peer.name}: it does not do this operation")
    (name, *others) = names
    found = record["variants"][name]
    if reason := found.get("skipped"):
        pytest.skip(f"{peer.name}: {reason}")
    if fault := next((f"{state}: {found[state]}" for state in ("wrong", "error") if state in found), None):
        if peer is OWN:
            pytest.fail(fault)
        pytest.xfail(f"{peer.name}: {fault}")
    if mode not in found:
        pytest.skip(f"{peer.name}: it has no {mode} pass here")
    benchmark.group, benchmark.name = f"{section.name}, {mode}", name
    benchmark.extra_info.update({key: value for key, value in found.items() if key not in MODES}, also=others)
    timing = timings[name, mode]
    show(benchmark, timing.cpu or timing.seconds)
