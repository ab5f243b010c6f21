"""Nested settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Nested settings by their whole names: "model.encoder.layers"."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{start}{name}.") if isinstance(value, Mapping) else {f"{start}{name}": value}
    return result
