"""Checks of arguments: each failure is one line with what was expected, what came and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch


def describe(value: object) -> str:
    """Dtype, shape and device of a tensor, or the type and value of anything else, on one line."""
    if isinstance(value, torch.Tensor):
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{layout}{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def require(condition: bool, message: str | Callable[..., str]) -> None:
    """Raise ``ValueError`` with the message unless ``condition`` holds.

    A message that describes tensors is a function: building it would tie a compiled graph to these very sizes.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def is_on_host(x: torch.Tensor) -> bool:
    """Whether the host can read a tensor's values without waiting for a device."""
    return x.device.type == "cpu"


def require_values(condition: torch.Tensor, message: str) -> None:
    """Raise where a tensor on a CPU is False; elsewhere the device asserts it, and the host does not wait."""
    if is_on_host(condition):
        require(bool(condition), message)
    else:
        torch._assert_async(condition, message)


def read_values(tensor: torch.Tensor) -> list[int]:
    """The values of a tensor, also inside a transform by ``torch.func``, where torch 2.8 gives none out."""
    if not torch._C._are_functorch_transforms_active():
        return tensor.tolist()
    with torch._C._DisableFuncTorch():
        return tensor.tolist()


def checks_devices() -> bool:
    """Whether ``ONEPEACE_FAST_CHECK=1`` asks ops to check values on a device too, in every call and at a cost."""
    return os.environ.get("ONEPEACE_FAST_CHECK") == "1"


def require_tensor(name: str, value: object, dtypes: Sequence[torch.dtype], layout: str, rank: int) -> None:
    """Raise unless ``value`` is a tensor of one of ``dtypes`` with ``rank`` dimensions, described as ``layout``."""
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes or value.dim() != rank:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected {names} {layout}, got {describe(value)}")


def require_mapping(name: str, value: object) -> None:
    """Raise unless ``value`` is a dictionary, or another mapping, of something for each modality."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a dictionary by modality's name, got {describe(value)}")


def require_device(name: str, value: torch.Tensor, device: torch.device, of_plan: bool = False) -> None:
    """Raise unless ``value``, which may be a route plan's, lies on ``device``."""
    if value.device != device:
        moved = "it, or the plan that has it," if of_plan else "it"
        raise ValueError(
            f"{name}: expected a tensor on {device}, got one on {value.device}; move {moved} with .to('{device}')"
        )


def require_vector(name: str, value: torch.Tensor | None, length: int, device: torch.device) -> None:
    """Raise unless ``value`` is absent or a floating-point vector of ``length`` entries on ``device``."""
    if value is not None:
        if not (value.is_floating_point() and value.dim() == 1 and value.shape[0] == length):
            raise ValueError(f"{name}: expected a floating-point [{length}], got {describe(value)}")
        require_device(name, value, device)
