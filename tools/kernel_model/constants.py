"""The rates, overheads and achieved fractions that the model computes with, each with its source."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from onepeace_fast.estimate.constants import FILE, Span

CHIP_PARTS = ("warps_per_clock", "shared_bytes_per_clock", "cache_bytes_per_clock", "latency_clocks")


class GPU(NamedTuple):
    """Rates of one GPU; ``step`` is the time of a K-step of the tile that ``Constants.step`` is, in us."""

    name: str
    architecture: str
    clock: float  # clocks in a us
    peak: float  # FLOP in a us
    dense: float
    vendor: float
    step: Span
    copy: float  # bytes in a us


class Chip(NamedTuple):
    """Of an architecture: warps' instructions and bytes in a clock of a multiprocessor, and latencies in clocks."""

    warps_per_clock: Mapping[str, float]
    shared_bytes: int
    cache_bytes: int
    latency: Mapping[str, int]


class Constants(NamedTuple):
    """All of them."""

    gpus: Mapping[str, GPU]
    chips: Mapping[str, Chip]
    step: tuple[int, int, int]
    tile_overhead: float
    loaded_latency: float
    launch: float
    attention_share: float
    attention_products: float
    regression: float


def sources(text: str | None = None) -> dict[str, str]:
    """Where each constant is from, by its place in the file; raise ValueError for one that does not say it."""
    found: dict[str, str] = {}

    def walk(place: str, value: Any) -> None:
        if isinstance(value, dict) and "value" in value:
            if not str(value.get("source", "")).strip():
                raise ValueError(f"{FILE.name}: {place}: expected a source, got none")
            found[place] = value["source"]
        elif isinstance(value, dict):
            for name, below in value.items():
                walk(f"{place} {name}".strip(), below)
        elif not place.endswith(" architecture"):
            raise ValueError(f"{FILE.name}: {place}: expected a value and its source, got {value!r}")

    walk("", json.loads(FILE.read_text(encoding="utf-8") if text is None else text))
    return found


@functools.cache
def constants() -> Constants:
    """What the file holds."""
    sources()
    found = json.loads(FILE.read_text(encoding="utf-8"))

    def value(entry: Any) -> Any:
        return entry["value"]

    gpus = {
        name: GPU(
            name, gpu["architecture"], value(gpu["clock_GHz"]) * 1e3, value(gpu["peak_TFLOPs"]) * 1e6,
            value(gpu["dense_TFLOPs"]) * 1e6, value(gpu["vendor_TFLOPs"]) * 1e6, Span(*value(gpu["step_us"])),
            value(gpu["copy_TBs"]) * 1e6,
        )
        for name, gpu in found["gpus"].items()
    }  # fmt: skip
    chips = {name: Chip(*(value(chip[part]) for part in CHIP_PARTS)) for name, chip in found["architectures"].items()}
    attention = value(found["attention"])
    return Constants(
        gpus, chips, tuple(value(found["step"])), value(found["tile_overhead_us"]), value(found["loaded_latency"]),
        value(found["launch_us"]), attention["share_of_floor"], attention["batched_product_share_of_copy"],
        value(found["regression"]),
    )  # fmt: skip
