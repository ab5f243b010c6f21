"""A file of recorded tensors, whole or reduced by the scripts in tests/goldens, which say what they leave out."""

from __future__ import annotations

import dataclasses
import json
import lzma
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tools.parity import drawn

Kind = TypeVar("Kind", bound="Recording")


class RecordingError(ValueError):
    """A file that is damaged, or of a form that is not known: one line that says so."""


@dataclass(frozen=True)
class Recording:
    """Tensors by name, and the text that describes them.

    Attributes:
        tensors: float32 or integers; those that are stored as int16 with a scale are float32 again.
        metadata: by key.
        quantised: the names of those.
        looked_at: the names of tensors that were asked for.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    quantised: frozenset[str] = frozenset()
    looked_at: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise RecordingError(f"expected the tensor {name}, got a recording without it")
        self.looked_at.add(name)
        return self.tensors[name]

    def pick(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, without it."""
        self.looked_at.update(name for name in self.tensors if name.startswith(prefix))
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def to(self: Kind, device: str) -> Kind:
        """The same recording on another device."""
        return dataclasses.replace(self, tensors={name: value.to(device) for name, value in self.tensors.items()})

    def text(self, key: str) -> str:
        """The metadata under a key."""
        if key not in self.metadata:
            raise RecordingError(f"expected the metadata {key}, got {', '.join(sorted(self.metadata)) or 'none'}")
        return self.metadata[key]

    def json(self, key: str) -> dict[str, Any]:
        """The metadata under a key, which is a JSON object."""
        try:
            value = json.loads(self.text(key))
        except json.JSONDecodeError as error:
            raise RecordingError(f"expected JSON in the metadata {key}, got {error}") from None
        if not isinstance(value, dict):
            raise RecordingError(f"expected a JSON object in the metadata {key}, got a {type(value).__name__}")
        return value


def read(path: Path) -> Recording:
    """Read NAME.safetensors or NAME.safetensors.xz; what a reduced one draws or scales is put back in.

    Raises:
        RecordingError: no such file, a damaged one, or random numbers that torch no longer draws.
    """
    try:
        raw = path.read_bytes()
        raw = lzma.decompress(raw) if path.suffix == ".xz" else raw
        tensors = load(raw)
    except OSError as error:
        raise RecordingError(f"expected a file to read, got {error.strerror}") from None
    except (lzma.LZMAError, EOFError, SafetensorError) as error:
        raise RecordingError(f"expected safetensors, whole or as .xz, got a damaged file: {error}") from None
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = header.get("__metadata__", {})
    scales = {name: tensors.pop(name) for name in [name for name in tensors if name.startswith("scale.")]}
    for name, scale in scales.items():
        own = name.removeprefix("scale.")
        if own not in tensors:
            raise RecordingError(f"expected the tensor {own}, got its scale alone")
        tensors[own] = tensors[own] * scale
    quantised = frozenset(name.removeprefix("scale.") for name in scales)
    return Recording(tensors | _drawn(tensors, metadata), metadata, quantised)


def read_whole(path: Path) -> Recording:
    """``read``, and where a file has no parameters those and the inputs of the file whose name begins its own.

    So NAME_mid.safetensors stands beside NAME.safetensors.
    """
    recording = read(path)
    stem, _, kind = path.name.partition(".")
    if not any(name.startswith("param.") for name in recording.tensors):
        parts = stem.split("_")
        beside = [path.with_name("_".join(parts[:count]) + "." + kind) for count in range(len(parts) - 1, 0, -1)]
        for other in filter(Path.exists, beside):
            found = read(other).tensors
            given = {name: value for name, value in found.items() if name.startswith(("param.", "input."))}
            return dataclasses.replace(recording, tensors={**given, **recording.tensors})
    return recording


def _drawn(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """Parameters and inputs of which a reduced recording holds the first eight numbers."""
    first = {name.removeprefix("first."): value for name, value in tensors.items() if name.startswith("first.")}
    if not first:
        return {}
    draw = drawn.BY_UPSTREAM.get(metadata.get("upstream", ""))
    found = {} if draw is None else draw(metadata)
    for name in sorted({*first, *found}):
        same = name in first and name in found
        if not same or not torch.allclose(found[name].flatten()[:8], first[name], rtol=1e-6, atol=0):
            raise RecordingError(f"expected torch to draw the recorded {name}, got other numbers")
    return found
