"""What was measured on a GPU: one file for each, in the folder ``measured`` beside this module or in the user's own.

Such a file decides the automatic backend, the strategies and those launch parameters that differ from the heuristic.
Nothing here needs a GPU or Triton.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from onepeace_fast.kernels.launch_heuristic import KERNELS, WIDTHS, Parameters, width_class

ENVIRONMENT_VARIABLE = "ONEPEACE_FAST_MEASURED"
SHIPPED_FOLDER = Path(__file__).with_name("measured")
ELEMENT_SIZES = ("2", "4")
_TYPES = {"name": str, "architecture": str, "versions": dict, "date": str, "parity": bool, "strategies": dict,
          "launch_parameters": dict}  # fmt: skip


@dataclass(frozen=True)
class MeasuredGPU:
    """What was measured on one GPU.

    Args:
        name: as PyTorch gives it.
        architecture: such as sm_90.
        versions: of "torch", "triton", "cuda", "driver" and "onepeace_fast", as far as they were found out.
        date: of the measurement, in ISO 8601.
        parity: whether every operation kept within its tolerance of the reference.
        strategies: by operation, classes of shapes, ``{"width": most, "rows": most, "strategy": name}``, of which the
            first that holds a shape decides. None or no entry means any; the last class has to hold every shape.
        launch_parameters: by kernel, bytes of an element ("2" or "4") and width class ("1024"), the fields of
            ``Parameters`` but for ``block_width``, where they are not those of the heuristic.

    Raises:
        ValueError: a field that does not fit, in one line.
    """

    name: str
    architecture: str
    versions: dict[str, str]
    date: str
    parity: bool
    strategies: dict[str, list[dict]]
    launch_parameters: dict

    def __post_init__(self) -> None:
        for field, kind in _TYPES.items():
            if not isinstance(value := getattr(self, field), kind):
                raise ValueError(f"{field}: expected {kind.__name__}, got {value!r}")
        if not self.name.strip():
            raise ValueError("name: expected the name of a GPU as PyTorch gives it, got none")
        if not re.fullmatch(r"sm_\d+", self.architecture):
            raise ValueError(f"architecture: expected one like sm_90, got {self.architecture!r}")
        for part, version in self.versions.items():
            if not isinstance(version, str):
                raise ValueError(f"versions: expected text for {part}, got {version!r}")
        for operation, classes in self.strategies.items():
            _check_classes(f"strategies: {operation}", classes)
        _check_launch_parameters(self.launch_parameters)

    @classmethod
    def from_json(cls, text: str) -> MeasuredGPU:
        """The measurement that a file holds; raise ValueError in one line for any other text."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.keys() != _TYPES.keys():
            found = ", ".join(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"expected the fields {', '.join(_TYPES)}, got {found or 'none'}")
        return cls(**values)

    def to_json(self) -> str:
        """As a file holds it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def classes(self, operation: str) -> tuple[tuple[int | None, int | None, str], ...]:
        """The classes of an operation: (most columns, most rows, strategy), None for any."""
        entries = self.strategies.get(operation, ())
        return tuple((_most(entry, "width"), _most(entry, "rows"), entry["strategy"]) for entry in entries)

    def parameters(self, kernel: str, element_size: int, width: int) -> Parameters | None:
        """The launch parameters of a kernel for elements of this size and rows of this width; None: the heuristic's."""
        columns = width_class(width)
        entry = self.launch_parameters.get(kernel, {}).get(str(element_size), {}).get(str(columns))
        return None if entry is None else Parameters(columns, **entry)


def first_class(classes: tuple[tuple[int | None, int | None, str], ...], rows: int, width: int) -> str | None:
    """The strategy of the first class that holds a shape; None where there are none."""
    for most_width, most_rows, strategy in classes:
        if (most_width is None or width <= most_width) and (most_rows is None or rows <= most_rows):
            return strategy
    return None


def _most(entry: Mapping[str, Any], bound: str) -> int | None:
    return None if entry.get(bound) == "any" else entry.get(bound)


def _check_classes(where: str, classes: Any) -> None:
    if not isinstance(classes, list) or not classes:
        raise ValueError(f"{where}: expected a list of classes, got {classes!r}")
    for entry in classes:
        fits = isinstance(entry, dict) and isinstance(entry.get("strategy"), str)
        fits = fits and entry.keys() <= {"width", "rows", "strategy"}
        if not fits or any(not (most is None or _is_count(most)) for most in (_most(entry, b) for b in _BOUNDS)):
            raise ValueError(f"{where}: expected width and rows, whole numbers or null, and strategy, got {entry!r}")
    if any(_most(classes[-1], bound) is not None for bound in _BOUNDS):
        raise ValueError(f"{where}: expected a last class for any width and rows, got {classes[-1]!r}")


_BOUNDS = ("width", "rows")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_launch_parameters(launch_parameters: Mapping[str, Any]) -> None:
    levels = (list(KERNELS), list(ELEMENT_SIZES), [str(width) for width in WIDTHS])
    for place, entry in _entries(launch_parameters, levels):
        check_entry(f"launch_parameters: {place}", entry)
        part, rest = divmod(int(place.split()[-1]), entry.get("parts", 1))
        if rest or part & (part - 1):
            raise ValueError(
                f"launch_parameters: {place}: expected parts of a power of two of columns each, got {entry!r}"
            )


def _entries(table: Any, levels: tuple[list[str], ...], place: str = "") -> Iterator[tuple[str, Any]]:
    """The place of every entry, and the entry; each key on the way to it has to be one of its level."""
    if not levels:
        yield place, table
        return
    if not isinstance(table, dict):
        raise ValueError(f"launch_parameters: expected an object at {place or 'the top'}, got {table!r}")
    for key, below in table.items():
        if key not in levels[0]:
            raise ValueError(f"launch_parameters: expected one of {', '.join(levels[0])}, got {key!r}")
        yield from _entries(below, levels[1:], f"{place} {key}".strip())


def check_entry(where: str, entry: Any) -> None:
    """Raise ValueError in one line for launch parameters that could not be launched."""
    try:
        parameters = Parameters(0, **entry)
    except TypeError:
        raise ValueError(f"{where}: expected {', '.join(Parameters._fields[1:])}, got {entry!r}") from None
    powers = (parameters.block_rows, parameters.num_warps)
    counts = [parameters.parts, *(n for n in (parameters.programs_per_multiprocessor, parameters.max_registers)
                                  if n is not None)]  # fmt: skip
    fits = all(map(_is_count, (*powers, *counts))) and parameters.num_warps <= 32
    if not fits or any(n & (n - 1) for n in powers):
        raise ValueError(
            f"{where}: expected whole numbers, rows and warps powers of two, at most 32 warps, got {entry!r}"
        )


def user_folder() -> Path:
    """Where the measurements of the user's own GPUs are: in the environment variable's folder, else in their own."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named)
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(configuration) / "onepeace_fast" / "measured"


def file_name(gpu_name: str) -> str:
    """The file of a GPU: its name in small letters and digits."""
    return re.sub(r"[^a-z0-9]+", "_", gpu_name.lower()).strip("_") + ".json"


def measured_file(gpu_name: str) -> Path | None:
    """The file in force for a GPU, the user's before the shipped one; None where it was not measured."""
    if not gpu_name:
        return None
    for folder in (user_folder, lambda: SHIPPED_FOLDER):
        # A user without a home folder, or with one that is closed to them, has no file of their own.
        with contextlib.suppress(OSError, RuntimeError):
            if (path := folder() / file_name(gpu_name)).is_file():
                return path
    return None


@functools.cache
def measured_for(gpu_name: str) -> MeasuredGPU | None:
    """What was measured on a GPU, read once; None where nothing was.

    Raises:
        ValueError: the file in force is damaged or another GPU's; one line with its path and what to do.
    """
    if (path := measured_file(gpu_name)) is None:
        return None
    try:
        measured = MeasuredGPU.from_json(path.read_text(encoding="utf-8"))
        if measured.name != gpu_name:
            raise ValueError(f"expected the GPU {gpu_name}, got {measured.name!r}")
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {why}; delete the file and run `onepeace-fast selftest` again") from error
    return measured


def write_measured(measured: MeasuredGPU, folder: Path) -> Path:
    """Write a GPU's file into a folder, in one step, and return its path; raise OSError where that cannot be done."""
    path = Path(folder) / file_name(measured.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        draft.write_text(measured.to_json(), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    measured_for.cache_clear()
    return path


@functools.cache
def _name_of(index: int) -> str:
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else ""


def gpu_name(device: torch.device) -> str:
    """The GPU's name; that of no GPU is empty."""
    if device.type != "cuda":
        return ""
    if device.index is not None:
        return _name_of(device.index)
    return _name_of(torch.cuda.current_device()) if torch.cuda.is_available() else ""
