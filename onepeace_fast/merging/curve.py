"""The picture of what was measured along the line between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onepeace_fast.checks import require
from onepeace_fast.installation import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("o-", "s--", "^-.", "D:")  # told apart without colours too


def draw(
    points: Sequence[float], curves: Mapping[str, Sequence[float]], ends: tuple[str, str], axes: Axes | None = None
) -> Figure:
    """Draw curves over the weight of the second model.

    Args:
        points: those of ``interpolate``.
        curves: at most four, {name: a value for each point}.
        ends: names of the models at 0 and 1.
        axes: where to draw; None: in a figure of their own.

    Raises:
        ValueError: a curve with another number of values.
        ImportError: matplotlib is missing; one line that says how to install it.
    """
    require(len(curves) <= len(STYLES), f"curves: expected at most {len(STYLES)}, got {len(curves)}")
    for name, values in curves.items():
        require(len(values) == len(points), f"{name}: expected {len(points)} values, got {len(values)}")
    if axes is None:
        optional("matplotlib", "demo")
        from matplotlib.figure import Figure

        axes = Figure(figsize=(5, 3), layout="constrained").subplots()
    order = sorted(range(len(points)), key=lambda place: points[place])
    for (name, values), style in zip(curves.items(), STYLES, strict=False):
        axes.plot([points[i] for i in order], [values[i] for i in order], style, markersize=4, label=name)
    axes.set_xlabel(f"weight of {ends[1]} (0: {ends[0]} alone, 1: {ends[1]} alone)")
    axes.legend(frameon=False)
    found: Any = axes.get_figure()
    return found
