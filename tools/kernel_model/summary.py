"""What ``onepeace-fast estimate`` takes of the model's table: the times of each strategy's launches at its shape.

It is installed with the package, which has neither the table nor the tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.kernel_model.strategies import AROUND, LAUNCHES
from tools.products import products

FILE = Path(__file__).resolve().parent.parent.parent / "onepeace_fast" / "estimate" / "kernels.json"


def summary(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Of each GPU and strategy: us of launches with products, of others, and FLOPs left to the vendor."""
    shape = found["shape"]
    flop = {one.name: one.flop for one in products(shape["counts"], shape["width"], shape["hidden"])}
    gpus = {}
    for gpu, of_gpu in found["gpus"].items():
        kernels = of_gpu["kernels"]
        gpus[gpu] = {
            "around": _summed(kernels, AROUND, with_products=False),
            "strategies": {
                name: {
                    "products": _summed(kernels, prefixes, with_products=True),
                    "rows": _summed(kernels, prefixes, with_products=False),
                    "vendor_FLOP": sum(flop[product] for product in by_vendor),
                }
                for name, (prefixes, by_vendor) in LAUNCHES.items()
            },
        }
    return {"source": source, "shape": shape, "gpus": gpus}


def _summed(kernels: Mapping[str, Any], prefixes: Sequence[str], with_products: bool) -> list[float]:
    mine = [
        record["us"]
        for name, record in kernels.items()
        if name.startswith(tuple(prefixes)) and bool(record["FLOP"]) == with_products
    ]
    return [round(sum(ends), 1) for ends in zip(*mine, strict=True)] if mine else [0.0, 0.0]


def text(found: Mapping[str, Any], source: str) -> str:
    """What the file holds."""
    return json.dumps(summary(found, source), indent=1) + "\n"
