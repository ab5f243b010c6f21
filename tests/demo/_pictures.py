"""What every picture of a demo's page must keep."""

from __future__ import annotations

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from onepeace_fast.demo.charts import Picture


def assert_legible(picture: Picture) -> None:
    """It fits a phone, and its text is large enough and inside."""
    figure = picture.figure
    FigureCanvasAgg(figure).draw()
    assert figure.get_figwidth() * 96 <= 390 - 32
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    ticks = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    hidden = {label for axis in ticks for label in axis.get_ticklabels() if _outside(axis, label)}
    for text in shown:
        assert text.get_fontsize() >= 9, text.get_text()
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside or text in hidden, (text.get_text(), box)


def _outside(axis: Axis, label: Text) -> bool:
    """A tick beyond the limits of its axis, which is not drawn."""
    low, high = sorted(axis.get_view_interval())
    place = label.get_position()[0 if axis.axis_name == "x" else 1]
    return not low <= place <= high
