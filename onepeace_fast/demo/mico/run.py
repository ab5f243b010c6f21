"""One run of the demo of MiCo, or several seeds side by side: what is printed, kept, and put on its page."""

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
from onepeace_fast.demo.mico import charts, experiment, views
from onepeace_fast.demo.mico.experiment import Result
from onepeace_fast.demo.mico.views import Sets
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.run import one_thread
from onepeace_fast.info import format_table

SEEDS = "seeds.json"
STEPS = 400  # of each pretraining
PACKAGES = ("onepeace_fast", "torch", "numpy", "scikit-learn", "espeakng-loader", "matplotlib")


def run_one(seed: int, output: Path, steps: int = STEPS) -> None:
    """Train, measure, print, and write the report.

    Raises:
        ValueError: eSpeak NG does not work here.
    """
    print("A small MiCo learns handwritten and spoken digits, strokes of a pen and tables. What is each more worth?\n")
    with one_thread():
        sets = views.load()
        result = experiment.run(sets, seed, steps)
    place = write(sets, result, output)
    _print([result])
    print(f"\n  The work took {sum(result.seconds.values()):.0f} seconds. Open {place} in a browser.")


def run_seeds(first: int, count: int, output: Path, steps: int = STEPS) -> None:
    """The same for several seeds, as many at once as there are cores; what is known is kept after each.

    Raises:
        ValueError: eSpeak NG does not work here.
    """
    views.load()  # the sounds are made once, here
    results: list[Result] = []
    workers = min(count, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_measure, first + seed, steps) for seed in range(count)]):
            results.append(future.result())
            results.sort(key=lambda result: result.seed)
            _keep(results, output / SEEDS)
    _print(results)
    print(f"\nKept in {output / SEEDS}.")


def _measure(seed: int, steps: int) -> Result:
    with one_thread():
        return experiment.run(views.load(), seed, steps)


def _keep(results: Sequence[Result], path: Path) -> None:
    runs = [{**dataclasses.asdict(result), "figures": result.figures()} for result in results]
    machine = {"CPU": report.cpu(), "Python": platform.python_version(), "torch": version("torch")}
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps({"machine": machine, "threads": 1, "runs": runs}, indent=1) + "\n")
    os.replace(draft, path)


def _print(results: Sequence[Result]) -> None:
    """A table of every figure: one run's, or the median and the range of several."""
    figures = [result.figures() for result in results]
    several = len(results) > 1
    rows: list[tuple[str, ...]] = [("right digits", *(("median", "lowest", "highest") if several else ("",)))]
    for name in figures[0]:
        values = [one[name] for one in figures]
        rows.append((name, *(percent(of(values)) for of in (statistics.median, min, max)[: 3 if several else 1])))
    print(f"\n{format_table(rows)}")


def write(sets: Sets, result: Result, folder: Path) -> Path:
    """Write ``folder/index.html`` in one step and return its path: one file that opens from disk without a network."""
    machine = [
        ("Seed", str(result.seed)),
        ("CPU", report.cpu()),
        ("Backend", report.backend()),
        ("Python", f"{platform.python_version()} on {platform.system()}"),
        *((package, version(package)) for package in PACKAGES),
        ("Steps", f"{result.steps:,} of each pretraining, {10 * experiment.GROUPS} samples each"),
        ("Seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items())),
    ]
    return report.render(
        folder / "index.html",
        "mico.html",
        title="A small MiCo learns digits from up to four modalities",
        result=result,
        charts={
            "views": charts.shown(sets.held_out),
            "context": charts.context(result),
            "pretraining": charts.pretraining(result),
        },
        lines=charts.combinations(result.context),
        machine=machine,
    )
