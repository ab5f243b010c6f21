"""Pictures of what was measured, one file each."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes

from onepeace_fast.report.drawing import Picture, across, colours, form, legend, new_figure, plain, shortened
from onepeace_fast.report.results import MODES, SHOWN, Results, Row

BOTH = MODES[-1]
TIMED = ("layer", "ffn", "step", "table")
MOST_VARIANTS = 8  # that one picture shows; the others are in the file


def pictures(results: Results) -> Iterator[Picture]:
    """All that this file has data for."""
    for kind, name in (("layer", "layer"), ("ffn", "feed-forward network"), ("step", "training step")):
        yield from _tax(results, kind, name)
    for base in ("reference", "fused"):
        yield from _ratios(results, base)
    rows = _alike(results.rows)
    yield from _scatter(
        results, rows, "tokens", "time against tokens", "real tokens of the batch", _ms, "ms", logs=True
    )
    yield from _scatter(
        results, rows, "padding", "time against padding", "padded tokens for each real one", _microseconds,
        "us for each real token", at=lambda row: (row.padded or 0) / (row.tokens or 1),
    )  # fmt: skip
    several = Counter(row.modalities for row in rows)
    taxed = all(row.tax for row in rows)
    yield from _scatter(  # one batch of a number says nothing: batches differ in more than that
        results, [row for row in rows if several[row.modalities] > 1], "modalities",
        "time against the number of modalities", "modalities of the batch", _of_products if taxed else _microseconds,
        "time over bare products" if taxed else "us for each real token", at=lambda row: row.modalities or 0,
    )  # fmt: skip
    yield from _memory(results)
    yield from _host(results)
    yield from _utilisation(results)
    yield from _of_copy(results)


def _ms(row: Row, variant: str) -> tuple[float, float, float]:
    """Median and quartiles; without quartiles the median alone, since the most is what another program took once."""
    time = row.times[variant]
    return (time.median, time.low, time.high) if time.has_quartiles else (time.median,) * 3


def _microseconds(row: Row, variant: str) -> tuple[float, float, float]:
    return tuple(1e3 * one / (row.tokens or 1) for one in _ms(row, variant))  # type: ignore[return-value]


def _of_products(row: Row, variant: str) -> tuple[float, float, float]:
    return (row.tax[variant],) * 3


def _alike(rows: Sequence[Row]) -> list[Row]:
    """Rows that one picture may compare: of one kind and width, the most frequent, with both passes where there are."""
    known = [row for row in rows if row.tokens and row.padded and len(row.times) > 1 and row.kind in TIMED]
    for mode in (BOTH, "forward"):
        groups = Counter((row.kind, row.values.get("width"), *sorted(row.times)) for row in known if row.mode == mode)
        if groups:
            (chosen, _), *_ = groups.most_common(1)
            return [row for row in known if (row.kind, row.values.get("width"), *sorted(row.times)) == chosen
                    and row.mode == mode]  # fmt: skip
    return []


def _tax(results: Results, kind: str, name: str) -> Iterator[Picture]:
    rows = [row for row in results.rows if row.kind == kind and row.mode == BOTH and row.tax]
    if not rows:
        return
    variants = list(dict.fromkeys(itertools.chain(*(row.tax for row in rows))))
    variants = [variant for variant in variants if variant != "products"]
    figure, (axes,) = new_figure(1.1 + 0.24 * len(variants) + 0.16 * len(rows))
    for row, (_, (colour, marker)) in zip(rows, colours([f"{i}" for i in range(len(rows))]).items(), strict=True):
        here = [variant for variant in variants if variant in row.tax]
        axes.plot(
            [row.tax[variant] for variant in here], [variants.index(variant) for variant in here], marker, color=colour,
            markersize=4.5, label=row.section.partition(", ")[2] or row.section,
        )  # fmt: skip
    axes.axvline(1, color="#111827", linewidth=0.8)
    axes.set(xscale="log")
    across(figure, "time over the bare products', both passes (1: no tax)")
    _labels(axes, variants)
    plain(axes.xaxis)
    legend(figure, axes, 1)
    ours = [row.tax["fused"] for row in rows if "fused" in row.tax]
    found = f"takes {min(ours):.2f} to {max(ours):.2f} times the bare products" if ours else "was not measured"
    yield Picture("tax", f"Tax of a {name} by peer: ours {found}.", results.title, figure)


def _ratios(results: Results, base: str) -> Iterator[Picture]:
    over = f" over {base}"
    rows = [row for row in results.rows if any(name.endswith(over) for name in row.ratios)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        heading = row.section.partition(", ")[0] if row.kind == "table" else row.kind
        groups.setdefault((heading, row.mode), []).append(row)
    for (heading, mode), mine in groups.items():
        variants = list(dict.fromkeys(name for row in mine for name in row.ratios if name.endswith(over)))
        styles = colours(name.removesuffix(over) for name in variants)
        figure, (axes,) = new_figure(1.3 + 0.3 * len(mine))
        for place, name in enumerate(variants):
            colour, marker = styles[name.removesuffix(over)]
            shift = 0.5 * ((place + 0.5) / len(variants) - 0.5)
            here = [(y + shift, row.ratios[name]) for y, row in enumerate(mine) if name in row.ratios]
            axes.errorbar(
                [ratio.median for _, ratio in here], [y for y, _ in here],
                xerr=[[max(r.median - r.low, 0) for _, r in here], [max(r.high - r.median, 0) for _, r in here]],
                fmt=marker, color=colour, elinewidth=1, label=name.removesuffix(over), **form(name.removesuffix(over)),
            )  # fmt: skip
        axes.axvline(1, color="#111827", linewidth=0.8)
        across(figure, f"time over the {base}'s, with 95% interval")
        _labels(axes, [row.section.partition(", ")[2] for row in mine])
        legend(figure, axes)
        faster = sum(ratio.high < 1 for row in mine for name, ratio in row.ratios.items() if name.endswith(over))
        total = sum(name in row.ratios for row in mine for name in variants)
        text = f"{heading}, {SHOWN.get(mode, mode)}: {faster} of {total} are faster than the {base} beyond their noise."
        yield Picture("peers", text, results.title, figure)


def _scatter(
    results: Results, rows: Sequence[Row], topic: str, name: str, xlabel: str,
    value: Callable[[Row, str], tuple[float, float, float]], unit: str, logs: bool = False,
    at: Callable[[Row], float] = lambda row: row.tokens or 0,
) -> Iterator[Picture]:  # fmt: skip
    rows = [row for row in rows if at(row)]
    if len({at(row) for row in rows}) < 2:
        return
    variants = [name for name, _ in Counter(v for row in rows for v in row.times).most_common(MOST_VARIANTS)]
    figure, (axes,) = new_figure(2.9)
    for variant, (colour, marker) in colours(variants).items():
        here = sorted((at(row), *value(row, variant)) for row in rows if variant in row.times)
        x, y, low, high = zip(*here, strict=True)
        below = [max(middle - end, 0) for middle, end in zip(y, low, strict=True)]
        above = [max(end - middle, 0) for middle, end in zip(y, high, strict=True)]
        axes.errorbar(
            x, y, yerr=[below, above], fmt=marker, color=colour, elinewidth=0.8, label=variant, **form(variant)
        )
    axes.set(xlabel=xlabel, ylabel=f"{unit}, {SHOWN[rows[0].mode]}".replace(", ", "\n", 1))
    if logs:
        axes.set(xscale="log", yscale="log")
        plain(axes.xaxis)
        plain(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
        if topic == "modalities":
            axes.set_xticks(sorted({int(at(row)) for row in rows}))
    legend(figure, axes)
    width = rows[0].values.get("width")
    where = f"{len(rows)} batches" + (f" at width {width}" if width else "")
    yield Picture(topic, f"{name.capitalize()}: {where}.", results.title, figure)


def _memory(results: Results) -> Iterator[Picture]:
    for measure, rows in _memory_rows(results).items():
        if len({row.tokens for row in rows}) < 2:
            continue
        figure, (axes,) = new_figure(2.5)
        for variant, (colour, marker) in colours(dict.fromkeys(v for row in rows for v in row.peaks)).items():
            here = sorted((row.tokens or 0, row.peaks[variant] / 2**20) for row in rows if variant in row.peaks)
            axes.plot(*zip(*here, strict=True), f"{marker}-", color=colour, markersize=4, linewidth=0.8, label=variant)
        axes.set(xlabel="real tokens of the batch", ylabel="MiB", ylim=(0, None))
        legend(figure, axes)
        yield Picture("memory", f"Memory, {measure}: {len(rows)} batches.", results.title, figure)


def _memory_rows(results: Results) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.peaks and row.tokens:
            where = "kept for the backward pass" if row.mode == "saved" else "the most of a step"
            name = where if row.kind == "memory" else f"{row.kind}, {SHOWN.get(row.mode, row.mode)}"
            groups.setdefault(name, []).append(row)
    return groups


def _host(results: Results) -> Iterator[Picture]:
    plans = [row for row in results.rows if row.kind == "plan" and {"plan", "layer_forward"} <= set(row.times)]
    if plans:
        figure, (axes,) = new_figure(2.6)
        names = dict.fromkeys(row.values["builder"] for row in plans)
        for name, (colour, marker) in colours(names).items():
            here = sorted((row.tokens or 0, row.times["plan"].median) for row in plans if row.values["builder"] == name)
            axes.plot(*zip(*here, strict=True), f"{marker}-", color=colour, markersize=4, linewidth=0.8, label=name)
        layer = sorted((row.tokens or 0, row.times["layer_forward"].median) for row in plans)
        axes.plot(*zip(*layer, strict=True), "_", color="#5f6368", markersize=9, label="a layer, forward")
        axes.set(xscale="log", yscale="log", xlabel="real tokens of the batch", ylabel="ms")
        plain(axes.xaxis)
        plain(axes.yaxis)
        legend(figure, axes)
        most = max(row.times["plan"].median for row in plans)
        yield Picture("host", f"Host time of a route plan: at most {most:.1f} ms here.", results.title, figure)
    rows = [row for row in results.rows if any(time.host for time in row.times.values()) and row.mode == BOTH]
    if rows:
        figure, (axes,) = new_figure(3.0)
        variants = [name for name, _ in Counter(v for row in rows for v in row.times).most_common(MOST_VARIANTS)]
        for variant, (colour, marker) in colours(variants).items():
            both = [row.times[variant] for row in rows if variant in row.times and row.times[variant].host]
            if both:
                axes.plot(
                    [time.median for time in both],
                    [time.host or 0.0 for time in both],
                    marker,
                    color=colour,
                    markersize=4,
                    label=variant,
                )
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="#111827", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="ms of the device", ylabel="ms of the host to queue it")
        plain(axes.xaxis)
        plain(axes.yaxis)
        legend(figure, axes)
        text = "Host time beside device time: above the line the host is what one waits for."
        yield Picture("host", text, results.title, figure)


def _utilisation(results: Results) -> Iterator[Picture]:
    """FLOPs of the model over time and the rate of a large product in the same run."""
    ceilings = results.found.get("sections", {}).get("ceilings", {}).get("variants", {})
    rate = (ceilings.get("product") or {}).get("TFLOP_per_second")
    rows = [row for row in results.rows if row.mode == BOTH and row.values.get("forward_operations")]
    if not rate or not rows:
        return
    variants = [name for name, _ in Counter(v for row in rows for v in row.times).most_common(MOST_VARIANTS)]
    figure, (axes,) = new_figure(1.0 + 0.32 * len(rows) * max(1, len(variants) / 3))
    places = {row.section: place for place, row in enumerate(rows)}
    for variant, (colour, marker) in colours(variants).items():
        here = [
            (3e-9 * row.values["forward_operations"] / row.times[variant].median / rate, places[row.section])
            for row in rows if variant in row.times
        ]  # fmt: skip
        axes.plot(*zip(*here, strict=True), marker, color=colour, markersize=4.5, label=variant)
    axes.set(xlim=(0, None))
    across(figure, f"share of {rate:g} TFLOP/s, a large product's rate in this run")
    _labels(axes, [row.section.partition(", ")[2] for row in rows])
    legend(figure, axes)
    yield Picture(
        "utilisation", "Model FLOPs utilisation of a layer: both passes, padding not counted.", results.title, figure
    )


def _of_copy(results: Results) -> Iterator[Picture]:
    """Kernels over rows as shares of a copy's rate: the roofline of what has no products."""
    found: dict[str, dict[str, float]] = {}
    for row in results.rows:
        if row.kind == "pointwise" and row.mode in ("forward", "backward"):
            for variant, record in row.values["variants"].items():
                if (share := record.get(row.mode, {}).get("share_of_copy")) is not None:
                    operation = f"{row.section.partition(',')[0]}, {row.mode}"
                    found.setdefault(operation, {}).setdefault(variant, share)
    if not found:
        return
    figure, (axes,) = new_figure(1.0 + 0.3 * len(found))
    names = dict.fromkeys(variant for shares in found.values() for variant in shares)
    for variant, (colour, marker) in colours(names).items():
        here = [(shares[variant], place) for place, shares in enumerate(found.values()) if variant in shares]
        axes.plot(*zip(*here, strict=True), marker, color=colour, markersize=4.5, label=variant)
    axes.axvline(1, color="#111827", linewidth=0.8)
    _labels(axes, list(found))
    axes.set(xlim=(0, None))
    across(figure, "bytes over time, as a share of a copy's rate")
    legend(figure, axes)
    yield Picture("roofline", "Kernels over rows beside a copy: at the line nothing is lost.", results.title, figure)


def _labels(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), shortened(names, 26))
    axes.set_ylim(len(names) - 0.5, -0.5)
