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
    return Demo(OPENING, "right digits", partial(_measure, steps))


def _measure(steps: int, seed: int, page: Path | None) -> Result:
    sets = views.load()
    result = experiment.run(sets, seed, steps)
    if page is not None:
        write(sets, result, page)
    return result


def write(sets: Sets, result: Result, page: Path) -> None:
    """Write the page in one step: one file that opens from disk without a network."""
    report.render(
        page,
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
