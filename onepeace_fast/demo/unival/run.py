"""The demo of UnIVAL: what is measured with a seed, and its page."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from onepeace_fast.demo.seeds import Demo
from onepeace_fast.demo.unival import experiment, page, tasks
from onepeace_fast.demo.unival.experiment import Bench, Result, Steps

OPENING = "A small UnIVAL learns to write about handwritten and spoken digits. Three claims of its paper are tried."


def demo(steps: Steps | None = None) -> Demo:
    """The demo, with so many steps."""
    steps = steps or Steps()
    return Demo(OPENING, "right texts", partial(_measure, steps), partial(_report, steps))


def _measure(steps: Steps, seed: int) -> Result:
    return experiment.run(Bench(tasks.load(), seed, steps))[0]


def _report(steps: Steps, seed: int, folder: Path) -> tuple[Result, Path]:
    bench = Bench(tasks.load(), seed, steps)
    result, model = experiment.run(bench)
    return result, page.write(bench, model, result, folder)
