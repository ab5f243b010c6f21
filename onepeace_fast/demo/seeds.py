"""A demo that tries a paper's claims with one seed, or with several side by side: what is printed and kept."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

from onepeace_fast.demo import report, speech
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.training import one_thread
from onepeace_fast.info import format_table

SEEDS = "seeds.json"


class Result(Protocol):
    """What one seed gives: a dataclass, with the figures that a reader compares."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    seed: int
    seconds: dict[str, float]

    def figures(self) -> dict[str, float]:
        """Shares by name."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """What is a demo's own.

    Attributes:
        opening: what it says first.
        shares: what its figures are shares of.
        measure: the result of a seed; its page is written too, where a path for it is given. Other processes import it.
    """

    opening: str
    shares: str
    measure: Callable[[int, Path | None], Result]

    def run_one(self, seed: int, folder: Path) -> None:
        """Train, measure, print, and write the report.

        Raises:
            ValueError: eSpeak NG does not work here.
        """
        print(f"{self.opening}\n")
        page = folder / "index.html"
        result = self.alone(seed, page)
        print_figures([result], self.shares)
        print(f"\n  The work took {sum(result.seconds.values()):.0f} seconds. Open {page} in a browser.")

    def run_seeds(self, seeds: Sequence[int], folder: Path) -> None:
        """The same for several seeds, as many at once as there are cores; what is known is kept after each.

        Raises:
            ValueError: eSpeak NG does not work here.
        """
        speech.load(speech.plan())  # the sounds are made once, here
        results: list[Result] = []
        workers = min(len(seeds), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(self.alone, seed) for seed in seeds]):
                results.append(future.result())
                results.sort(key=lambda result: result.seed)
                path = keep_results(results, folder)
        print_figures(results, self.shares)
        print(f"\nKept in {path}.")

    def alone(self, seed: int, page: Path | None = None) -> Result:
        """The result of a seed, by one thread."""
        with one_thread():
            return self.measure(seed, page)


def keep_results(results: Sequence[Result], folder: Path) -> Path:
    """Keep all of each result, and its figures."""
    runs = [{**dataclasses.asdict(result), "figures": result.figures()} for result in results]
    machine = {"CPU": report.cpu(), "Python": platform.python_version(), "torch": version("torch")}
    return keep({"machine": machine, "threads": 1, "runs": runs}, folder)


def keep(content: Mapping[str, Any], folder: Path) -> Path:
    """What is known after each seed, so that an interruption loses one run at most; returns the file."""
    return report.put(folder / SEEDS, json.dumps(content, indent=1) + "\n")


def print_figures(results: Sequence[Result], shares: str) -> None:
    """A table of every figure: one run's, or the median and the range of several."""
    kinds: dict[str, Callable[[Sequence[float]], float]] = {"": statistics.median}
    if len(results) > 1:
        kinds = {"median": statistics.median, "lowest": min, "highest": max}
    figures = [result.figures() for result in results]
    rows = [(shares, *kinds)]
    for name in figures[0]:
        rows.append((name, *(percent(kind([one[name] for one in figures])) for kind in kinds.values())))
    print(f"\n{format_table(rows)}")


def machine(result: Result, steps: str) -> list[tuple[str, str]]:
    """What the figures were made with and how long that took: a name and a value each."""
    return [
        ("Seed", str(result.seed)),
        *report.environment(),
        ("Steps", steps),
        ("Seconds", ", ".join(f"{part} {seconds:.0f}" for part, seconds in result.seconds.items())),
    ]
