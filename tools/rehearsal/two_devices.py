"""Tensors that say they are on ``cuda:0`` and hold their values on the CPU: a mix of devices shows without a GPU.

To PyTorch's C++ such a tensor is on the meta device; to Python, which is what this library and its tests are, it is on
``cuda:0``. Each operation runs on the CPU's values. An op of ``onepeace_fast`` runs what it runs on a GPU, launches of
kernels included, and then takes the values of its reference, since nobody computes what the kernels were to write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
NAMESPACE = "onepeace_fast"
aten = torch.ops.aten

# C++ asks for a meta tensor where it wants one beside an emulated one: there are no real meta tensors here.
ON_DEVICE = ("cuda", "meta")
COPIES = (aten.copy_, aten._to_copy)
INDEXED = (aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# Ops whose result, or its shape, is a number that the host must wait for.
HOST_READS = (
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive,
    aten.unique_dim, aten.allclose, aten.is_nonzero,
)  # fmt: skip

# Those that copy strides to the device in deterministic mode, but of vectors.
SCATTERS = (aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_)

# The Python functions that implement the library's ops, by name: see ``noting_implementations``.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


class DeviceMixError(RuntimeError):
    """An operation was given tensors of both devices."""


class HostReadError(RuntimeError):
    """The host would have waited for the device where it must not."""


class State:
    """Of this process."""

    reads_forbidden = 0  # how often it was forbidden that the host waits
    launches = 0  # of kernels; what they write has no values
    judged = 0  # those of them inside an op of the library, whose values are its reference's


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    """Raise ``HostReadError`` where code inside would make the host wait for the device."""
    State.reads_forbidden += 1
    try:
        yield
    finally:
        State.reads_forbidden -= 1


def forbid_host_reads(forbidden: bool) -> None:
    """The same without an end, for ``torch.cuda.set_sync_debug_mode``."""
    State.reads_forbidden = int(forbidden)


def host_waits(what: str) -> None:
    """Say that the host waits for the device here; raise where that is forbidden."""
    if State.reads_forbidden:
        raise HostReadError(f"expected no wait for the device, got {what}")


class EmulatedTensor(Tensor):
    """A tensor on the emulated device; ``values`` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> EmulatedTensor:
        return Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            layout=values.layout, device="meta",
        )  # fmt: skip

    def __init__(self, values: Tensor) -> None:
        self.values = values

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> EmulatedTensor:
        return EmulatedTensor(self.values)

    @data.setter
    def data(self, other: EmulatedTensor) -> None:
        Tensor.data.__set__(self, other)
        self.values = other.values

    def __repr__(self, **_: Any) -> str:
        return f"EmulatedTensor({self.values})"

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    # Of lists and numbers C++ would make meta tensors, without their values.
    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, Tensor):
            value = EmulatedTensor(torch.tensor(value, dtype=self.dtype, device="cpu"))
        super().__setitem__(_with_tensors(index), value)

    def new_tensor(self, data: Any, **how: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": CUDA, **how})

    def tolist(self) -> Any:
        host_waits("tolist")
        return self.values.tolist()

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return emulate(function, args, kwargs or {})


def _with_tensors(index: Any) -> Any:
    """An index whose lists are tensors on the device, to which they are copied on a GPU as well."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    if not isinstance(index, list):
        return index
    host_waits("an index that is a list, a copy to the device")
    truth = bool(index) and isinstance(index[0], bool)
    return EmulatedTensor(torch.tensor(index, dtype=torch.bool if truth else torch.int64))


class EmulatedDevice(TorchDispatchMode):
    """Where it is active, tensors asked for on "cuda" are emulated ones."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return emulate(function, args, kwargs or {})


def unwrapped(value: Any) -> Any:
    """The CPU's values of a tensor on the emulated device; anything else as it is."""
    return value.values if isinstance(value, EmulatedTensor) else value


def emulate(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Run an op on the CPU's values; its results are on the device where its inputs are, or where it was asked to."""
    given = tree_leaves((args, kwargs))
    emulated = [value for value in given if isinstance(value, EmulatedTensor)]
    device = kwargs.get("device")
    asked = None if device is None else torch.device(device).type
    if not emulated and asked not in ON_DEVICE:
        return function(*args, **kwargs)
    if emulated:
        _check_devices(function, args, given)
        _check_reads(function, args, kwargs, asked)
    elif function.overloadpacket is aten._to_copy and not kwargs.get("non_blocking"):
        host_waits(f"{function}, a copy to the device that is not asked to be non-blocking")
    if function.namespace == NAMESPACE:
        return _run_own_op(function, args)
    if function.overloadpacket is aten._to_copy and emulated and asked in ON_DEVICE:
        target = kwargs.get("dtype") or emulated[0].dtype
        if target == emulated[0].dtype and kwargs.get("memory_format") in (None, torch.preserve_format):
            return EmulatedTensor(emulated[0].values)  # already there, which C++ cannot see
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(unwrapped, args), **tree_map(unwrapped, dict(kwargs)))
    if asked == "cpu" or (function.overloadpacket is aten.copy_ and not isinstance(args[0], EmulatedTensor)):
        return result
    same = {id(tensor.values): tensor for tensor in emulated}

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else EmulatedTensor(value)

    return tree_map(placed, result)


def _check_devices(function: Any, args: tuple, given: list[Any]) -> None:
    """Raise where PyTorch on a GPU would: tensors of both devices, except in copies, as indices or scalars."""
    mine = function.namespace == NAMESPACE
    strangers = [value for value in given if isinstance(value, Tensor) and not isinstance(value, EmulatedTensor)]
    strangers = [tensor for tensor in strangers if mine or tensor.dim()]
    packet = function.overloadpacket
    if not strangers or packet in COPIES:
        return
    if packet in INDEXED and isinstance(args[0], EmulatedTensor):
        indices = {id(index) for index in args[1] if index is not None}
        if all(id(tensor) in indices for tensor in strangers):
            return
    shapes = ", ".join(str(list(tensor.shape)) for tensor in strangers)
    raise DeviceMixError(f"{function}: expected all tensors on cuda:0, got some on {strangers[0].device}: {shapes}")


def _check_reads(function: Any, args: tuple, kwargs: Mapping[str, Any], asked: str | None) -> None:
    """Say where the host waits: for a value, for a size that depends on values, for a copy between the devices."""
    packet = function.overloadpacket
    by_mask = packet in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    unsized = packet is aten.repeat_interleave and kwargs.get("output_size") is None
    strided = packet in SCATTERS and args[0].dim() > 1 and isinstance(args[3], Tensor)
    if packet in HOST_READS or by_mask or unsized:
        host_waits(str(function))
    elif strided and torch.are_deterministic_algorithms_enabled():
        host_waits(f"{function} of {args[0].dim()} dimensions in deterministic mode, a copy to the device")
    elif packet is aten._to_copy and asked == "cpu":
        host_waits(f"{function}, a copy to the host")
    elif packet is aten.copy_ and not (isinstance(args[0], EmulatedTensor) and isinstance(args[1], EmulatedTensor)):
        to_device = isinstance(args[0], EmulatedTensor)
        if not (to_device and (args[1].dim() == 0 or (len(args) > 2 and args[2]) or kwargs.get("non_blocking"))):
            host_waits(f"{function}, a copy between the devices")


def _run_own_op(function: Any, args: tuple) -> Any:
    """An op of the library: the host side of what runs on a GPU, then the reference's values if kernels took part."""
    from onepeace_fast.ops.kernel_choice import force_kernels

    before = State.launches
    with EmulatedDevice():
        outputs = IMPLEMENTATIONS[function._schema.name](*args)
    if State.launches == before:
        return outputs
    counted = State.launches
    with force_kernels(False):
        values = function(*tree_map(unwrapped, args))
    State.launches = counted
    for mine, theirs in zip(tree_leaves(outputs), tree_leaves(values), strict=True):
        if isinstance(mine, EmulatedTensor):
            if mine.numel() + theirs.numel() and (mine.shape != theirs.shape or mine.dtype != theirs.dtype):
                raise RuntimeError(
                    f"{function}: expected its reference's {theirs.dtype} {list(theirs.shape)}, got {mine.dtype}"
                    f" {list(mine.shape)} by its kernels"
                )
            mine.values.copy_(theirs)
    State.judged += State.launches - before
    return outputs


@contextlib.contextmanager
def noting_implementations() -> Iterator[None]:
    """Keep the Python functions that the library registers while it is imported: PyTorch does not hand them out."""
    original = torch.library.Library.impl

    def noted(library: Any, name: Any, implementation: Any, key: str = "", *rest: Any, **how: Any) -> Any:
        if library.ns == NAMESPACE and key == "CompositeExplicitAutograd":
            IMPLEMENTATIONS[f"{NAMESPACE}::{name}"] = implementation
        return original(library, name, implementation, key, *rest, **how)

    torch.library.Library.impl = noted
    try:
        yield
    finally:
        torch.library.Library.impl = original
