"""The demo of MiCo: what is measured with a seed, and its page."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from onepeace_fast.demo import report, seeds
from onepeace_fast.demo.mico import charts, experiment, views
from onepeace_fast.demo.mico.experiment import Result
from onepeace_fast.demo.mico.views import Sets
from onepeace_fast.demo.seeds import Demo

OPENING = "A small MiCo learns handwritten and spoken digits, strokes of a pen and tables. What is each more worth?"
STEPS = 400  # of each pretraining


def demo(steps: int = STEPS) -> Demo:
    """The demo, with so many steps of each pretraining."""
    return Demo(OPENING, "right digits", partial(_measure, steps), partial(_report, steps))


def _measure(steps: int, seed: int) -> Result:
    return experiment.run(views.load(), seed, steps)


def _report(steps: int, seed: int, folder: Path) -> tuple[Result, Path]:
    sets = views.load()
    result = experiment.run(sets, seed, steps)
    return result, write(sets, result, folder)


def write(sets: Sets, result: Result, folder: Path) -> Path:
    """Write ``folder/index.html`` in one step and return its path: one file that opens from disk without a network."""
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
        machine=seeds.machine(result, f"{result.steps:,} of each pretraining, {10 * experiment.GROUPS} samples each"),
    )
