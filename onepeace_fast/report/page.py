"""The page: every picture under its topic, what is not known and how to get it, and what changed between two files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context

from onepeace_fast.report import estimate_charts, measured_charts, model_charts
from onepeace_fast.report.changes import Change, Comparison
from onepeace_fast.report.drawing import STYLE, Picture
from onepeace_fast.report.results import Model, Results

NAME = "benchmarks.html"
PENDING = "PENDING.md"
ON_A_GPU = "make gpu, on a machine with a CUDA device"
ON_A_CPU = "make bench ARGS='--results benchmarks/results'"
# Topic, heading, what the pictures answer, and the command that measures it where no file has it.
TOPICS = (
    ("tax", "The tax of everything but the matrix products",
     "Time over that of the bare matrix products in the same run.", ON_A_GPU),
    ("peers", "Beside the reference and other peers", "Ratios of times that were taken in turn.", ON_A_CPU),
    ("roofline", "Every kernel beside what the hardware could do",
     "Launches with products against FLOPs and bytes; launches over rows against a copy.", ON_A_GPU),
    ("tokens", "Time against tokens", "Does time grow with real tokens alone?", ON_A_CPU),
    ("padding", "Time against padding",
     "A flat line pays nothing for padding. Batches also differ in their lengths, which attention pays for.", ON_A_CPU),
    ("modalities", "Time against the number of modalities", "Does routing cost more with more modalities?", ON_A_CPU),
    ("memory", "Memory", "What a step keeps for its backward pass, and the most that it takes.", ON_A_CPU),
    ("host", "Host time", "What the host needs to plan and to queue the work.", ON_A_CPU),
    ("model", "The 4 B model", "What a training step takes, on one GPU and on more.",
     "onepeace-fast report with a model_*.json of benchmarks/results; onepeace-fast estimate for other sizes"),
    ("utilisation", "Utilisation", "FLOPs that the model needs, over time and rate.", ON_A_GPU),
)  # fmt: skip


class Topic(NamedTuple):
    """A section of the page; without pictures ``missing`` says how to get them."""

    heading: str
    text: str
    pictures: list[Picture]
    missing: str


def draw(files: Sequence[Results | Model]) -> list[Picture]:
    """Every picture that the files have data for, measured ones first."""
    measured = [file for file in files if isinstance(file, Results)]
    modelled = [file for file in files if isinstance(file, Model)]
    with rc_context(STYLE):
        return [
            *(picture for file in measured for picture in measured_charts.pictures(file)),
            *(picture for file in modelled for picture in model_charts.pictures(file)),
            *(estimate_charts.pictures() if modelled else ()),
        ]


def write(
    files: Sequence[Results | Model], folder: Path, comparison: Comparison | None = None, names: Sequence[str] = ()
) -> tuple[Path, list[Path]]:
    """Write ``benchmarks.html`` and a PNG of every picture; ``names`` are those of the files compared.

    Returns:
        the page and the pictures.
    """
    pictures = draw(files)
    folder.mkdir(parents=True, exist_ok=True)
    written = [_replace(folder / picture.name, picture.png) for picture in pictures]
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("onepeace_fast.report"), PackageLoader("onepeace_fast.demo")]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("benchmarks.html").render(
        title="onepeace_fast: benchmarks",
        icon="data:,",
        files=[_described(file) for file in files],
        has_gpu=any(isinstance(file, Results) and file.on_gpu for file in files),
        topics=[
            Topic(heading, text, [picture for picture in pictures if picture.topic == topic], command)
            for topic, heading, text, command in TOPICS
        ],
        failures=[*_failures(files)],
        pending=pending(files),
        comparison=comparison,
        names=names,
        changes=[_shown(change) for change in comparison.flagged] if comparison else [],
    )
    return _replace(folder / NAME, text.encode("utf-8")), written


def _described(file: Results | Model) -> tuple[str, str, str]:
    if isinstance(file, Model):
        versions = ", ".join(f"{name} {version}" for name, version in file.found["versions"].items())
        return file.path.name, "modelled", f"{', '.join(file.found['gpus'])}; {versions}"
    return file.title, "measured", file.machine


def _shown(change: Change) -> tuple[str, str, str, str, str]:
    verdict = "WORSE" if change.worse else "better"
    before, after = (f"{value:,.4g}" for value in (change.before, change.after))
    return verdict, change.what, f"{before} to {after} {change.unit}", f"{change.ratio - 1:+.1%}", f"{change.noise:.1%}"


def _failures(files: Sequence[Results | Model]) -> Iterator[tuple[str, str, str]]:
    """Variants without a time: where, which, and why; a reason that several sections share stands once."""
    seen: dict[tuple[str, str], list[str]] = {}
    for file in files:
        if isinstance(file, Results):
            for row in file.rows:
                for variant, reason in row.failures.items():
                    seen.setdefault((variant, reason), []).append(row.section)
            for section in file.found.get("unmeasured", ()):
                seen.setdefault(("all", "not reached in the run's time"), []).append(section)
    for (variant, reason), sections in seen.items():
        places = list(dict.fromkeys(sections))
        yield variant, reason, places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def pending(files: Sequence[Results | Model]) -> list[tuple[str, list[str]]]:
    """Headings and entries of the list of what was not measured yet, which lies beside the files; none without it."""
    places = dict.fromkeys(file.path.resolve().parent / PENDING for file in files)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        return []
    sections: list[tuple[str, list[str]]] = []
    for line in found.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            sections.append((line[3:], []))
        elif sections and (entry := re.match(r"- \[ \] (.*)", line)):
            sections[-1][1].append(_plain(entry[1]))
        elif sections and sections[-1][1] and line.startswith("  "):
            sections[-1][1][-1] += f" {_plain(line.strip())}"
    return [section for section in sections if section[1]]


def _plain(text: str) -> str:
    """A line of Markdown without its marks."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text.replace("`", "").replace("**", ""))


def _replace(path: Path, content: bytes) -> Path:
    """Write a file in one step."""
    draft = path.with_name(path.name + ".new")
    draft.write_bytes(content)
    os.replace(draft, path)
    return path
