"""The report of the demo of UnIVAL: one HTML file that opens from disk without a network."""

from __future__ import annotations

from pathlib import Path

from onepeace_fast.demo import report, seeds
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.unival import charts
from onepeace_fast.demo.unival.examples import cards, looked
from onepeace_fast.demo.unival.experiment import Bench, Result
from onepeace_fast.demo.unival.model import DigitModel


def write(bench: Bench, model: DigitModel, result: Result, folder: Path) -> Path:
    """Write ``folder/index.html`` in one step and return its path; ``model`` is that of all tasks."""
    shown = {name: cards(bench, model, name) for name in ("image", "audio")}
    return report.render(
        folder / "index.html",
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
        examples=len(bench.examined["image captions", "familiar"].rows),
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
