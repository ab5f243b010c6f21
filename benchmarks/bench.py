"""What `onepeace-fast bench` runs: suites section by section, whose rows are shown while they are measured."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import machine, peers, results
from benchmarks.support.report import write_json
from benchmarks.support.sections import Section
from benchmarks.support.suites import setting, suite
from benchmarks.support.variants import OURS, Budget, Runner
from onepeace_fast.tables import table
from onepeace_fast.timing import DeviceLost, Timing, clock_for
from tools.scratch import use_scratch

ROUNDS = 25
Seen = Callable[[Mapping[tuple[str, str], Timing]], None]


def measure(suites: Sequence[str], full: bool, seconds: float, threads: int, out: Path | None) -> int:
    """Measure suites, show each row, and write the file anew after each section: 0, or 1 where ours has a fault."""
    use_scratch()
    device = peers.device_here()
    torch.set_num_threads(threads)
    where, clock = setting(device), clock_for(device)
    sections = [section for name in suites for section in suite(name, device, full)]
    for name, reason in peers.here(device, full)[1].items():
        print(f"{name} is not measured: {reason}", flush=True)
    found: dict[str, Any] = {}
    result = results.begun(device, found)
    path = out and out / machine.file_name("gpu" if device.type == "cuda" else "cpu", result["machine"], result["date"])
    start = time.perf_counter()
    for i, section in enumerate(sections):
        runner = Runner(clock, Budget(seconds), ROUNDS)
        runner.budget.compiling_is_free = True
        began = time.perf_counter()
        try:
            with shown(section) as runner.watching:
                found[section.name] = section.measure(where, runner)
        except DeviceLost as lost:
            found[section.name] = {"kind": section.kind, "variants": {}, "error": f"the device was lost: {lost.args}"}
        found[section.name]["seconds"] = round(time.perf_counter() - began, 1)
        print(f"\n{results.text({section.name: found[section.name]})}", flush=True)
        result = results.begun(device, found) | {"date": result["date"], "machine": result["machine"]}
        result["unmeasured"] = [left.name for left in sections[i + 1 :]]
        result["seconds"] = round(time.perf_counter() - start, 1)
        if path:
            write_json(path, result)
    if path:
        print(f"\nWritten to {path}")
    return int(
        any("error" in one or {"error", "wrong"} & one["variants"].get(OURS, {}).keys() for one in found.values())
    )


@contextlib.contextmanager
def shown(section: Section) -> Iterator[Seen | None]:
    """Show a section's medians of the rounds so far on a terminal where rich is installed; elsewhere its end alone."""
    if not sys.stdout.isatty() or find_spec("rich") is None:
        yield None
        return
    from rich.live import Live
    from rich.text import Text

    with Live(Text(f"{section.name}: built and checked"), transient=True) as live:

        def seen(timings: Mapping[tuple[str, str], Timing]) -> None:
            names = dict.fromkeys(name for name, _ in timings)
            modes = dict.fromkeys(mode for _, mode in timings)
            rows = [("", *modes, "runs")]
            for name in names:
                times = [timings[name, mode] for mode in modes if (name, mode) in timings]
                rows.append((name, *(f"{1e3 * time.median:.2f}" if time.seconds else "-" for time in times)))
                rows[-1] += (str(max(len(time.seconds) for time in times)),)
            live.update(Text(f"{section.name}, ms\n{table(rows)}"))

        yield seen
