"""What a launch is made of: the table shipped beside this file, and the one that was measured on the user's GPU.

A table holds, by kernel, GPU architecture, bytes of an element of the row tensors and width class, the parameters of a
launch. A width belongs to the smallest class that holds it; an architecture without an entry takes the nearest older
one, else the oldest. What `onepeace-fast tune` wrote, where it did, replaces the shipped entries that it has.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT_VARIABLE = "ONEPEACE_FAST_LAUNCH_PARAMETERS"
SHIPPED_PATH = Path(__file__).with_name("launch_parameters.json")

Table = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]


class Parameters(NamedTuple):
    """An entry of the table, and the width of the class it stands for.

    ``block_rows`` rows of ``block_width`` columns are in registers at a time, in ``parts`` of a power of two of columns
    each, so that a class may be 6144 wide; a launch has at most ``programs_per_multiprocessor`` programs for each
    multiprocessor, and each walks over its share of the rows; None: a program for every block of rows. ``held_in`` says
    where a program keeps the parameters and its sums over rows: in "registers", or in "memory" where rows are so wide
    that registers do not hold these as well. ``max_registers`` bounds a thread's registers, so that a multiprocessor
    holds more programs.
    """

    block_width: int
    block_rows: int
    num_warps: int
    programs_per_multiprocessor: int | None
    held_in: str = "registers"
    parts: int = 1
    max_registers: int | None = None


def measured_path() -> Path:
    """The file of the measured table: what the environment variable names, else one in the user's cache."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "onepeace_fast" / SHIPPED_PATH.name


def merged(shipped: Table, measured: Table) -> Table:
    """The shipped table with the measured entries in it; raise ValueError for one that could not be launched."""
    result = _copy(shipped)
    for kernel, by_architecture in measured.items():
        if kernel not in shipped:
            raise ValueError(f"got an entry for {kernel!r}, takes {', '.join(shipped)}")
        classes = next(iter(shipped[kernel].values()))
        for architecture, by_size in by_architecture.items():
            _number(architecture)
            # An architecture that is new to the table has to have every class: it starts as what it would take.
            mine = result[kernel].setdefault(architecture, _copy(nearest(shipped[kernel], architecture)))
            for size, by_width in by_size.items():
                for width, entry in by_width.items():
                    if width not in classes.get(size, {}):
                        raise ValueError(f"got the width class {width!r} of {size}-byte elements of {kernel}")
                    _check(entry)
                    mine[size][width] = entry
    return result


def _copy(table: Any) -> Any:
    return json.loads(json.dumps(table))


def _check(entry: Mapping[str, Any]) -> None:
    try:
        parameters = Parameters(0, **entry)
    except TypeError:
        raise ValueError(f"got {entry!r}, takes {', '.join(Parameters._fields[1:])}") from None
    powers = (parameters.block_rows, parameters.num_warps)
    counts = (parameters.parts, parameters.programs_per_multiprocessor or 1, parameters.max_registers or 1)
    fits = all(isinstance(n, int) and n > 0 for n in (*powers, *counts)) and parameters.num_warps <= 32
    if not fits or any(n & (n - 1) for n in powers) or parameters.held_in not in ("registers", "memory"):
        raise ValueError(
            f"got {entry!r}, takes whole numbers, rows and warps powers of two, at most 32 warps, held_in 'registers' "
            "or 'memory'"
        )


def _number(architecture: str) -> int:
    digits = architecture.removeprefix("sm_")
    if not digits.isdigit():
        raise ValueError(f"got the architecture {architecture!r}, takes one like sm_90")
    return int(digits)


def nearest(by_architecture: Mapping[str, Any], architecture: str) -> Any:
    known = sorted(by_architecture, key=_number)
    older = [name for name in known if _number(name) <= _number(architecture)]
    return by_architecture[older[-1] if older else known[0]]


SHIPPED: Table = json.loads(SHIPPED_PATH.read_text(encoding="utf-8"))
_used_instead: Table | None = None


@functools.cache
def _measured() -> Table | None:
    """The measured table, read once, when the first kernel is launched; None where there is none."""
    path = measured_path()
    if not path.is_file():
        return None
    try:
        return merged(SHIPPED, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(
            f"{path}: {error}; takes a table that `onepeace-fast tune` wrote: delete the file, or measure again"
        ) from error


def table_in_force() -> str:
    """Which table launches use, for people."""
    if _measured() is not None:
        return f"measured here: {measured_path()}"
    missing = f"; {measured_path()} does not exist" if os.environ.get(ENVIRONMENT_VARIABLE) else ""
    return f"shipped{missing}; `onepeace-fast tune` measures those of this GPU"


@contextlib.contextmanager
def use_table(table: Table) -> Iterator[None]:
    """Launch by another table inside."""
    global _used_instead
    before, _used_instead = _used_instead, table
    table_entry.cache_clear()
    try:
        yield
    finally:
        _used_instead = before
        table_entry.cache_clear()


@functools.cache
def table_entry(kernel: str, architecture: str, element_size: int, width: int) -> Parameters:
    """The parameters of a kernel for rows of this width and these elements."""
    table = _used_instead or _measured() or SHIPPED
    by_width = nearest(table[kernel], architecture)[str(element_size)]
    block_width = min(int(block) for block in by_width if int(block) >= width)
    return Parameters(block_width, **by_width[str(block_width)])
