"""How a structure lies flat, as the arguments and results of a registered op, and the types of these in its schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", list[Tensor | None]: "Tensor[]",
    tuple[int, ...]: "SymInt[]", int: "SymInt", float: "float", str: "str", bool: "bool", list[bool]: "bool[]",
    torch.dtype: "ScalarType", torch.dtype | None: "ScalarType?",
}  # fmt: skip


class Leaf(NamedTuple):
    """A field that is not a structure itself: its place, and its type in a schema."""

    path: tuple[str, ...]
    type: str


class Layout:
    """The leaves of a class of structures, which may nest one level deep: flattens a structure and builds it again."""

    def __init__(self, structure: type[Any]) -> None:
        self.structure = structure
        self._inner = [kind if hasattr(kind, "_fields") else None for kind in get_type_hints(structure).values()]
        self._nested = [place for place, kind in enumerate(self._inner) if kind is not None][::-1]
        self.leaves = _leaves(structure)

    def flatten(self, structure: tuple[Any, ...]) -> list[Any]:
        """The values of the leaves in their order."""
        flat = [*structure]
        for place in self._nested:  # the last first, so that the others stay where they are
            flat[place : place + 1] = flat[place]
        return flat

    def build(self, flat: Sequence[Any]) -> Any:
        """A structure with these values of its leaves."""
        if not self._nested:
            return self.structure._make(flat)
        values, start = [], 0
        for kind in self._inner:
            if kind is None:
                values.append(flat[start])
                start += 1
            else:
                stop = start + len(kind._fields)
                values.append(kind._make(flat[start:stop]))
                start = stop
        return self.structure._make(values)


def _leaves(structure: type[Any]) -> list[Leaf]:
    found = []
    for name, kind in get_type_hints(structure).items():
        inner = _leaves(kind) if hasattr(kind, "_fields") else [Leaf((), SCHEMA_TYPES[kind])]
        found += [Leaf((name, *leaf.path), leaf.type) for leaf in inner]
    return found
