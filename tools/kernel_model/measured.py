"""What a GPU's file of times, written by ``benchmarks/gpu.py``, says of the model's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tools.kernel_model.constants import constants
from tools.kernel_model.launches import Shape

# Launches that are measured as one pass of an operation, with nothing more than the model has in it.
PASSES = {
    ("layer_norm", "forward"): ("layer_norm: layer_norm_forward",),
    ("layer_norm", "backward"): ("layer_norm: layer_norm_backward", "layer_norm: partial_sums"),
    ("gated_sub_ln", "forward"): ("gated_sub_ln: gated_sub_ln_forward",),
}
STRATEGIES = {"grouped": "fused", "per_modality": "per modality", "hybrid": "hybrid"}


class Measured(NamedTuple):
    """Of one GPU: a time in us for groups of launches, and for strategies and passes by the names of the tables.

    ``vendor`` is the time of the FFN's bare products, ``copy`` the rate of a copy in bytes a us; None where they were
    not measured.
    """

    gpu: str
    launches: dict[tuple[str, ...], float]
    feed_forward: dict[str, float]
    layer: dict[str, float]
    vendor: float | None
    layer_products: float | None
    copy: float | None


def read(path: Path, shape: Shape) -> Measured:
    """A file's times; raise ValueError in one line where its GPU is not of the model's, or its widths are others."""
    try:
        return _read(path, json.loads(path.read_text(encoding="utf-8")), shape)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that benchmarks/gpu.py wrote, got another: {error!r}") from None


def _read(path: Path, found: dict[str, Any], shape: Shape) -> Measured:
    name = found.get("machine", {}).get("gpu", "")
    gpu = next((known for known in constants().gpus if known in name), None)
    if gpu is None:
        raise ValueError(f"{path}: expected a GPU of {', '.join(constants().gpus)}, got {name or 'none'!r}")
    if found.get("quick") or found.get("dtype") != "torch.bfloat16":
        raise ValueError(f"{path}: expected the full shapes in torch.bfloat16, got {found.get('dtype')}, quick or not")
    sizes = found["sizes"]
    if (sizes["width"], sizes["hidden"]) != (shape.width, shape.hidden):
        raise ValueError(
            f"{path}: expected width {shape.width} and hidden {shape.hidden}, "
            f"got {sizes['width']} and {sizes['hidden']}"
        )
    sections = found["sections"]
    launches: dict[tuple[str, ...], float] = {}
    feed_forward: dict[str, float] = {}
    layer: dict[str, float] = {}
    vendor = layer_products = None
    for section in _of_shape(sections, shape):
        variants = section["variants"]
        if section["kind"] == "ffn":
            feed_forward |= _strategies(variants)
            vendor = _us(variants.get("products", {}), "forward_backward") or vendor
        elif section["kind"] == "layer":
            layer |= _strategies(variants)
            layer_products = _us(variants.get("products", {}), "forward_backward") or layer_products
        elif section["kind"] == "pointwise":
            for (operation, which), names in PASSES.items():
                time = _us(variants.get("fused", {}), which)
                if section["operation"] == operation and time:
                    launches[names] = time
    copied = sections.get("ceilings", {}).get("variants", {}).get("copy", {}).get("GB_per_second")
    return Measured(gpu, launches, feed_forward, layer, vendor, layer_products, copied and copied * 1e3)


def _of_shape(sections: Mapping[str, Any], shape: Shape) -> Iterator[dict[str, Any]]:
    for name, section in sections.items():
        lengths = section.get("lengths", {}).values()
        if tuple(map(sum, lengths)) == shape.counts:
            yield {**section, "operation": name.partition(",")[0]}


def _us(record: Mapping[str, Any], mode: str) -> float | None:
    time = record.get(mode, {}).get("median_ms")
    return None if time is None else time * 1e3


def _strategies(variants: Mapping[str, Any]) -> dict[str, float]:
    times = {name: _us(variants.get(f"strategy_{key}", {}), "forward_backward") for key, name in STRATEGIES.items()}
    return {name: time for name, time in times.items() if time is not None}
