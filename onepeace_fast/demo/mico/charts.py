"""The pictures of the report: each has a title that says what its numbers show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from onepeace_fast.demo.charts import BLUE, ORANGE, STYLE, WIDTH, Picture, new_figure, share_axis
from onepeace_fast.demo.mico.experiment import MATCHING, RETRIEVAL, Result
from onepeace_fast.demo.mico.views import Views
from onepeace_fast.demo.percent import percent

COUNTS = (1, 2, 3, 4)
COLOURS = {RETRIEVAL: BLUE, MATCHING: ORANGE}


@rc_context(STYLE)
def shown(held_out: Mapping[str, Views]) -> Picture:
    """The first held-out view of each digit in each modality: no result is looked at."""
    figure = Figure(figsize=(WIDTH, 1.9), layout="constrained")
    panels = figure.subplots(len(held_out), 10)
    for row, (name, (maps, labels)) in zip(panels, held_out.items(), strict=True):
        for digit, axes in enumerate(row):
            axes.imshow(maps[labels.tolist().index(digit)].numpy(), cmap="Greys", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    title = f"{len(held_out)} views of each digit, as the encoder sees them."
    return Picture(title, "Pictures of ten digits in each modality.", figure)


@rc_context(STYLE)
def context(result: Result) -> Picture:
    """Right digits by the number of modalities in the context: every combination, and their mean."""
    figure, axes = new_figure(3.1)
    means = {}
    for shift, (measure, colour) in zip((-0.06, 0.06), COLOURS.items(), strict=True):
        shares = [result.of_size(count, measure) for count in COUNTS]
        means[measure] = [statistics.mean(of) for of in shares]
        points = [(count + shift, share) for count, of in zip(COUNTS, shares, strict=True) for share in of]
        axes.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.45, markersize=4)
        axes.plot([count + shift for count in COUNTS], means[measure], "-", color=colour, label=f"{measure}, mean")
    share_axis(axes, "right digits")
    axes.set(xlabel="modalities in the context\n(a dot: one combination)", xticks=COUNTS)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    said = "; ".join(f"{measure} {_course(of)}" for measure, of in means.items())
    return Picture(f"From one modality to four: {said}.", "Dots and lines: right digits by modalities seen.", figure)


@rc_context(STYLE)
def pretraining(result: Result) -> Picture:
    """Right digits by the number of modalities that a model was pretrained with, with two standard errors."""
    figure, axes = new_figure(3.1)
    alone: dict[str, list[float]] = {}
    for shift, (measure, colour) in zip((-0.06, 0.06), COLOURS.items(), strict=True):
        for what, style in (("images alone", "o-"), ("all of them", "s--")):
            shares = [result.pretraining[str(count)][what][measure] for count in COUNTS]
            errors = [2 * standard_error(share, result.samples) for share in shares]
            places = [count + shift for count in COUNTS]
            axes.errorbar(places, shares, errors, fmt=style, color=colour, markersize=4, capsize=2,
                          label=f"{measure}, {what}")  # fmt: skip
            alone |= {measure: shares} if what == "images alone" else {}
    share_axis(axes, "right digits")
    axes.set(xlabel="modalities in the pretraining\n(bar: 2 standard errors)", xticks=COUNTS)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    said = "; ".join(f"{measure} {_course(of)}" for measure, of in alone.items())
    title = f"Images alone, after pretraining with one modality to four: {said}."
    return Picture(title, "Lines with error bars: right digits by modalities of the pretraining.", figure)


def standard_error(share: float, samples: int) -> float:
    """Of a share of so many independent samples."""
    return (share * (1 - share) / samples) ** 0.5


def combinations(found: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """A row for each combination in the context."""
    return [(name.replace("+", ", "), *(percent(of[measure]) for measure in COLOURS)) for name, of in found.items()]


def _course(shares: Sequence[float]) -> str:
    return f"{percent(shares[0])} to {percent(shares[-1])}"
