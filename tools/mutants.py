"""Plant faults in the kernels, one after another, each in a copy of this checkout, and see the tests fail by it.

    python -m tools.mutants [NAME...]

``mutants.json`` has the faults: a file, a text that occurs in it exactly once, what takes its place, and the tests that
must fail, in Triton's interpreter or, for csrc, with the sources built for this CPU. The same tests must pass where
nothing is planted. A mutant is caught only where a test fails by a value that it compared or by what a sanitizer says:
an error at import, or a kernel that does not compile or run, catches nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FAULTS = Path(__file__).with_suffix(".json")
COPIED = ("csrc", "kernels", "onepeace_fast", "tests", "tools", "pyproject.toml")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "goldens", "*.egg-info")
LONGEST = 300  # seconds of one mutant's tests


class Fault(NamedTuple):
    """A fault and the tests, as pytest's arguments, that must fail by it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def problem(self, root: Path = ROOT) -> str | None:
        """Why it cannot be planted here, or None."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        count = path.read_text(encoding="utf-8").count(self.old)
        return None if count == 1 else f"its old text occurs {count} times in {self.file}, not once"


class Outcome(NamedTuple):
    """What a run of tests came to: "passed", "caught" by a compared value, or another word that says why neither."""

    word: str
    detail: str = ""


def read_faults(path: Path = FAULTS) -> list[Fault]:
    """The faults of the data file."""
    faults = json.loads(path.read_text(encoding="utf-8"))
    return [Fault(f["name"], f["file"], f["old"], f["new"], tuple(f["tests"])) for f in faults]


def copy_checkout(folder: Path) -> None:
    """Copy what the kernels' tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=NOT_COPIED)
        else:
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str]) -> Outcome:
    """Run tests of a copy in the interpreter, until the first fails."""
    report = folder / "report.xml"
    options = ["-q", "-x", "-m", "", "-p", "no:cacheprovider", "-p", "no:randomly", f"--junitxml={report}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests], cwd=folder, env=environment, text=True,
            capture_output=True, timeout=LONGEST,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome("endless", f"no end after {LONGEST} s")
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


def replay(fault: Fault) -> Outcome:
    """Plant a fault in a copy and run its tests."""
    if (problem := fault.problem()) is not None:
        return Outcome("not planted", problem)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_checkout(folder)
        path = folder / fault.file
        path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        return run_tests(folder, fault.tests)


def control(faults: Sequence[Fault]) -> Outcome:
    """Run the tests of all faults where nothing is planted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_checkout(folder)
        return run_tests(folder, list(dict.fromkeys(test for fault in faults for test in fault.tests)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay, print a line each, and return 0 where the control passed and every mutant was caught."""
    parser = argparse.ArgumentParser(prog="make mutants", description="Plant faults and see the tests fail by them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these faults")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="at once (default: one a core)")
    options = parser.parse_args(arguments)
    faults = read_faults()
    if unknown := set(options.names) - {fault.name for fault in faults}:
        print(f"make mutants: got {', '.join(sorted(unknown))}, takes {', '.join(fault.name for fault in faults)}")
        return 2
    faults = [fault for fault in faults if not options.names or fault.name in options.names]
    with ThreadPoolExecutor(options.workers) as pool:
        unplanted, outcomes = pool.submit(control, faults), [pool.submit(replay, fault) for fault in faults]
        print(f"control      {unplanted.result().word}: {unplanted.result().detail}", flush=True)
        for fault, outcome in zip(faults, outcomes, strict=True):
            print(f"{outcome.result().word:12} {fault.name}: {outcome.result().detail}", flush=True)
    caught = sum(outcome.result().word == "caught" for outcome in outcomes)
    passed = unplanted.result().word == "passed"
    print(f"{caught} of {len(faults)} mutants caught; control {'passed' if passed else 'FAILED'}")
    return 0 if passed and caught == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
