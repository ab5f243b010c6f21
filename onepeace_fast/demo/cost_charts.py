"""Pictures of what the library does with the demo's own batches: tokens, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib import rc_context

from onepeace_fast.demo import gains
from onepeace_fast.demo.charts import BLUE, GREY, ORANGE, STYLE, Picture, new_figure
from onepeace_fast.demo.result import Cost, TokenCount

COLOURS = {"reference": GREY, "fused": BLUE, "automatic": ORANGE}


@rc_context(STYLE)
def tokens(counts: Sequence[TokenCount], batches: int) -> Picture:
    """Real tokens of a batch, and those that padding adds, of each modality."""
    figure, axes = new_figure(0.9 + 0.4 * len(counts))
    names = [f"{count.modality} ({count.stage})" for count in counts]
    real = [count.real / batches for count in counts]
    added = [(count.padded - count.real) / batches for count in counts]
    axes.barh(names, real, color=BLUE, height=0.6, label="real")
    bars = axes.barh(
        names, added, left=real, color="white", edgecolor=ORANGE, hatch="////", height=0.6, label="padding"
    )
    labels = [f"{a:,.0f}" + (f" + {b:,.0f}" if b else "") for a, b in zip(real, added, strict=True)]
    axes.bar_label(bars, labels, padding=3)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.45 * max(a + b for a, b in zip(real, added, strict=True))), xticks=[])
    axes.spines["bottom"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    description = "Bar chart: mean tokens of a batch, real ones and padding, of each modality."
    return Picture(gains.padding(counts), description, figure)


def times(costs: Sequence[Cost]) -> Picture:
    """Milliseconds of a batch by each backend."""
    title = f"Time of a batch, forward and backward, beside the reference. {' '.join(gains.speed(costs))}"
    return _bars(costs, lambda cost: 1e3 * cost.seconds, "ms", title)


def memory(costs: Sequence[Cost]) -> Picture:
    """Peak MiB of a batch by each backend."""
    title = f"Memory of a batch, forward and backward. {' '.join(gains.memory(costs))}"
    return _bars(costs, lambda cost: cost.peak_bytes / 2**20, "MiB", title)


@rc_context(STYLE)
def _bars(costs: Sequence[Cost], value: Callable[[Cost], float], unit: str, title: str) -> Picture:
    ordered = sorted(costs, key=lambda cost: cost.stage != costs[0].stage)
    places = [place + (cost.stage != costs[0].stage) * 0.6 for place, cost in enumerate(ordered)]
    values = [value(cost) for cost in ordered]
    figure, axes = new_figure(0.6 + 0.3 * len(costs))
    bars = axes.barh(places, values, color=[COLOURS[cost.backend] for cost in ordered], height=0.75)
    axes.bar_label(bars, [f"{value:,.0f} {unit}" for value in values], padding=3)
    axes.set_yticks(places, [f"{cost.stage}, {cost.backend}" for cost in ordered])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.3 * max(values)), xticks=[])
    axes.spines["bottom"].set_visible(False)
    return Picture(title, f"Bar chart: {unit} of a batch of each stage by each backend.", figure)
