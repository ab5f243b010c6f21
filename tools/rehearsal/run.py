"""The rehearsal: every file of GPU tests in a process of its own, the benchmark, and steps that are really compiled.

The short form chooses programs and compiles none in the tests, and leaves the benchmark out; the steps are compiled in
both. Both end with one line; each fault is a line of its own, and no test at all is a fault.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tools.gpu_run.plan import files_of_gpu_tests
from tools.rehearsal.native import ROOT

SHORT_STEPS = ("routed_ffn", "layer_norm", "residual_layer_norm", "gated_sub_ln")


@dataclass
class Outcome:
    """What a process of the rehearsal found. ``tests`` counts how tests ended: passed, left out, values, skipped."""

    name: str
    seconds: float = 0.0
    tests: Counter[str] = field(default_factory=Counter)
    programs: dict[str, str] = field(default_factory=dict)
    launches: int = 0
    faults: list[str] = field(default_factory=list)


def _process(
    outcome: Outcome, command: Sequence[str], compiling: bool, **environment: str
) -> subprocess.CompletedProcess:
    """Run a process of the rehearsal in the checkout, with the emulated GPU's compiling on or off."""
    start = time.monotonic()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    mine = {"PYTHONPATH": paths, "REHEARSAL_COMPILING": "1" if compiling else "", **environment}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env={**inherited, **mine}, text=True, capture_output=True
    )
    outcome.seconds = time.monotonic() - start
    return result


def rehearse_tests(path: str, compiling: bool) -> Outcome:
    """The GPU tests of a file."""
    outcome = Outcome(os.path.relpath(path, ROOT) if os.path.isabs(path) else path)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["-p", "tools.rehearsal.plugin", "-p", "no:cacheprovider", "-m", "gpu", "-q", "--tb=no"]
        result = _process(outcome, ["pytest", *options, path], compiling, REHEARSAL_REPORT=str(report))
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
    if found is None:
        lines = (result.stdout + result.stderr).strip().splitlines() or ["no output"]
        outcome.faults.append(f"{outcome.name}: expected a report, got exit code {result.returncode}: {lines[-1]}")
        return outcome
    outcome.programs, outcome.launches = found["programs"], found["launches"]
    for name, test in found["tests"].items():
        outcome.tests[test["ended"]] += 1
        if test["ended"] == "fault":
            outcome.faults.append(f"{name}: {test['line']}")
    if result.returncode not in (0, 5) and not outcome.faults:
        outcome.faults.append(f"{outcome.name}: expected exit code 0, got {result.returncode}")
    return outcome


def rehearse_module(module: str, arguments: Sequence[str], compiling: bool) -> Outcome:
    """A module that prints what it found as JSON in its last line."""
    outcome = Outcome(module)
    result = _process(outcome, [module, *arguments], compiling)
    try:
        found = json.loads(result.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        lines = (result.stdout + result.stderr).strip().splitlines() or ["no output"]
        outcome.faults.append(f"{module}: expected its findings, got exit code {result.returncode}: {lines[-1]}")
        return outcome
    outcome.programs, outcome.launches, outcome.faults = found["programs"], found["launches"], found["faults"]
    return outcome


def rehearse(short: bool, chosen: Sequence[str] = ()) -> list[Outcome]:
    """All outcomes, as many at a time as there are cores; ``chosen`` files of tests alone where there are any."""
    files = chosen or files_of_gpu_tests()
    steps = [argument for name in SHORT_STEPS for argument in ("--only", name)] if short else []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        waiting = [] if chosen else [threads.submit(rehearse_module, "tools.rehearsal.step", steps, True)]
        waiting += [threads.submit(rehearse_tests, path, not short) for path in files]
        if not (short or chosen):
            waiting.append(threads.submit(rehearse_module, "tools.rehearsal.benchmark", [], False))
        outcomes = []
        for future in waiting:
            outcomes.append(future.result())
            print(line_of(outcomes[-1]), flush=True)
    return outcomes


def line_of(outcome: Outcome) -> str:
    """What a process did, in one line."""
    ends = ", ".join(f"{count} {ended}" for ended, count in sorted(outcome.tests.items()))
    counts = f"{len(outcome.programs)} compiles, {outcome.launches} launches, {outcome.seconds:.0f} s"
    return f"{outcome.name}: {ends + '; ' if ends else ''}{counts}"


def judge(outcomes: Sequence[Outcome]) -> tuple[list[str], str]:
    """Every fault in a line, and the line that sums up."""
    tests = sum((outcome.tests for outcome in outcomes), Counter())
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    ran = tests["passed"] + tests["fault"] + tests["values"]
    if not ran:
        faults.append("the rehearsal: expected tests for a GPU, got none that ran")
    programs = {key for outcome in outcomes for key in outcome.programs}
    launches = sum(outcome.launches for outcome in outcomes)
    notes = []
    if tests["values"]:
        notes.append(f"{tests['values']} end where they look at what nobody computed")
    if rest := tests["left out"] + tests["skipped"]:
        notes.append(f"{rest} more cannot run here")
    summary = f"rehearsal: {ran} tests, {len(programs)} compiles, {launches} launches, {len(faults)} faults"
    return faults, summary + (f" ({'; '.join(notes)})" if notes else "")


def main(short: bool, chosen: Sequence[str] = ()) -> int:
    """Run, print every fault and the summary; return 1 where there are faults."""
    faults, summary = judge(rehearse(short, chosen))
    for fault in faults:
        print(f"fault: {fault}")
    print(summary, flush=True)
    return 1 if faults else 0
