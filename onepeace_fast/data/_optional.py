"""Packages that only reading files needs: imported on first use, one line where one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from onepeace_fast.installation import install_command


def optional(module: str) -> ModuleType:
    """Import a module of the extra ``train``.

    Raises:
        ImportError: it is missing or damaged; one line that says how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # soundfile raises OSError where its C library is missing
        reason = " ".join(str(error).split())
        raise ImportError(
            f"{module}: cannot be imported ({reason}); type: {install_command('train')}", name=module
        ) from None
