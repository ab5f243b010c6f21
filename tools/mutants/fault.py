"""A planted fault: which fragment of which function becomes what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tools.mutants.source import Span, named_parts, occurrences

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults")


class Fault(NamedTuple):
    """A fault and the tests, as pytest's arguments, that must fail by it."""

    name: str
    file: str
    inside: str  # the function, class or constant, by its qualified name: Class.method in Python, Type::method in C++
    old: str
    new: str
    tests: tuple[str, ...]
    occurrence: int | None = None  # which of several, from 1

    def find(self, text: str) -> Span:
        """Where the old fragment stands in the text of the file, or a ValueError of one line that says why nowhere."""
        parts = named_parts(text, self.file)
        place = f"{self.inside} of {self.file}"
        if self.inside not in parts:
            last = self.inside.replace("::", ".").rpartition(".")[2]
            like = ", ".join([name for name in parts if last in name] or parts)
            raise ValueError(f"expected {place}, got {like}: say what it is called now")
        found = occurrences(text, self.file, parts[self.inside], self.old)
        if self.occurrence is None and len(found) != 1:
            raise ValueError(f"expected {self.old!r} once in {place}, got it {len(found)} times")
        which = self.occurrence or 1
        if not 1 <= which <= len(found):
            raise ValueError(f"expected {self.old!r} at least {which} times in {place}, got it {len(found)} times")
        return found[which - 1]

    def plant(self, text: str) -> str:
        """The text of the file with the fault."""
        start, end = self.find(text)
        return text[:start] + self.new + text[end:]

    def problem(self, root: Path = ROOT) -> str | None:
        """Why it cannot be planted here, or None."""
        path = root / self.file
        if not path.is_file():
            return f"expected the file {self.file}, got none there"
        try:
            self.find(path.read_text(encoding="utf-8"))
        except (ValueError, SyntaxError) as error:
            return str(error)
        return None


KEYS = set(Fault._fields)


def read_faults(folder: Path = FAULTS) -> list[Fault]:
    """The faults of a folder's data files, one file for each area of the code."""
    faults = []
    for path in sorted(folder.glob("*.json")):
        for fault in json.loads(path.read_text(encoding="utf-8")):
            if unknown := set(fault) - KEYS:
                raise ValueError(f"{path.name}: expected the keys {', '.join(sorted(KEYS))}, got {', '.join(unknown)}")
            faults.append(Fault(**{**fault, "tests": tuple(fault["tests"])}))
    return faults
