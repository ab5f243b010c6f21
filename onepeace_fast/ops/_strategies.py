"""Which way an operation is computed on a GPU where it has several: a table kept as data, no tuning on first use.

``strategies.json`` holds, by operation and by the GPU's name as PyTorch gives it, classes of rows in ascending order,
``{"rows": most, "strategy": name}``, the last without a limit, ``"rows": null``. A GPU that is not in it was never
measured: there the vendor's products are trusted.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

STRATEGIES = ("fused", "per_modality", "specification")
UNMEASURED = "per_modality"
MEASURED: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(
    Path(__file__).with_name("strategies.json").read_text(encoding="utf-8")
)


@functools.cache
def _gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def gpu_name(device: torch.device) -> str:
    """The GPU's name; that of no GPU is empty."""
    return _gpu_name(device.index) if device.type == "cuda" and torch.cuda.is_available() else ""


def strategy_for(operation: str, device: torch.device, rows: int) -> str:
    """The strategy that was fastest on such a GPU for so many rows."""
    for entry in MEASURED[operation].get(gpu_name(device), ()):
        if entry["rows"] is None or rows <= entry["rows"]:
            return entry["strategy"]
    return UNMEASURED
