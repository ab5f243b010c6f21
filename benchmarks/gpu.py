"""Measure this library on a GPU: python3 benchmarks/gpu.py --out DIR

Section by section, the most telling first. After each, its table is printed, and one JSON file with every time,
ceiling, version and error and one Markdown file with all tables are written anew, whole at any moment. Needs torch and
this library alone. `--device cpu --quick` runs the same logic over tiny shapes. How things are timed:
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()  # before what takes seconds to import

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.support import machine, tables  # noqa: E402
from benchmarks.support.ceilings import ceilings  # noqa: E402
from benchmarks.support.layer import MODEL_LAYERS  # noqa: E402
from benchmarks.support.report import write_json, write_text  # noqa: E402
from benchmarks.support.sections import FULL, TINY, Section, Setting, headline, rest  # noqa: E402
from benchmarks.support.variants import HOW_FUSED_RUNS, Budget, Runner  # noqa: E402
from benchmarks.support.watchdog import Watchdog, ended_by_watchdog  # noqa: E402
from onepeace_fast.timing import DeviceLost, clock_for  # noqa: E402

PARTS = ("headline", "rest")
DEVICE_LOST = 3  # exit code: start the same command again, and it goes on with what is left
FUSED = ("fused", "strategy_", "all_layers_fused")  # have kernels that may hang
OWN = ("products", "reference", *FUSED)  # an error of one of these is a failure
README = ROOT / "benchmarks" / "README.md"


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Where and how large everything runs."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arguments.quick:
        return Setting(device, dtype, TINY, sets=2, layers=3)
    return Setting(device, dtype, FULL, sets=4, layers=MODEL_LAYERS)


def sections_of(parts: Sequence[str], quick: bool, device: torch.device) -> list[Section]:
    """The sections of these parts, in order."""
    return [one for part in parts for one in (headline(quick, device) if part == "headline" else rest(quick))]


class Run:
    """A run's results and its files, which are written anew whenever something is known."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.setting = setting_of(arguments)
        self.device, self.quick = self.setting.device, arguments.quick
        no_compile = "left out: --quick compiles nothing" if self.quick else None
        budget = Budget(arguments.budget_seconds, no_compile)
        self.runner = Runner(clock_for(self.device), budget, 3 if self.quick else 25, memory=not self.quick)
        self.watchdog = Watchdog()
        self.runner.watching = lambda _: self.watchdog.restart()
        self.result: dict[str, Any] = {
            "date": arguments.date or machine.now(),
            "machine": machine.describe(self.device),
            "device": str(self.device),
            "dtype": str(self.setting.dtype),
            "quick": self.quick,
            "sizes": vars(self.setting.sizes),
            "method": README.read_text(encoding="utf-8").partition("\n## ")[2].partition("\n## Results")[0],
            "fused": HOW_FUSED_RUNS,
            "input_sets": self.setting.sets,
            "seconds": 0.0,
            "sections": {},
            "faulted": {},
            "running": None,
        }
        kind = "gpu-quick" if self.quick else "gpu"
        self.path = arguments.out / machine.file_name(kind, self.result["machine"], self.result["date"])
        if self.path.exists():
            self._resume(json.loads(self.path.read_text(encoding="utf-8")))
        self.setting.found = self.result["sections"]
        self.seconds_before = self.result["seconds"]
        self.start = time.perf_counter()

    def _resume(self, earlier: dict[str, Any]) -> None:
        """Go on where an earlier process of the same run ended; what that one was in is not tried again."""
        for name in ("machine", "sections", "faulted", "seconds"):
            self.result[name] = earlier[name]
        if earlier["running"]:
            section, variant = earlier["running"]
            self._blame(section, variant, "an earlier process ended while this ran")

    def _blame(self, section: str, variant: str, reason: str) -> None:
        """Note what a process died of: one variant of a section, or all of it where that cannot be told."""
        if variant:
            self.result["faulted"].setdefault(section, {})[variant] = reason
        else:
            self.result["sections"][section] = {"kind": "none", "variants": {}, "error": reason}

    def measure(self, parts: Sequence[str]) -> None:
        """Measure section by section until the time is over; raises ``DeviceLost`` where only a new process helps."""
        if "ceilings" not in self.result["sections"]:
            self._record("ceilings", {"kind": "ceilings", "variants": self._ceilings()})
        copy_rate = self.result["sections"]["ceilings"]["variants"].get("copy", {}).get("GB_per_second")
        self.setting.copy_rate = copy_rate and copy_rate * 1e9
        listed = sections_of(parts, self.quick, self.device)
        waiting = [section for section in listed if section.name not in self.result["sections"]]
        for i, section in enumerate(waiting):
            self.unmeasured = [left.name for left in waiting[i:]]
            if self.runner.budget.seconds_left < 0:
                break
            self.runner.budget.sections_left = len(waiting) - i
            self.runner.faulted = self.result["faulted"].get(section.name, {})
            self.runner.starting = lambda variant, name=section.name: self._starting(name, variant)
            start = time.perf_counter()
            try:
                record = section.measure(self.setting, self.runner)
            except DeviceLost as lost:
                variant, line = lost.args
                self._blame(section.name, variant, f"the device was lost: {line}")
                self._running(None, None)
                raise
            self.watchdog.stop()
            record["seconds"] = round(time.perf_counter() - start, 1)
            self.unmeasured = [left.name for left in waiting[i + 1 :]]
            self._record(section.name, record)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if self.device.type == "cuda":
            self.result["nvidia_smi_after"] = machine.nvidia_smi()
        self.write()

    unmeasured: Sequence[str] = ()

    def stop(self) -> None:
        """End at once because the time is over, which is no fault of what is running."""
        self._running(None, None)
        os._exit(143)

    def _ceilings(self) -> dict[str, Any]:
        self._running("ceilings", "")
        side, copy_bytes = (128, 2**20) if self.quick else (8192, 2**30)
        where = (self.device, self.setting.dtype, self.runner.clock)
        return ceilings(*where, side=side, copy_bytes=copy_bytes, rounds=self.runner.rounds)

    def _starting(self, section: str, variant: str) -> None:
        """Name what runs, and limit how long it may take: a peer compiles, and rounds of times have each their own."""
        self._running(section, variant)
        if not variant or variant.startswith(FUSED):
            self.watchdog.restart()
        else:
            self.watchdog.stop()

    def _running(self, section: str | None, variant: str | None) -> None:
        self.result["running"] = None if section is None else [section, variant]
        self.write(document=False)

    def _record(self, name: str, record: dict[str, Any]) -> None:
        self.result["sections"][name], self.result["running"] = record, None
        self.write()
        print(f"\n{tables.section_text(name, record)}", flush=True)

    def write(self, document: bool = True) -> None:
        """Write the files anew."""
        sections = self.result["sections"]
        self.result["errors"] = [line for name, section in sections.items() for line in tables.errors(name, section)]
        self.result["skipped"] = [
            f"{name}, {variant}: {record['skipped']}"
            for name, section in sections.items()
            for variant, record in section["variants"].items()
            if "skipped" in record
        ]
        self.result["unmeasured"] = list(self.unmeasured)
        self.result["seconds"] = round(self.seconds_before + time.perf_counter() - self.start, 1)
        write_json(self.path, self.result)
        if document:
            write_text(self.path.with_suffix(".md"), tables.document(self.result))


def failed(result: dict[str, Any]) -> bool:
    """Tell whether the library or its reference has an error; a failing peer does not count, nor what time left out."""
    return any(
        "error" in section
        or any(("error" in record or "wrong" in record) and name.startswith(OWN) for name, record in variants.items())
        for section in result["sections"].values()
        for variants in [section["variants"]]
    )


def warm(parts: Sequence[str], arguments: argparse.Namespace) -> int:
    """Compile what the sections of these parts run, each variant in a process of its own, side by side.

    The compilers' caches on disk then serve the process that takes times. Returns 1 where one of the library's own
    could not be compiled; what the time does not suffice for is no fault.
    """
    sections = sections_of(parts, arguments.quick, torch.device(arguments.device))
    targets = [(section.name, variant) for section in sections for variant in section.warmed]
    stop = time.perf_counter() + arguments.budget_seconds
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(arguments.out), "--device", arguments.device]
    command += ["--quick"] if arguments.quick else []
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the processes share the cores already

    def compile_one(target: tuple[str, str]) -> bool:
        start, outcome, code = time.perf_counter(), "not started: the time is over", 0
        if start < stop:
            options = {"capture_output": True, "text": True, "env": environment, "timeout": stop - start}
            try:
                done = subprocess.run([*command, "--warm-one", *target], **options)
            except subprocess.TimeoutExpired:
                outcome = "stopped: the time is over"
            else:
                code, lines = done.returncode, (done.stdout + done.stderr).strip().splitlines()
                why = "no answer: a kernel may hang" if ended_by_watchdog(code) else lines[-1] if lines else "no output"
                outcome = f"FAILED with {code}: {why}" if code else "compiled"
        print(f"{target[0]}, {target[1]}: {outcome}, {time.perf_counter() - start:.1f} s", flush=True)
        return bool(code) and target[1].startswith(OWN)

    with ThreadPoolExecutor(min(len(targets), os.cpu_count() or 1) or 1) as pool:
        return int(any(list(pool.map(compile_one, targets))))


def warm_one(name: str, variant: str, arguments: argparse.Namespace) -> None:
    """Run both modes of one variant once."""
    setting, watchdog = dataclasses.replace(setting_of(arguments), sets=1), Watchdog()
    sections = {section.name: section for section in sections_of(PARTS, arguments.quick, setting.device)}
    made = sections[name].prepare(setting).factories[variant]()
    if variant.startswith(FUSED):
        watchdog.restart()
    made.forward(0)
    if made.forward_backward is not None:
        made.forward_backward(0)
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line.

    Returns:
        0: measured. 1: the library or its reference could not be. 2: there is no such device. 3: the device was lost,
        and the same command with the same --date goes on.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON and the Markdown file")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds, no torch.compile")
    parser.add_argument("--budget-seconds", type=float, default=420.0, help="time for the whole run (default: 420)")
    parser.add_argument("--part", choices=PARTS, help="only this part of the sections (default: both)")
    parser.add_argument("--date", help="that of an earlier run, to go on with it (default: now)")
    parser.add_argument("--warm", action="store_true", help="compile the part's kernels in processes, time nothing")
    parser.add_argument("--warm-one", nargs=2, metavar=("SECTION", "VARIANT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"gpu.py needs a CUDA device, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    parts = [chosen.part] if chosen.part else list(PARTS)
    if arguments is None:  # a process of its own
        chosen.budget_seconds -= time.perf_counter() - STARTED
    if chosen.warm_one:
        warm_one(*chosen.warm_one, chosen)
        return 0
    if chosen.warm:
        return warm(parts, chosen)
    run = Run(chosen)
    if arguments is None:
        signal.signal(signal.SIGTERM, lambda *_: run.stop())
    try:
        run.measure(parts)
    except DeviceLost as lost:
        print(f"the device was lost: {lost.args[0]}: {lost.args[1]}", file=sys.stderr, flush=True)
        return DEVICE_LOST
    for line in [*tables.reasons(run.result["skipped"]), *(f"not reached: {name}" for name in run.unmeasured)]:
        print(line)
    errors = len(run.result["errors"])
    print(f"Written to {run.path} in {run.result['seconds']:.0f} s; {errors} errors", flush=True)
    return int(failed(run.result))


if __name__ == "__main__":
    sys.exit(main())
