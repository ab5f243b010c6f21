"""What ``torch.cuda`` answers where the device is emulated: an H100 by default, whose streams and graphs do nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tools.rehearsal.two_devices import EmulatedTensor, State, forbid_host_reads, host_waits, no_host_reads

MULTIPROCESSORS = 132
# What autocast runs in half precision on CUDA, as far as this library and its tests use it.
AUTOCAST = {
    "linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "einsum",
    "scaled_dot_product_attention",
}  # fmt: skip


class _Idle:
    """Takes any arguments and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def nothing(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        host_waits(f"{type(self).__name__}.synchronize")


class Stream(_Idle):
    """A stream on which nothing runs."""

    cuda_stream = 0
    device = torch.device("cuda", 0)
    wait_stream = wait_event = record_event = __exit__ = _Idle.nothing

    def __enter__(self) -> Stream:
        return self


class Event(_Idle):
    """An event that has happened; a millisecond lies between any two."""

    record = wait = _Idle.nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Graph(_Idle):
    """A graph that replays nothing."""

    replay = reset = _Idle.nothing


@contextlib.contextmanager
def capture(graph: Any, *_: Any, **__: Any) -> Iterator[None]:
    """In a capture the host must not wait, as on a GPU."""
    with no_host_reads():
        yield


class Autocast(TorchFunctionMode):
    """Autocast's casts of matrix products: C++ takes emulated tensors for meta ones and leaves them alone."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in AUTOCAST and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")

            def lower(value: Any) -> Any:
                fits = isinstance(value, EmulatedTensor) and value.is_floating_point() and value.dtype != torch.float64
                return value.to(dtype) if fits else value

            args = tuple(map(lower, args))
            kwargs = {name: lower(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _on_device(original: Any) -> Any:
    """``torch.tensor`` and the like: made on the CPU, then copied."""

    @functools.wraps(original)
    def made(*args: Any, device: Any = None, requires_grad: bool = False, **how: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            extra = {"requires_grad": True} if requires_grad else {}
            return original(*args, device=device, **extra, **how)
        result = original(*args, **how).to(device)
        return result.requires_grad_() if requires_grad else result

    return made


def properties(architecture: str) -> SimpleNamespace:
    """What ``get_device_properties`` returns for "sm_90" and the like."""
    digits = architecture.removeprefix("sm_")
    return SimpleNamespace(
        name=f"emulated {architecture}", major=int(digits[:-1]), minor=int(digits[-1]), total_memory=80 * 2**30,
        multi_processor_count=MULTIPROCESSORS, L2_cache_size=50 * 2**20, warp_size=32, uuid="none",
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    )  # fmt: skip


@contextlib.contextmanager
def answered(architecture: str = "sm_90") -> Iterator[None]:
    """Answer as one GPU of this architecture inside."""
    import torch._dynamo.trace_rules as rules  # which lists torch's functions once, and takes these for others

    rules.get_torch_obj_rule_map()
    device = properties(architecture)
    nothing = lambda *_, **__: None  # noqa: E731
    zero = lambda *_, **__: 0  # noqa: E731
    answers = {
        "_lazy_init": nothing, "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": zero, "set_device": nothing, "_exchange_device": zero, "_maybe_exchange_device": zero,
        "get_device_properties": lambda *_: device, "get_device_name": lambda *_: device.name,
        "get_device_capability": lambda *_: (device.major, device.minor), "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: host_waits("synchronize"), "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(), "stream": lambda stream: stream, "Stream": Stream, "Event": Event,
        "CUDAGraph": Graph, "graph": capture, "is_current_stream_capturing": lambda: False,
        "set_sync_debug_mode": lambda mode: forbid_host_reads(mode in ("error", 2)), "_sleep": nothing,
        "get_sync_debug_mode": lambda: 2 if State.reads_forbidden else 0,
        "empty_cache": nothing, "reset_peak_memory_stats": nothing, "memory_allocated": zero,
        "max_memory_allocated": zero, "memory_reserved": zero, "manual_seed": nothing, "manual_seed_all": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": nothing,
        "mem_get_info": lambda *_: (2**36, 2**36),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _on_device(getattr(torch, name))))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, device=None: tensor))
        stack.enter_context(mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
        yield
