"""Draws docs/packed_rows.svg, from a real route plan: python docs/pictures.py"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from onepeace_fast import RoutePlan

LENGTHS = {"text": [3, 6, 2, 4], "audio": [5, 2, 7, 3]}
COLOURS = {"text": "#2f6fb7", "audio": "#b3541e"}  # white text can be read on both
GREY = "#76797f"  # contrast 4.3 on white and on GitHub's dark page
FONT = 15


def cell(axes: Axes, x: float, y: float, name: str | None, sample: int, gid: str) -> None:
    """One token of a sample, or padding where it has no modality."""
    look = {"facecolor": COLOURS[name]} if name else {"facecolor": "none", "hatch": "////"}
    axes.add_patch(Rectangle((x, y), 0.9, 0.9, edgecolor=GREY, linewidth=0.8, gid=gid, **look))
    if name:
        look = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
        axes.text(x + 0.45, y + 0.43, str(sample), fontsize=FONT, **look)


def label(axes: Axes, x: float, y: float, text: str, align: str = "left", colour: str = GREY, **look: str) -> None:
    """A line of text."""
    axes.text(x, y, text, ha=align, va="center", color=colour, fontsize=FONT, **look)


def draw() -> Figure:
    """The batch as padded columns above, and below as the plan packs it."""
    plan = RoutePlan.from_lengths(LENGTHS)
    names, samples = plan.modalities, plan.sample_count
    figure = Figure(figsize=(13, 5.6))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.3, 32.7), ylim=(-1.6, 9.6))
    axes.axis("off")

    total, real = plan.padded_rows, plan.capacity
    label(axes, 0, 9.1, f"Padded batch, sliced by modality: {total} rows are computed for {real} tokens", weight="bold")
    left = 4.0
    for name, (_, width) in zip(names, plan.padded_shapes, strict=True):
        label(axes, left, 8.15, f"{name}: its own feed-forward network", colour=COLOURS[name])
        for sample in range(samples):
            for column in range(width):
                inside = name if column < LENGTHS[name][sample] else None
                cell(axes, left + column, 6.6 - sample, inside, sample, f"padded-{name}-{sample}-{column}")
        left += width + 7.5
    for sample in range(samples):
        label(axes, 0, 7.03 - sample, f"sample {sample}")
    axes.add_patch(Rectangle((28.2, 4.6), 0.9, 0.9, edgecolor=GREY, facecolor="none", hatch="////", linewidth=0.8))
    label(axes, 29.4, 5.05, "padding")

    label(axes, 0, 2.6, f"Packed rows: {real} rows for {real} tokens", weight="bold")
    offsets = plan.offsets.tolist()
    for row, (modality, sample) in enumerate(zip(plan.modality.tolist(), plan.sample.tolist(), strict=True)):
        cell(axes, row, 1.0, names[modality], sample, f"packed-{row}")
    for name, first, last in zip(names, offsets, offsets[1:], strict=False):
        axes.plot([first, last - 0.1], [0.7, 0.7], color=COLOURS[name], linewidth=2.5, solid_capstyle="butt")
        text = f"rows {first} to {last - 1}, {name}: its own feed-forward network"
        label(axes, (first + last - 0.1) / 2, 0.15, text, "center", COLOURS[name])
    label(axes, 0, -0.95, "A number is a token's sample. Attention joins the tokens of one sample, of both modalities.")
    return figure


def main(path: Path) -> None:
    """Write the picture; the same bytes from the same matplotlib."""
    with matplotlib.rc_context({"svg.hashsalt": "onepeace_fast", "hatch.color": GREY, "hatch.linewidth": 0.7}):
        draw().savefig(path, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("packed_rows.svg"))
