"""The demo of UnIVAL: what is measured with a seed, and its page."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from onepeace_fast.demo import report, seeds
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.seeds import Demo
from onepeace_fast.demo.unival import charts, experiment, tasks
from onepeace_fast.demo.unival.examples import cards, looked
from onepeace_fast.demo.unival.experiment import Bench, Result, Steps
from onepeace_fast.demo.unival.model import DigitModel

OPENING = "A small UnIVAL learns to write about handwritten and spoken digits. Three claims of its paper are tried."


def demo(steps: Steps | None = None) -> Demo:
    """The demo, with so many steps."""
    return Demo(OPENING, "right texts", partial(_measure, steps or Steps()))


def _measure(steps: Steps, seed: int, page: Path | None) -> Result:
    bench = Bench(tasks.load(), seed, steps)
    result, model = experiment.run(bench)
    if page is not None:
        write(bench, model, result, page)
    return result


def write(bench: Bench, model: DigitModel, result: Result, page: Path) -> None:
    """Write the page in one step: one file that opens from disk without a network. ``model`` is that of all tasks."""
    shown = {name: cards(bench, model, name) for name in ("image", "audio")}
    report.render(
        page,
        "unival.html",
        title="A small UnIVAL learns handwritten and spoken digits",
        result=result,
        charts={
            "transfer": charts.transfer(result.transfer),
            "line": charts.line(result.line),
            "tasks": charts.tasks(result.tasks),
            "looks": [
                charts.looks(name, looked(bench, model, modality))
                for name, modality in (("images", "image"), ("sounds", "audio"))
            ],
        },
        lines=rows(result),
        shown=shown,
        machine=[
            ("Model", f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"),
            *seeds.machine(result, ", ".join(f"{name} {steps:,}" for name, steps in result.steps.items())),
        ],
    )


def rows(result: Result) -> list[tuple[str, ...]]:
    """The line's ends and its middle, beside the model before both fine-tunings."""
    middle, before = len(result.line["points"]) // 2, result.line["before"]
    return [
        (name, *(percent(share) for share in (before[name], values[0], values[middle], values[-1])))
        for name, values in result.line["curves"].items()
    ]
