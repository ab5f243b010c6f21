"""Shares as percentages that never say all or none where some are left."""

from __future__ import annotations


def percent(share: float, decimals: int = 0) -> str:
    """A share from 0 to 1 as a percentage; more decimals where it would be rounded to 0% or 100% and is neither."""
    while float((said := f"{share:.{decimals}%}").rstrip("%")) in (0, 100) and 0 < share < 1:
        decimals += 1
    return said
