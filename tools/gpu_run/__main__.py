"""What `make gpu` runs after it has looked at this Python: python3 -m tools.gpu_run [--minutes M] [--stages A,B]"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.support.report import table
from tools.gpu_run import plan
from tools.gpu_run.processes import CUT, FAILED, PASSED, ROOT, Job, Log, Outcome, run_jobs
from tools.gpu_run.records import STAGE_HEADS, Files, outcomes_of, stage_row
from tools.gpu_run.schedule import LEFT_OUT, Keep, Stage, State, run_stages
from tools.scratch import use_scratch

MINUTES = 8.0
MOST_AT_ONCE = 12  # jobs, for the device's memory
REFRESH = 5.0  # seconds between two rewrites of the files while a stage runs
LINES_OF_A_FAILURE = 15
FAILURES_SHOWN = 30


def say(line: str) -> None:
    """Print a heading at once, before the output of the stage that it announces."""
    print(f"==> {line}", flush=True)


class Run:
    """One run: its stages, its files, and the clock that all share."""

    def __init__(self, machine: plan.Machine, stages: Sequence[Stage], seconds: float) -> None:
        self.machine, self.stages, self.seconds, self.start = machine, stages, seconds, time.monotonic()
        names = [stage.name for stage in stages]
        described = {"date": machine.date, "device": machine.device, "deadline_seconds": seconds}
        self.files = Files(machine.out, machine.date, machine.work, names, described)
        self.log = Log(machine.out / f"log_{machine.date}.txt")
        self.state, self.refreshed = State(), 0.0

    def execute(self, jobs: Sequence[Job], seconds: float, keep: Keep) -> list[Outcome]:
        """Run a phase's jobs side by side."""
        return run_jobs(jobs, seconds, min(self.machine.cores, MOST_AT_ONCE), self.log, self.tick, keep)

    def tick(self) -> None:
        """Rewrite the files now and then, for the tests that have come to an end since."""
        if time.monotonic() >= self.refreshed + REFRESH:
            self.write()

    def write(self) -> None:
        """Rewrite the files."""
        self.refreshed = time.monotonic()
        self.files.write(self.state, self.refreshed - self.start)

    def began(self, stage: Stage, share: float) -> None:
        """Announce a stage."""
        say(f"{stage.name}, at most {share:.0f} s: {stage.shows}")
        self.write()

    def ended(self, stage: Stage, state: State) -> None:
        """Tell what became of a stage, and write it down."""
        self.write()
        result = state.results[-1]
        tests = outcomes_of(self.machine.work, stage.name)
        for outcome in result.outcomes:
            if tests and outcome.state != FAILED:
                continue  # the stage's own line counts them
            if outcome.state != PASSED or stage.name == "build":
                print(f"    {outcome.name}: {outcome.state}, {outcome.seconds:.1f} s. {outcome.note}".rstrip(". "))
            for line in outcome.lines[-LINES_OF_A_FAILURE:] if outcome.state in (FAILED, CUT) and not tests else ():
                print(f"        {line}")
        failed = [test for test in tests if test["outcome"] == "failed"]
        for test in failed[:FAILURES_SHOWN]:
            print(f"    FAILED {test['test']}: {test['message'][:200]}")
        note = f": {result.note}" if result.note else ""
        say(f"{stage.name} {result.state} after {result.seconds:.0f} s{note}")
        if stage.name == "smoke" and result.state == FAILED:
            print("To look closer:")
            for outcome in result.outcomes:
                if outcome.state == FAILED:
                    print("\n".join(f"    {command}" for command in plan.closer_look(outcome.name)), flush=True)

    def run(self) -> int:
        """Run all stages and return 1 where something failed, else 0."""
        try:
            how = (self.execute, time.monotonic, self.began, self.ended)
            state = run_stages(self.stages, self.seconds, *how, self.state)
        finally:
            self.write()
        print()
        rows = [STAGE_HEADS]
        rows += [stage_row(result, outcomes_of(self.machine.work, result.name)) for result in state.results]
        print(table(rows))
        states = {result.name: result.state for result in state.results}
        if missing := [name for name, state in states.items() if state in (CUT, LEFT_OUT)]:
            print(f"Not everything has run: {', '.join(missing)}. Again: --stages {','.join(missing)}")
        if failed := [name for name, state in states.items() if state == FAILED]:
            print(f"FAILED: {', '.join(failed)}")
        print(f"Results in {self.machine.out}", flush=True)
        return int(bool(failed))


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns 0 where nothing failed, 1 where something did, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"deadline of all stages (default: {MINUTES:g})")
    parser.add_argument("--stages", help="only these, with commas between them, in their order (default: all)")
    parser.add_argument("--list", action="store_true", help="list the stages and run none")
    parser.add_argument("-k", dest="keyword", default="", metavar="EXPRESSION", help="of the tests only these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    use_scratch()  # all stages, so that each finds the kernels that those before it compiled
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%SZ")
    with tempfile.TemporaryDirectory(prefix="onepeace_fast_gpu_", ignore_cleanup_errors=True) as work:
        machine = plan.Machine(chosen.device, out, date, Path(work), os.cpu_count() or 1, chosen.keyword)
        return run(parser, machine, chosen)


def run(parser: argparse.ArgumentParser, machine: plan.Machine, chosen: argparse.Namespace) -> int:
    """List the stages, or run those that were chosen."""
    stages = plan.stages(machine)
    if chosen.list:
        print("\n".join(f"{stage.name:<12}{stage.shows}" for stage in stages))
        return 0
    names = [stage.name for stage in stages]
    wanted = chosen.stages.split(",") if chosen.stages else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--stages: expected some of {','.join(names)}, got {','.join(unknown)}")
    if not chosen.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {chosen.minutes:g}")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that no process is left behind
    return Run(machine, [stage for stage in stages if stage.name in wanted], 60 * chosen.minutes).run()


if __name__ == "__main__":
    sys.exit(main())
