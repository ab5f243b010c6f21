"""The pictures of the report: each has a title that says what its numbers show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from onepeace_fast.demo.charts import BLUE, CHANCE, GREY, ORANGE, STYLE, WIDTH, Picture, new_figure, share_axis
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.unival.examples import Look
from onepeace_fast.merging.curve import draw

ALIKE = 0.02  # shares that are nearer than this are called alike: of some hundred texts, these are a few
COLOURS = ((BLUE, "o-"), ("#5b9bd5", "s--"), (ORANGE, "^-"), ("#d98a3d", "D--"))


@rc_context(STYLE)
def transfer(found: Mapping[str, Any]) -> Picture:
    """Right texts about sounds over steps, after images and from scratch."""
    figure, axes = new_figure(3.1)
    for start, label, colour in (("pretrained", "after images", BLUE), ("scratch", "from scratch", ORANGE)):
        for data, style in (("familiar voices", "o-"), ("unseen voices", "s--")):
            axes.plot(found["steps"], found[start][data], style, color=colour, markersize=4, label=f"{label}, {data}")
    share_axis(axes, "right texts")
    axes.set_xlabel("steps of training on sounds")
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    early = len(found["steps"]) // 2
    after, scratch = (found[start]["familiar voices"][early] for start in ("pretrained", "scratch"))
    faster, slower = "The model of images learns sounds faster", "The model of images learns sounds more slowly"
    lead = _lead(after, scratch, faster, slower, "Images helped little")
    title = f"{lead}: {percent(after)} right after {found['steps'][early]} steps, {percent(scratch)} from scratch."
    return Picture(title, "Line chart: share of right texts about sounds over training steps.", figure)


@rc_context(STYLE)
def line(found: Mapping[str, Any]) -> Picture:
    """Right texts along the line between the model of images and the model of sounds."""
    figure, axes = new_figure(3.1)
    draw(found["points"], found["curves"], ("images", "sounds"), axes)
    for drawn, (colour, _) in zip(axes.lines, COLOURS, strict=True):
        drawn.set_color(colour)
    if legend := axes.get_legend():
        legend.remove()
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.set_xlabel("weight of the model of sounds")
    share_axis(axes, "right texts")
    middle, means = len(found["points"]) // 2, np.mean([*found["curves"].values()], 0)
    best = max(means[0], means[-1])
    lead = _lead(means[middle], best, "Half of each is better than either", "Half of each is worse than the better one",
                 "Half of each is as good as the better one")  # fmt: skip
    title = f"{lead}: {percent(means[middle])} right on the mean of the four, {percent(means[0])} and "
    title += f"{percent(means[-1])} at the ends."
    return Picture(title, "Line chart: share of right texts of four sets over the weight of one model.", figure)


@rc_context(STYLE)
def tasks(found: Mapping[str, Mapping[str, float]]) -> Picture:
    """Right texts of each task, learned with the others and alone."""
    figure, axes = new_figure(2.7)
    places = np.arange(len(found))
    for shift, (kind, colour) in zip((-0.2, 0.2), (("together", BLUE), ("alone", ORANGE)), strict=True):
        values = [shares[kind] for shares in found.values()]
        bars = axes.barh(places + shift, values, 0.38, color=colour, label=kind)
        axes.bar_label(bars, [percent(value) for value in values], padding=3)
    axes.set_yticks(places, [*found])
    axes.invert_yaxis()
    axes.axvline(CHANCE, color=GREY, linestyle=":", label="chance")
    axes.set(xlim=(0, 1.2), xticks=[0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    better = [task for task, shares in found.items() if shares["together"] > shares["alone"] + ALIKE]
    worse = [task for task, shares in found.items() if shares["together"] < shares["alone"] - ALIKE]
    title = f"Of {len(found)} tasks {len(better)} are learned better with the others, {len(worse)} better alone."
    return Picture(title, "Bar chart: share of right texts of each task, learned together and alone.", figure)


@rc_context(STYLE)
def looks(name: str, found: Sequence[Look]) -> Picture:
    """What was shown or said with what the decoder looked at while it wrote the digit."""
    columns = 5 if name == "images" else 2
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH, rows * (1.0 if columns == 5 else 0.95) + 0.5), layout="compressed")
    most = max(float(look.weights.max()) for look in found)
    for place, look in enumerate(found):
        axes = figure.add_subplot(rows, columns, place + 1)
        height, width = look.shown.shape
        box, sound = (-0.5, width - 0.5, height - 0.5, -0.5), columns == 2
        axes.imshow(look.shown, cmap="Greys", extent=box, aspect="auto" if sound else "equal")
        drawn = axes.imshow(
            look.weights, cmap="Oranges", alpha=0.8 * look.weights / most, vmin=0, vmax=most, extent=box,
            interpolation="nearest", aspect="auto" if sound else "equal",
        )  # fmt: skip
        if sound:
            axes.invert_yaxis()
        axes.set(xticks=[], yticks=[])
        wrote = f"{look.wrote} {'✓' if look.right else '✗'}"
        axes.set_title(wrote if look.right or not sound else f"{wrote} ({look.digit})", fontsize=9)
    figure.colorbar(
        drawn,
        ax=figure.axes,
        orientation="horizontal",
        aspect=40,
        ticks=MaxNLocator(4),
        label="attention to a position",
    )
    right = sum(look.right for look in found)
    mean = float(np.mean([look.weights.sum() for look in found]))
    title = f"{name.capitalize()}: {percent(mean)} of the attention is on the map, the rest on the words; {right} of "
    title += f"{len(found)} digits are right."
    return Picture(title, f"Pictures of ten {name} with the decoder's attention over them.", figure)


def _lead(one: float, other: float, better: str, worse: str, alike: str) -> str:
    if abs(one - other) <= ALIKE:
        return alike
    return better if one > other else worse
