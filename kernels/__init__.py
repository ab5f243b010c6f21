"""Triton kernels, their launchers and what decides a launch.

A module with kernels is imported when an op of `onepeace_fast.ops` first runs one, so that a CPU never imports Triton.
This folder installs as `onepeace_fast.kernels`.
"""

import functools
import os
import re
import sys

OLDEST_TRITON = (3, 4)
# Read once: Triton decides at a kernel's import whether it is interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable_reason() -> str | None:
    """Return None where Triton can be imported and is recent enough, otherwise the reason in one line."""
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "Triton is not installed" + ("" if sys.platform == "linux" else f" (none exists for {sys.platform})")
        return f"Triton lacks a module: {error.name}"
    except Exception as error:  # a damaged installation raises more than ImportError
        return f"Triton cannot be imported: {' '.join(f'{type(error).__name__}: {error}'.split())}"
    if tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old ({'.'.join(map(str, OLDEST_TRITON))} or later is needed)"
    return None
