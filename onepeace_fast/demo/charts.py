"""The pictures of the demo's report: each has a title that says what its numbers show, and fits a phone.

A figure is 3.6 inches wide, 346 CSS pixels, and no text in it is smaller than 9 points: it is legible unscaled.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.result import EmbeddingMap

WIDTH = 3.6  # inches
DIGITS = 10
CHANCE = 1 / DIGITS
SMOOTHED = 20  # steps
BLUE, ORANGE, GREY = "#1f5fa8", "#b45309", "#5f6368"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",  # the same letters on every machine
    "svg.hashsalt": "onepeace_fast",
}


@dataclass(frozen=True)
class Picture:
    """A figure, the finding that it shows, and what it is for those who cannot see it."""

    title: str
    description: str
    figure: Figure

    def uri(self) -> str:
        """The figure as an SVG data URI."""
        file = io.BytesIO()
        with rc_context(STYLE):
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


@rc_context(STYLE)
def loss_curves(losses: Mapping[str, Sequence[float]]) -> Picture:
    """The loss of every step of each stage, its running mean, and the level of guessing among ten."""
    figure, axes = new_figure(2.6)
    guessing = math.log(DIGITS)
    for (stage, values), colour, style in zip(losses.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
        window = min(SMOOTHED, len(values))
        mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axes.plot(range(1, len(values) + 1), values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(range(window, len(values) + 1), mean, style, color=colour, linewidth=1.8, label=stage)
    axes.axhline(guessing, color=GREY, linestyle=":", label=f"guessing, ln 10 = {guessing:.2f}")
    axes.set(xlabel=f"step (thick: mean of {SMOOTHED} steps)", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)
    last = {stage: float(np.mean(values[-SMOOTHED:])) for stage, values in losses.items()}
    below = [stage for stage, value in last.items() if value < guessing]
    lead = {0: "No loss ends", len(last): "Both losses end"}.get(len(below), f"Only the {' '.join(below)} loss ends")
    ends = ", ".join(f"{stage} at {value:.2f}" for stage, value in last.items())
    description = "Line chart: contrastive loss over training steps of both stages, with the level of guessing."
    return Picture(f"{lead} below guessing ({guessing:.2f}): {ends}.", description, figure)


@rc_context(STYLE)
def similarity(
    before: np.ndarray, after: np.ndarray, sound_labels: Sequence[int], image_labels: Sequence[int]
) -> Picture:
    """Mean cosine of each spoken digit to each handwritten one, before and after stage 2, on one colour scale."""
    means = {"before stage 2": before, "after stage 2": after}
    means = {name: digit_means(values, sound_labels, image_labels) for name, values in means.items()}
    low = min(float(np.nanmin(values)) for values in means.values())
    high = max(float(np.nanmax(values)) for values in means.values())
    figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, values) in zip(panels, means.items(), strict=True):
        drawn = axes.imshow(values, vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
        nearest = [(int(np.nanargmax(row)), y) for y, row in enumerate(values) if not np.isnan(row).all()]
        axes.plot(*zip(*nearest, strict=True), "o", color="white", markeredgecolor="black", markersize=4)
        axes.set(title=name, xlabel="handwritten digit")
        _label_digits(axes)
    panels[0].set_ylabel("spoken digit")
    figure.colorbar(drawn, ax=panels, orientation="horizontal", aspect=40, label="mean cosine (dot: the row's largest)")
    (hits_before, asked), (hits, _) = (_diagonal_hits(values) for values in means.values())
    of_same = np.eye(DIGITS, dtype=bool)
    same, other = (float(np.nanmean(means["after stage 2"][which])) for which in (of_same, ~of_same))
    if hits > 0.8 * asked and hits > hits_before:
        lead = "After stage 2 the diagonal stands out"
    else:
        lead = "The diagonal shows in part" if hits > hits_before else "Stage 2 brought no diagonal out"
    title = (
        f"{lead}: {hits} of {asked} spoken digits are on average nearest to their own handwriting, {hits_before} "
        f"before. Mean cosine now: {_signed(same)} to the same digit, {_signed(other)} to others."
    )
    description = "Two heat maps: mean cosine of ten spoken digits to ten handwritten digits, before and after stage 2."
    return Picture(title, description, figure)


@rc_context(STYLE)
def embeddings(places: EmbeddingMap) -> Picture:
    """Images and sounds on a plane, before and after stage 2; a number stands amid its images."""
    images = places.images
    written, spoken = np.asarray(places.image_labels), np.asarray(places.sound_labels)
    present = np.unique(written)
    middles = np.stack([np.median(images[written == digit], 0) for digit in present])
    figure = Figure(figsize=(WIDTH, 6.1), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    hits = []
    for axes, name, sounds in zip(panels, ("before stage 2", "after stage 2"), places[1:3], strict=True):
        axes.scatter(*images.T, s=7, c=written, cmap="tab10", vmin=0, vmax=9, alpha=0.4, linewidths=0)
        axes.scatter(*sounds.T, s=13, c=spoken, cmap="tab10", vmin=0, vmax=9, marker="x", linewidths=0.8)
        for digit, middle in zip(present, middles, strict=True):
            drawn = axes.text(*middle, str(digit), ha="center", va="center", fontsize=11, weight="bold")
            drawn.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        axes.set(title=name, xticks=[], yticks=[])
        apart = ((sounds[:, None] - middles[None]) ** 2).sum(2)
        hits.append(float((present[apart.argmin(1)] == spoken).mean()))
    figure.supxlabel("dot: image, cross: sound, colour: its digit", fontsize=9)
    moved = hits[1] > 2 * max(hits[0], CHANCE)
    lead = "Sounds move to the images of their digit" if moved else "On this map sounds hardly move to their digit"
    shares = f"{percent(hits[0])} stand nearest to the middle of its images before stage 2, {percent(hits[1])} after"
    description = "Two scatter plots: embeddings of images and sounds before and after stage 2."
    return Picture(f"{lead}: {shares}.", description, figure)


@rc_context(STYLE)
def confusion(labels: Sequence[int], found: Sequence[int], query: str, answer: str) -> Picture:
    """How often each digit, asked as ``query`` ("spoken"), found which digit as ``answer`` ("handwritten")."""
    counts = np.zeros((DIGITS, DIGITS), dtype=int)
    np.add.at(counts, (np.asarray(labels), np.asarray(found)), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = new_figure(3.5)
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    axes.set(xlabel=f"{answer} digit found", ylabel=f"{query} digit asked")
    _label_digits(axes)
    right, total = int(np.trace(counts)), int(counts.sum())
    title = f"From {query} to {answer}: {right} of {total} find their digit first"
    mistakes = counts - np.diag(np.diag(counts))
    if right == total:
        title += ", there is no mistake."
    else:
        row, column = np.unravel_index(mistakes.argmax(), mistakes.shape)
        alone = (mistakes == mistakes.max()).sum() == 1
        lead = "The most frequent mistake" if alone else "One of the most frequent mistakes"
        title += f". {lead}: {row} finds {column}, {mistakes[row, column]} of {counts[row].sum()} times."
    return Picture(title, f"Table of counts: {query} digits asked by {answer} digits found.", figure)


@rc_context(STYLE)
def voices(accuracy: Mapping[str, float], sounds: Mapping[str, int]) -> Picture:
    """Share of each voice's sounds whose nearest image shows their digit; ``sounds`` counts those asked."""
    ordered = sorted(accuracy.items(), key=lambda item: item[1])
    figure, axes = new_figure(0.9 + 0.3 * len(ordered))
    names = [f"{name} ({sounds[name]})" for name, _ in ordered]
    bars = axes.barh(names, [value for _, value in ordered], color=BLUE, height=0.6)
    axes.bar_label(bars, [percent(value) for _, value in ordered], padding=3)
    axes.axvline(CHANCE, color=ORANGE, linestyle="--")
    axes.set(xlim=(0, 1.2), xticks=[0, 0.5, 1])
    figure.supxlabel("right at first (dashed: chance)", fontsize=9)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    (worst, low), (best, high) = ordered[0], ordered[-1]
    above = sum(value > CHANCE for value in accuracy.values())
    lead = "Every voice is" if above == len(accuracy) else f"{above} of {len(accuracy)} voices are"
    span = f"all at {percent(low)}" if low == high else f"from {percent(low)} ({worst}) to {percent(high)} ({best})"
    title = f"{lead} above chance, {span}."
    description = "Bar chart: share of right answers for each voice; its number of held-out sounds in brackets."
    return Picture(title, description, figure)


@rc_context(STYLE)
def series_bias(modality: str, unit: str, values: np.ndarray) -> Picture:
    """Learned bias of a 1-D modality: [heads, 2P - 1], distances 1 - P to P - 1, query minus key."""
    heads, entries = values.shape
    reach = entries // 2
    figure, axes = new_figure(1.35 + 0.14 * heads)
    limit = float(np.abs(values).max()) or 1.0
    box = (-reach - 0.5, reach + 0.5, heads + 0.5, 0.5)
    drawn = axes.imshow(
        values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", extent=box, interpolation="nearest"
    )
    axes.set(yticks=range(1, heads + 1), ylabel="head", xlabel=f"query - key, in {unit}".replace("-", "\N{MINUS SIGN}"))
    figure.colorbar(drawn, ax=axes, orientation="horizontal", aspect=40, label="bias added to the score")
    places = [_signed(distance, 0) for distance in range(-reach, reach + 1)]
    title = _bias_title(modality, values, [f"distance {place}" for place in places])
    return Picture(title, f"Heat map: bias of each {modality} attention head over distance.", figure)


@rc_context(STYLE)
def grid_bias(modality: str, values: np.ndarray) -> Picture:
    """Learned bias of a 2-D modality: [heads, 2S - 1, 2S - 1], rows down and columns to the right, query minus key."""
    heads, side, _ = values.shape
    reach = side // 2
    columns = min(heads, 4)
    rows = math.ceil(heads / columns)
    figure = Figure(figsize=(WIDTH, 1.0 + 0.9 * rows), layout="compressed")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    limit = float(np.abs(values).max()) or 1.0
    box = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
    for axes in panels.flat[heads:]:
        axes.set_axis_off()
    for head, axes in enumerate(panels.flat[:heads]):
        drawn = axes.imshow(values[head], cmap="RdBu_r", vmin=-limit, vmax=limit, extent=box, interpolation="nearest")
        axes.set(title=f"head {head + 1}", xticks=[-reach, 0, reach], yticks=[-reach, 0, reach])
    figure.supxlabel("patches to the right, query \N{MINUS SIGN} key", fontsize=9)
    figure.supylabel("patches down", fontsize=9)
    figure.colorbar(drawn, ax=panels, location="top", aspect=40, label="bias added to the score", ticks=MaxNLocator(5))
    steps = range(-reach, reach + 1)
    places = [f"{_signed(down, 0)} down, {_signed(right, 0)} right" for down in steps for right in steps]
    title = _bias_title(modality, values.reshape(heads, -1), places)
    return Picture(title, f"Heat maps: bias of each {modality} attention head over 2-D distance.", figure)


def digit_means(values: np.ndarray, sound_labels: Sequence[int], image_labels: Sequence[int]) -> np.ndarray:
    """Mean over the sounds and images of each pair of digits: [10, 10], NaN where there is none."""
    spoken, written = (np.eye(DIGITS)[np.asarray(labels)] for labels in (sound_labels, image_labels))
    with np.errstate(invalid="ignore"):
        return (spoken.T @ values @ written) / np.outer(spoken.sum(0), written.sum(0))


def _diagonal_hits(means: np.ndarray) -> tuple[int, int]:
    """How many spoken digits have their largest mean at their own handwriting, and how many there are."""
    asked = [digit for digit, row in enumerate(means) if not np.isnan(row).all()]
    return sum(int(np.nanargmax(means[digit])) == digit for digit in asked), len(asked)


def _bias_title(modality: str, values: np.ndarray, places: Sequence[str]) -> str:
    """The head whose bias varies most, with its extremes: [heads, entries] and the name of each entry."""
    name = modality.capitalize()
    if not values.any():
        return f"{name}: nothing was learned, every bias is 0."
    head = int(np.ptp(values, axis=1).argmax())
    high, low = int(values[head].argmax()), int(values[head].argmin())
    extremes = ", ".join(f"{_signed(float(values[head, place]))} at {places[place]}" for place in (high, low))
    return f"{name}: head {head + 1} depends most on distance, {extremes}."


def share_axis(axes: Axes, label: str) -> None:
    """Shares upwards, and the line of chance."""
    axes.axhline(CHANCE, color=GREY, linestyle=":", label="chance")
    axes.set(ylim=(0, 1.02), ylabel=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of the report's width and this height in inches, with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _label_digits(axes: Axes) -> None:
    axes.set(xticks=range(DIGITS), yticks=range(DIGITS))
    axes.tick_params(length=0)


def _signed(value: float, decimals: int = 2) -> str:
    """A number with its sign, 0 without; a true minus sign."""
    text = f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")
    return text if text.strip("+\N{MINUS SIGN}0.") else text[1:]
