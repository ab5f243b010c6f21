"""Reads what torch.save and pickle wrote, by a list of what may be in it; the numbers stay in the file until used.

The zip format goes to torch.load with its own list of what is harmless. Its predecessor and plain pickles, whose
tensors hold files of that predecessor, are read here: torch maps neither into memory.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor

_ZIP, _LEGACY, _PICKLE = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80"
_HEADER = 1 << 16  # pickles in front of a storage's numbers take some hundred bytes


class Refused(ValueError):
    """A pickle holds what is not on the list; the text is its name."""


class StandIn:
    """In place of an object of a package that need not be installed: its state, and no code of its own."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


# What a saved ``cfg`` holds where it was not turned into plain containers.
_STAND_INS = (
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode", "omegaconf.nodes.StringNode", "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode", "omegaconf.nodes.BooleanNode",
    *(f"fairseq.dataclass.configs.{name}Config" for name in (
        "Fairseq", "Common", "CommonEval", "DistributedTraining", "Dataset", "Optimization", "Checkpoint",
        "FairseqBMUF", "Generation", "EvalLM", "Interactive", "EMA")),
)  # fmt: skip
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")


def _scalar(dtype: numpy.dtype[Any], value: Any) -> Any:
    if not isinstance(value, bytes) or dtype.hasobject:
        raise Refused(f"a numpy scalar of {dtype}")
    return numpy.frombuffer(value, dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise Refused(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


def _any() -> None:
    """In place of typing.Any, which omegaconf's containers name as the type of what they hold."""


def _allowed() -> dict[str, Any]:
    """What a pickle may name, beside what torch.load takes by itself."""
    numbers = {f"numpy.dtypes.{type(numpy.dtype(code)).__name__}": type(numpy.dtype(code)) for code in "?bBhHiIlLqQefd"}
    scalars = {f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")}
    stand_ins = {name: StandIn for name in _STAND_INS}
    kinds = (set, frozenset, complex, bytearray, dict, list, tuple, str, int, float, bool)
    builtins = {f"builtins.{kind.__name__}": kind for kind in kinds}
    single = {"argparse.Namespace": Namespace, "numpy.dtype": numpy.dtype, "typing.Any": _any}
    single["collections.defaultdict"] = defaultdict
    return {**builtins, **single, **numbers, **scalars, **stand_ins}


def read(path: Path) -> Any:
    """What a file holds, its tensors mapped into memory.

    Raises:
        ValueError: a file that is of no known format, broken, or holds what is not on the list; one line with its name.
    """
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    readers: dict[bytes, Callable[[Path], Any]] = {_ZIP: _read_zip, _LEGACY: _read_legacy, _PICKLE: _read_pickle}
    reader = next((readers[magic] for magic in readers if start.startswith(magic)), None)
    if reader is None:
        raise ValueError(f"{path}: expected a checkpoint by torch.save or pickle, got a file of another format")
    try:
        return reader(path)
    except Refused as error:
        raise ValueError(
            f"{path}: expected tensors, numbers, texts and containers of them, got {error}; it was not run"
        ) from None
    except Exception as error:  # a broken file fails in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: expected a whole checkpoint, got one that cannot be read ({reason}); was it copied to its end?"
        ) from None


def _read_zip(path: Path) -> Any:
    names: list[Any] = [(value, name) for name, value in _allowed().items()]
    try:
        with torch.serialization.safe_globals(names):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"\bGLOBAL (\S+)", str(error)):
            raise Refused(found[1]) from None
        raise


class _Region:
    """Bytes of a file that were passed over."""

    def __init__(self, start: int, length: int) -> None:
        self.start, self.length = start, length


class _Reader(pickle._Unpickler):
    """Reads a pickle by the list, without the numbers in it.

    Args:
        file: where the pickle begins.
        storage: what a storage becomes that the pickle refers to, by its type, key and number of elements.
        nested: what the bytes of a storage inside a plain pickle become; None where there can be none.
    """

    def __init__(
        self,
        file: io.BufferedIOBase,
        storage: Callable[[torch.dtype, str, int], Any],
        nested: Callable[[bytes | _Region], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._source, self._storage, self._nested = file, storage, nested

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _REBUILD:
            return getattr(torch._utils, name)
        if module == "torch.storage" and name == "_load_from_bytes" and self._nested:
            return self._nested
        if module == "torch" and name.endswith("Storage"):
            dtypes = torch.storage._storage_type_to_dtype_map()
            if name in dtypes:
                return dtypes[name]
        module = "builtins" if module == "__builtin__" else module  # as Python 2 called it, and old protocols do
        own = {"collections.OrderedDict": OrderedDict, "_codecs.encode": _encode, **_allowed()}
        if f"{module}.{name}" not in own:
            raise Refused(f"{module}.{name}")
        return own[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, elements, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise Refused(f"a reference to {kind}")
        return self._storage(dtype, key, elements)

    def _pass_over(self, length: int) -> bytes | _Region:
        # Large bytes stand outside the pickle's frames, so the file is at their first one.
        if self._nested is None or length < _HEADER:
            return self.read(length)  # type: ignore[attr-defined]  # the unframer's
        start = self._source.tell()
        if self._source.seek(length, io.SEEK_CUR) > _end(self._source):
            raise EOFError("it ends within a tensor")
        return _Region(start, length)

    def _load_bytes(self, width: str) -> None:
        (length,) = struct.unpack(f"<{width}", self.read(struct.calcsize(width)))  # type: ignore[attr-defined]
        self.append(self._pass_over(length))  # type: ignore[attr-defined]

    def _load_binbytes(self) -> None:
        self._load_bytes("I")

    def _load_binbytes8(self) -> None:
        self._load_bytes("Q")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BINBYTES[0]: _load_binbytes,
        pickle.BINBYTES8[0]: _load_binbytes8,
    }


def _end(file: io.BufferedIOBase) -> int:
    place = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(place)
    return end


def _typed(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _on_meta(dtype: torch.dtype, _: str, elements: int) -> torch.TypedStorage:
    return _typed(torch.UntypedStorage(elements * dtype.itemsize, device="meta"), dtype)


def _mapped(path: Path) -> Any:
    return torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        return _legacy(file, _mapped(path), 0)


def _legacy(file: io.BufferedIOBase, whole: torch.UntypedStorage, base: int) -> Any:
    """What torch's format before the zip holds: pickles, then all storages, each behind its number of elements.

    ``whole`` are the bytes of a file, in which ``file`` begins at ``base``.
    """
    for _ in range(3):  # magic number, version, sizes of the writer's integers
        _Reader(file, _on_meta).load()
    place = file.tell()
    sizes: dict[str, int] = {}

    def measured(dtype: torch.dtype, key: str, elements: int) -> torch.TypedStorage:
        sizes[key] = elements * dtype.itemsize
        return _on_meta(dtype, key, elements)

    _Reader(file, measured).load()
    starts: dict[str, int] = {}
    keys = _Reader(file, _on_meta).load()
    start = file.tell()
    for key in keys:
        starts[key] = base + start + 8
        start += 8 + sizes[key]
    if base + start > whole.nbytes():
        raise EOFError("it ends within a tensor")

    def stored(dtype: torch.dtype, key: str, elements: int) -> torch.TypedStorage:
        return _typed(whole[starts[key] : starts[key] + elements * dtype.itemsize], dtype)

    file.seek(place)
    return _Reader(file, stored).load()


def _read_pickle(path: Path) -> Any:
    whole = _mapped(path)

    def nested(data: bytes | _Region) -> Any:
        if isinstance(data, bytes):
            return _legacy(io.BytesIO(data), torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage(), 0)
        header = bytes(whole[data.start : data.start + min(data.length, _HEADER)].tolist())
        return _legacy(io.BytesIO(header), whole, data.start)

    with path.open("rb") as file:
        return _Reader(file, _on_meta, nested).load()


def plain(value: Any) -> Any:
    """Settings as containers, whatever class held them."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, StandIn):
        state = value.__dict__
        value = state.get("_content", state.get("_val", state))
        return plain(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def tensors(values: Any) -> dict[str, Tensor]:
    """The entries of a state dict that are tensors."""
    found = values if isinstance(values, Mapping) else {}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
