"""Packages that only reading files needs: imported on first use, one line where one is missing."""

from __future__ import annotations

from types import ModuleType

from onepeace_fast import installation


def optional(module: str) -> ModuleType:
    """Import a module of the extra ``train``.

    Raises:
        ImportError: it is missing or damaged; one line that says how to install it.
    """
    return installation.optional(module, "train")
