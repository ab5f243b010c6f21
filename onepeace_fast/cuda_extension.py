"""The CUDA extension, compiled from csrc/ at installation: whether it is here, for which GPUs, and if not, why."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

_LEFT_OUT = Path(__file__).with_name("cuda_left_out.txt")
_launches = 0
_ARCHITECTURES_VARIABLE = "ONEPEACE_FAST_CUDA_ARCHITECTURES"
_OLDEST_GPU = (8, 0)


@functools.cache
def _import() -> ModuleType | str:
    """The extension, or in one line why it is not here."""
    try:
        return importlib.import_module("onepeace_fast._cuda")
    except ModuleNotFoundError:
        reason = _LEFT_OUT.read_text(encoding="utf-8").strip() if _LEFT_OUT.exists() else "install onepeace_fast again"
        return f"the CUDA extension was not built: {reason}"
    except ImportError as error:
        return f"the CUDA extension cannot be imported: {' '.join(str(error).split())}"


def extension() -> Any:
    """The extension, a module; None where it is not here."""
    found = _import()
    return None if isinstance(found, str) else found


@functools.cache
def unavailable_reason() -> str | None:
    """Why the extension can launch nothing on this machine, or None: it is not here, or the driver does not run it."""
    found = _import()
    return found if isinstance(found, str) else found.unavailable_reason()


def count_launch() -> None:
    """Count a pass: every launch of one is followed by this."""
    global _launches
    _launches += 1


def launched() -> int:
    """How many passes of the extension, forward or backward, this process has launched."""
    return _launches


def unsupported_reason(capability: tuple[int, int]) -> str | None:
    """Why the extension's binaries do not run on a GPU of this compute capability, or None."""
    return _unsupported_reason(extension().ARCHITECTURES, capability)


@functools.cache
def _unsupported_reason(built: str, capability: tuple[int, int]) -> str | None:
    if any(_runs(architecture, capability) for architecture in built.split(",")):
        return None
    got = "{}.{}".format(*capability)
    if capability < _OLDEST_GPU:
        return "expected a GPU of compute capability {}.{} or later, got ".format(*_OLDEST_GPU) + got
    again = f"install again with {_ARCHITECTURES_VARIABLE}=" + "sm_{}{}".format(*capability)
    return f"expected a GPU for which the CUDA extension was built ({built}), got compute capability {got}; {again}"


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code of an architecture runs there: on its major version, PTX on all later ones, with an "a" on one."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(a?)", architecture)
    assert found is not None
    kind, digits, exact = found.groups()
    built = (int(digits[:-1]), int(digits[-1]))
    if exact:
        return capability == built
    return capability >= built and (kind == "compute" or capability[0] == built[0])
