"""Which implementation a model runs: ``reference`` (padded, eager) or ``fused`` (packed, over the ops)."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

import torch

from onepeace_fast.kernels.measured import gpu_name, measured_for

BACKENDS = ("reference", "fused")
ENVIRONMENT_VARIABLE = "ONEPEACE_FAST_BACKEND"
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("onepeace_fast_backend", default=None)


def check_backend(name: str, source: str = "backend") -> str:
    """Return ``name`` if it is a backend, else raise ``ValueError``."""
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every model inside the ``with`` block by "reference" or "fused", whatever it was built with.

    It holds for this thread or task, and for blocks inside it that do not name another.

    Raises:
        ValueError: another name.
    """
    token = _override.set(check_backend(name))
    try:
        yield
    finally:
        _override.reset(token)


def requested_backend(argument: str | None) -> str | None:
    """The backend that was asked for: by ``use_backend``, else the model's argument, else the environment."""
    if (name := _override.get()) is not None:
        return name
    if argument is not None:
        return check_backend(argument)
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return check_backend(name, ENVIRONMENT_VARIABLE) if name else None


def resolve_backend(argument: str | None, device: torch.device) -> str:
    """The backend in force: the one that was asked for, else by device.

    The automatic choice is ``fused`` on a CPU, and on a GPU whose file of measurements says that every operation kept
    within its tolerance there, else ``reference``. On a CPU a stack then asks ``choose`` of
    ``onepeace_fast.models.choice`` about each batch, and takes the reference where packing saves too little; not while
    compiling, nor in training with dropout.

    Raises:
        ValueError: an unknown name was asked for, or that file is damaged.
    """
    requested = requested_backend(argument)
    return requested or ("fused" if device.type == "cpu" or _proved_on(device) else "reference")


def _proved_on(device: torch.device) -> bool:
    measured = measured_for(gpu_name(device))
    return measured is not None and measured.parity


_proved_on.__dict__["_dynamo_marked_constant"] = True  # torch.compile reads no file: see ops/strategies.py
