"""One run of the demo of UnIVAL, or several seeds side by side, and what is printed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from onepeace_fast.demo import report
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.run import one_thread
from onepeace_fast.demo.unival import experiment, page, tasks
from onepeace_fast.demo.unival.experiment import Bench, Result, Steps
from onepeace_fast.info import format_table

SEEDS = "seeds.json"


def run_one(seed: int, output: Path, steps: Steps | None = None) -> None:
    """Train, measure, print, and write the report.

    Raises:
        ValueError: eSpeak NG does not work here.
    """
    print("A small UnIVAL learns to write about handwritten and spoken digits. Three claims of its paper are tried.\n")
    with one_thread():
        bench = Bench(tasks.load(), seed, steps or Steps())
        result, model = experiment.run(bench)
        place = page.write(bench, model, result, output)
    _print([result])
    print(f"\n  The work took {sum(result.seconds.values()):.0f} seconds. Open {place} in a browser.")


def run_seeds(first: int, count: int, output: Path, steps: Steps | None = None) -> None:
    """The same for several seeds, as many at once as there are cores; what is known is kept after each.

    Raises:
        ValueError: eSpeak NG does not work here.
    """
    tasks.load()  # the sounds are made once, here
    results: list[Result] = []
    workers = min(count, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_measure, first + seed, steps or Steps()) for seed in range(count)]):
            results.append(future.result())
            results.sort(key=lambda result: result.seed)
            _write(results, output / SEEDS)
    _print(results)
    print(f"\nKept in {output / SEEDS}.")


def _measure(seed: int, steps: Steps) -> Result:
    with one_thread():
        return experiment.run(Bench(tasks.load(), seed, steps))[0]


def _write(results: Sequence[Result], path: Path) -> None:
    runs = [{**dataclasses.asdict(result), "figures": result.figures()} for result in results]
    machine = {"CPU": report.cpu(), "Python": platform.python_version(), "torch": version("torch")}
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps({"machine": machine, "threads": 1, "runs": runs}, indent=1) + "\n")
    os.replace(draft, path)


def _print(results: Sequence[Result]) -> None:
    """A table of every figure: one run's, or the median and the range of several."""
    figures = [result.figures() for result in results]
    head = ("right texts", "median", "lowest", "highest") if len(results) > 1 else ("right texts", "")
    rows: list[tuple[str, ...]] = [head]
    for name in figures[0]:
        values = [one[name] for one in figures]
        kinds = (statistics.median, min, max) if len(results) > 1 else (statistics.median,)
        rows.append((name, *(percent(kind(values)) for kind in kinds)))
    print(f"\n{format_table(rows)}")
