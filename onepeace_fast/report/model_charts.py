"""Pictures of what the model of the kernels says: ranges, all in one colour that nothing measured has."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes

from onepeace_fast.estimate import constants
from onepeace_fast.report.drawing import MODELLED, Picture, across, new_figure, plain
from onepeace_fast.report.results import Model

MEASURED_HERE = "#1f5fa8"  # what stands in the model's table and was measured


def pictures(model: Model) -> Iterator[Picture]:
    """The tax of each strategy on every GPU, and a roofline of each."""
    yield _tax(model)
    for gpu in model.found["gpus"]:
        if (known := constants.gpus().get(gpu)) is not None:
            yield _roofline(model, gpu, known)
            yield _over_rows(model, gpu, known)


def _tax(model: Model) -> Picture:
    figure, panels = new_figure(4.2, rows=2)
    for axes, field, name in ((panels[0], "tax", "layer"), (panels[1], "ratio", "feed-forward network")):
        names: list[str] = []
        for gpu, of_gpu in model.found["gpus"].items():
            for strategy, record in of_gpu["strategies"].items():
                low, high = record[field]
                _range(axes, low, high, len(names), record.get("measured"))
                names.append(f"{gpu}, {strategy}")
        axes.axvline(1, color="#111827", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set(title=name, xlim=(0.98, None))
    across(figure, "time over that of bare products, both passes (1: no tax)")
    lowest = min(record["tax"][0] for gpu in model.found["gpus"].values() for record in gpu["strategies"].values())
    highest = max(record["tax"][1] for gpu in model.found["gpus"].values() for record in gpu["strategies"].values())
    text = f"Tax by strategy: a layer takes {lowest:.2f} to {highest:.2f} times its bare products."
    return Picture("tax", text, model.title, figure, modelled=True)


def _roofline(model: Model, gpu: str, known: constants.GPU) -> Picture:
    """Launches with products between bytes and FLOPs."""
    products = {name: record for name, record in model.found["gpus"][gpu]["kernels"].items() if record["FLOP"]}
    copy, dense = known.copy_TBs, known.dense_TFLOPs
    figure, (axes,) = new_figure(3.2 + 0.14 * len(products))
    places: dict[float, list[str]] = {}
    for number, record in enumerate(products.values(), 1):
        intensity = record["FLOP"] / record["HBM_bytes"]
        rates = [record["FLOP"] / us / 1e6 for us in reversed(record["us"])]
        colour = MEASURED_HERE if record.get("measured") else MODELLED
        axes.plot([intensity, intensity], rates, color=colour, linewidth=5, solid_capstyle="butt")
        places.setdefault(round(intensity), [f"{rates[0]}"]).append(str(number))
    for intensity, (bottom, *numbers) in places.items():
        axes.annotate(", ".join(numbers), (intensity, float(bottom)), xytext=(0, -11), textcoords="offset points",
                      ha="center")  # fmt: skip
    low, high = dense / copy / 3, max(places) * 2
    axes.plot([low, dense / copy, high], [low * copy, dense, dense], color="#111827", linewidth=1)
    axes.annotate("a copy's rate", (low * 1.35, low * copy * 1.05), rotation=0, fontsize=8)
    axes.annotate("tensor cores", (dense / copy * 1.1, dense * 1.03), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte of memory", ylabel="TFLOP/s",
             ylim=(dense / 5, dense * 1.3))  # fmt: skip
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.set_title("\n".join(f"{i} {_short(name)}" for i, name in enumerate(products, 1)), loc="left", fontsize=8)
    text = f"Roofline of {gpu}: where {len(products)} launches with matrix products lie."
    return Picture("roofline", text, model.title, figure, modelled=True)


def _over_rows(model: Model, gpu: str, known: constants.GPU) -> Picture:
    """Launches without products beside a copy of their bytes."""
    others = {name: record for name, record in model.found["gpus"][gpu]["kernels"].items() if not record["FLOP"]}
    figure, (axes,) = new_figure(0.7 + 0.17 * len(others))
    for place, record in enumerate(others.values()):
        shares = [record["HBM_bytes"] / us / known.copy_TBs / 1e6 for us in reversed(record["us"])]
        _range(axes, shares[0], shares[1], place, record.get("measured"))
    axes.axvline(1, color="#111827", linewidth=0.8)
    axes.set_yticks(range(len(others)), [_short(name) for name in others], fontsize=8)
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.set(xlim=(0, 1.05), xticks=[0, 0.5, 1])
    across(figure, "bytes over time, as a share of a copy's rate")
    text = f"Launches over rows on {gpu}: the bytes of {len(others)}, each once, beside a copy."
    return Picture("roofline", text, model.title, figure, modelled=True)


def _short(name: str) -> str:
    """A launch without what its own name repeats."""
    form, _, kernel = name.partition(": ")
    for repeated in ("layer_norm_", "residual_", "gated_sub_ln_", "partial_") if form != "hybrid" else ():
        kernel = kernel.removeprefix(repeated)
    return f"{form}: {kernel.removeprefix('routed_ffn_')}"


def _range(axes: Axes, low: float, high: float, place: int, measured: object) -> None:
    """From least to most; a thin range is widened to be seen."""
    colour = MEASURED_HERE if measured else MODELLED
    width = 0.012 * (1 if high <= 1 else 0.3)
    axes.plot([low, max(high, low + width)], [place, place], color=colour, linewidth=5, solid_capstyle="butt")
