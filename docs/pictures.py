"""Draws the pictures of this folder, from a real route plan and a real bias: python docs/pictures.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from onepeace_fast import RelativeBias, RoutePlan

LENGTHS = {"text": [3, 6, 2, 4], "audio": [5, 2, 7, 3]}
COLOURS = {"text": "#2f6fb7", "audio": "#b3541e"}  # white text can be read on both
WINDOW = (2, 3)
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


def draw_packed_rows() -> Figure:
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


def entry(axes: Axes, x: float, y: float, text: int, group: int, gid: str) -> None:
    """A number in a cell of one of the groups of the bias vector: a row of distances each, and CLS last."""
    colour = ("#2f6fb7", "#8a5a9e", "#b3541e", "#4d5156")[group]
    axes.add_patch(Rectangle((x, y), 0.94, 0.94, facecolor=colour, edgecolor="none", gid=gid))
    look = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
    axes.text(x + 0.47, y + 0.45, str(text), fontsize=FONT, **look)


def draw_bias_vector() -> Figure:
    """A window's codes, the vector of one head, and the entry of every pair of tokens."""
    bias = RelativeBias.beit(WINDOW, heads=1)
    with torch.no_grad():
        bias.table.copy_(torch.arange(bias.table.shape[0])[:, None])  # each entry its own number
    codes, pairs, offset = bias.codes().tolist(), bias.dense()[0].int().tolist(), bias.code_offset()
    entries, width = bias.vector().shape[1], 2 * WINDOW[1] - 1
    figure = Figure(figsize=(13, 7.1))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.3, 24.2), ylim=(-0.9, 12.4))
    axes.axis("off")

    label(axes, 0, 11.9, "The vector of one head: an entry for each distance, then three of CLS", weight="bold")
    for place in range(entries):
        group = min(place // width, 3)
        entry(axes, place + 0.6 * (group == 3), 10.3, place, group, f"vector-{place}")
    for group, text in enumerate(("query above key", "same row", "query below key")):
        label(axes, (group + 0.5) * width, 9.8, text, "center")
    label(axes, entries - 3 + 0.6, 9.8, "CLS as query, as key, both")

    label(axes, 0, 8.2, f"A window of {WINDOW[0]} x {WINDOW[1]} tokens: their codes", weight="bold")
    for token, code in enumerate(codes[1:]):
        y, x = divmod(token, WINDOW[1])
        axes.add_patch(Rectangle((1.2 * x, 6.3 - 1.2 * y), 1.1, 1.1, facecolor="none", edgecolor=GREY, linewidth=1.2))
        label(axes, 1.2 * x + 0.55, 6.83 - 1.2 * y, str(code), "center")
    for line, text in enumerate((
        f"{width} = 2 x {WINDOW[1]} - 1 from one row to the next,",
        "so that every distance has its own",
        "difference of codes.",
        "",
        f"entry = code of query - code of key + {offset}",
        f"query 5, key 2:  5 - 2 + {offset} = {5 - 2 + offset}",
    )):  # fmt: skip
        label(axes, 0, 4.2 - 0.75 * line, text)

    left, top = 14.6, 5.9
    label(axes, left - 2.3, 8.2, "The entry that each pair of tokens takes", weight="bold")
    names = ["CLS", *map(str, codes[1:])]
    for i, row in enumerate(pairs):
        label(axes, left - 0.25, top - i + 0.47, names[i], "right")
        label(axes, left + i + 0.47, top + 1.25, names[i], "center")
        for j, place in enumerate(row):
            entry(axes, left + j, top - i, place, min(place // width, 3), f"pair-{i}-{j}")
    label(axes, left - 1.3, top - 2.5, "query", "right")
    label(axes, left + 7.3, top + 1.25, "key")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"packed_rows": draw_packed_rows, "bias_vector": draw_bias_vector}


def main(path: Path) -> None:
    """Write the picture of a file's name; the same bytes from the same matplotlib."""
    with matplotlib.rc_context({"svg.hashsalt": "onepeace_fast", "hatch.color": GREY, "hatch.linewidth": 0.7}):
        PICTURES[path.stem]().savefig(path, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    for name in PICTURES:
        main(Path(__file__).with_name(f"{name}.svg"))
