"""What all pictures of a report share: size, colours, and how one becomes a PNG file.

A picture is 3.6 inches wide, 346 CSS pixels, and no text in it is smaller than 8 points: it is legible on a phone. What
was measured is blue, green or grey, and has a point; what a model says is orange, and has a range.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDTH = 3.6  # inches
DOTS = 220  # an inch
OURS, REFERENCE, MODELLED = "#1f5fa8", "#5f6368", "#b45309"
MEASURED = (OURS, REFERENCE, "#0f766e", "#5b9bd5", "#14532d", "#111827", "#6b8e23", "#7a8ca3", "#0891b2")
MARKERS = "osD^vP*X<>"
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Picture:
    """A figure, what it shows, and where its numbers are from; ``topic`` is the section of the page."""

    topic: str
    title: str
    source: str
    figure: Figure
    modelled: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        stem = re.sub(r"[^A-Za-z0-9]+", "-", f"{self.topic} {self.title.partition(':')[0]} {self.source}").strip("-")
        return f"{stem[:120]}.png"

    @property
    def description(self) -> str:
        """For those who cannot see it."""
        return f"{'Modelled' if self.modelled else 'Measured'}, {self.source}."

    @functools.cached_property
    def png(self) -> bytes:
        """The file's content."""
        file = io.BytesIO()
        with rc_context(STYLE):
            self.figure.savefig(file, format="png", dpi=DOTS, metadata={"Software": None})
        return file.getvalue()

    def uri(self) -> str:
        """The same as a data URI, so that the page is one file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def new_figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the report's width with pairs of axes below one another."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    found = figure.subplots(rows, 1, squeeze=False)
    return figure, [axes for (axes,) in found]


def colours(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each variant that was measured: ours blue, the reference grey."""
    fixed = {"fused": (OURS, "o"), "reference": (REFERENCE, "s"), "eager": (REFERENCE, "s")}
    found, turn = {}, 2
    for name in names:
        if name in fixed:
            found[name] = fixed[name]
            continue
        found[name] = (MEASURED[2 + (turn - 2) % (len(MEASURED) - 2)], MARKERS[turn % len(MARKERS)])
        turn += 1
    return found


def form(name: str) -> dict[str, Any]:
    """How a variant's marker is drawn: the automatic backend's is hollow, for it lies on another's."""
    return {"markerfacecolor": "none", "markersize": 7} if name == "automatic" else {"markersize": 4}


def across(figure: Figure, text: str) -> None:
    """The label of the x axis in the middle of the figure, where names leave the axes little room."""
    figure.supxlabel(text, fontsize=8.5)


def plain(axis: Any) -> None:
    """Numbers of a logarithmic axis as people write them, at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """One legend above everything."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def shortened(names: Sequence[str], most: int = 30) -> list[str]:
    """Labels that leave room for the drawing."""
    return [name if len(name) <= most else f"{name[: most - 1]}…" for name in names]
