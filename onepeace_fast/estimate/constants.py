"""The rates of named GPUs; ``constants.json`` has each with its source, and what is assumed is called so there."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("constants.json")


class GPU(NamedTuple):
    """Of one GPU: its best rate by the datasheet, what large and the vendor's products reach, and what a copy moves."""

    peak_TFLOPs: float
    dense_TFLOPs: float
    vendor_TFLOPs: float
    copy_TBs: float


@functools.cache
def gpus() -> Mapping[str, GPU]:
    """All of them by name."""
    found = json.loads(FILE.read_text(encoding="utf-8"))["gpus"]
    return {name: GPU(*(gpu[field]["value"] for field in GPU._fields)) for name, gpu in found.items()}
