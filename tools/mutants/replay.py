"""Plant a fault in a copy of this checkout and run the tests that must fail by it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.mutants.fault import ROOT, Fault

COPIED = ("benchmarks", "build_backend", "csrc", "kernels", "onepeace_fast", "tests", "tools", "pyproject.toml")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "onepeace_*.xz", "*.egg-info")  # 8 MB that no fault needs
LONGEST = 300  # seconds of one mutant's tests
LONGEST_CONTROL = 1800  # seconds of the tests of all mutants


class Outcome(NamedTuple):
    """What a run of tests came to: "passed", "caught" by a compared value, or another word that says why neither."""

    word: str
    detail: str = ""


def copy_checkout(folder: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=NOT_COPIED)
        else:
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str], cache: Path, longest: int) -> Outcome:
    """Run tests of a copy in the interpreter, until the first fails; what g++ builds for them stays in a cache."""
    report = folder / "report.xml"
    options = ["-q", "-x", "-m", "", "-o", f"cache_dir={cache}", "-p", "no:randomly", f"--junitxml={report}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests], cwd=folder, env=environment, text=True,
            capture_output=True, timeout=longest,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome("endless", f"no end after {longest} s")
    if process.returncode < 0:
        return Outcome("broken", f"the tests died by signal {-process.returncode}")
    if not report.exists():
        return Outcome("broken", (process.stdout + process.stderr).strip().splitlines()[-1])
    return judge(report.read_text(encoding="utf-8"))


def judge(report: str) -> Outcome:
    """Read pytest's report: only a failed assertion, in a test that ran, is a compared value."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    for case in cases:
        for error in case.iter("error"):
            return Outcome("broken", f"{case.get('name')}: {_first_line(error)}")
        for failure in case.iter("failure"):
            line = _first_line(failure)
            word = "caught" if line.startswith(("AssertionError", "assert ")) else "broken"
            return Outcome(word, f"{case.get('name')}: {line}")
    ran = sum(not list(case.iter("skipped")) for case in cases)
    return Outcome("passed", f"{ran} tests") if ran else Outcome("broken", "no test ran")


def _first_line(element: ElementTree.Element) -> str:
    return (element.get("message") or "").strip().split("\n")[0][:120]


def replay(fault: Fault, cache: Path) -> Outcome:
    """Plant a fault in a copy and run its tests; a cache shares the builds of csrc among faults that lie elsewhere."""
    if (problem := fault.problem()) is not None:
        return Outcome("not planted", problem)
    return _in_a_copy(fault.tests, cache, LONGEST, fault)


def control(faults: Sequence[Fault], cache: Path) -> Outcome:
    """Run the tests of all faults where nothing is planted."""
    return _in_a_copy(list(dict.fromkeys(test for fault in faults for test in fault.tests)), cache, LONGEST_CONTROL)


def _in_a_copy(tests: Sequence[str], cache: Path, longest: int, fault: Fault | None = None) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_checkout(folder)
        if fault is not None:
            path = folder / fault.file
            path.write_text(fault.plant(path.read_text(encoding="utf-8")), encoding="utf-8")
            if fault.file.startswith("csrc/"):
                cache = folder / "cache"  # builds of csrc wait for each other
        return run_tests(folder, tests, cache, longest)
