"""The report of the demo of UnIVAL: one HTML file that opens from disk without a network."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from onepeace_fast.demo import report
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.unival import charts
from onepeace_fast.demo.unival.examples import cards, looked
from onepeace_fast.demo.unival.experiment import Bench, Result
from onepeace_fast.demo.unival.model import DigitModel

PACKAGES = ("onepeace_fast", "torch", "numpy", "scikit-learn", "espeakng-loader", "matplotlib")


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
        machine=machine(result, sum(parameter.numel() for parameter in model.parameters())),
    )


def rows(result: Result) -> list[tuple[str, ...]]:
    """The line's ends and its middle, beside the model before both fine-tunings."""
    middle, before = len(result.line["points"]) // 2, result.line["before"]
    return [
        (name, *(percent(share) for share in (before[name], values[0], values[middle], values[-1])))
        for name, values in result.line["curves"].items()
    ]


def machine(result: Result, parameters: int) -> list[tuple[str, str]]:
    """What the figures were made with and how long that took: a name and a value each."""
    return [
        ("Model", f"{parameters:,} parameters"),
        ("Seed", str(result.seed)),
        ("CPU", report.cpu()),
        ("Backend", report.backend()),
        ("Python", f"{platform.python_version()} on {platform.system()}"),
        *((package, version(package)) for package in PACKAGES),
        ("Steps", ", ".join(f"{name} {steps:,}" for name, steps in result.steps.items())),
        ("Seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items())),
    ]
