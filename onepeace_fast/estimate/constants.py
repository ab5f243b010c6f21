"""The rates of named GPUs, and what the model of the kernels says of them; both are files that are installed.

``constants.json`` has each rate with its source, and what is assumed is called so there. ``kernels.json`` is what
``python -m tools.kernel_model --write`` makes of its table: times of the launches at one shape, by strategy.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("constants.json")
KERNELS = Path(__file__).with_name("kernels.json")
GPUS_OF_A_NODE = 8


class GPU(NamedTuple):
    """Of one GPU: what large and the vendor's products reach, what a copy moves, memory, and what it sends.

    ``link_GBs`` is to the GPUs of its machine, ``network_GBs`` to those of others.
    """

    peak_TFLOPs: float
    dense_TFLOPs: float
    vendor_TFLOPs: float
    copy_TBs: float
    memory_GB: float
    link_GBs: float
    network_GBs: float


class Span(NamedTuple):
    """A range, from the least to the most."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Halfway."""
        return (self.low + self.high) / 2

    def __add__(self, other: Any) -> Span:
        """Both ends with those of another, or with a number."""
        low, high = other if isinstance(other, Span) else (other, other)
        return Span(self.low + low, self.high + high)

    def times(self, factor: float) -> Span:
        """Both ends multiplied."""
        return Span(self.low * factor, self.high * factor)


@functools.cache
def gpus() -> Mapping[str, GPU]:
    """All of them by name."""
    found = json.loads(FILE.read_text(encoding="utf-8"))["gpus"]
    return {name: GPU(*(gpu[field]["value"] for field in GPU._fields)) for name, gpu in found.items()}


@functools.cache
def value(name: str) -> Any:
    """A constant that is of no GPU."""
    return json.loads(FILE.read_text(encoding="utf-8"))[name]["value"]


@functools.cache
def kernels() -> Mapping[str, Any]:
    """The model's launches, as ``tools/kernel_model/summary.py`` sums them up."""
    return json.loads(KERNELS.read_text(encoding="utf-8"))
