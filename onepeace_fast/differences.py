"""How far the tensors of two models lie apart, name by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require

UNNAMED = "unnamed "  # begins the name of what a graph reaches and no module given has; no parameter's name begins so


class Gradient(NamedTuple):
    """A tensor that requires a gradient, and its gradient."""

    name: str
    leaf: Tensor
    value: Tensor


class Difference(NamedTuple):
    """Two tensors of one shape: the largest absolute difference, and the largest magnitude in either of them."""

    absolute: float
    magnitude: float  # of finite values

    @property
    def relative(self) -> float:
        """The largest difference over the largest magnitude."""
        return self.absolute / self.magnitude if self.magnitude else self.absolute and math.inf

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Difference:
        """Compare in float64. What is not a number in either differs by NaN; equal infinities do not differ."""
        first, second = _exact(a), _exact(b)
        if not first.numel():
            return cls(0.0, 0.0)
        apart = torch.where(first == second, 0.0, (first - second).abs())
        sizes = torch.stack([value.abs().nan_to_num(0.0, posinf=0.0).max() for value in (first, second)])
        return cls(apart.max().item(), sizes.max().item())


def _exact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def largest(differences: Mapping[str, Difference], measure: str) -> str:
    """The name whose difference is the largest by "absolute" or "relative"; one that is no number comes first."""

    def size(name: str) -> tuple[bool, float]:
        value = getattr(differences[name], measure)
        return math.isnan(value), value

    return max(differences, key=size)


def named_tensors(value: Any, strict: bool = True) -> dict[str, Tensor]:
    """The tensors inside mappings, tuples, lists and dataclasses, by keys, indices and fields joined by dots.

    A number counts as a tensor, and None as nothing. A lone tensor is "output".

    Raises:
        ValueError: two of one name, or where ``strict`` a value of another type.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in _walk(value, "", strict):
        require(
            name not in found,
            f"{name}: expected one tensor of this name, which is its keys joined by dots, got two; rename a key",
        )
        found[name] = tensor
    return found


def _walk(value: Any, name: str, strict: bool) -> Iterator[tuple[str, Tensor]]:
    parts: Any
    if isinstance(value, Tensor):
        yield name or "output", value
        return
    if isinstance(value, bool | int | float) and strict:
        yield name or "output", torch.tensor(value, device="cpu")
        return
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple | list):
        parts = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif dataclasses.is_dataclass(value):
        parts = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif value is None or not strict:
        return
    else:
        raise ValueError(
            f"{name or 'output'}: expected tensors, numbers, or mappings, tuples, lists and dataclasses of them, got "
            f"{describe(value)}; compare functions that return those"
        )
    for key, part in parts:
        yield from _walk(part, f"{name}.{key}" if name else str(key), strict)


def output_differences(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str]
) -> dict[str, Difference]:
    """The differences of two models' outputs; ``names`` are those of the models.

    Raises:
        ValueError: other names of outputs, or another shape or device of one.
    """
    alone = [[name for name in one if name not in other] for one, other in ((a, b), (b, a))]
    if any(alone):
        found = " and ".join(f"{', '.join(own)} of {name} alone" for own, name in zip(alone, names, strict=True) if own)
        raise ValueError(f"expected outputs of one structure, got {found}; compare functions that return the same")
    for name in a:
        if a[name].shape != b[name].shape or a[name].device != b[name].device:
            found = " and ".join(f"{describe(x[name])} of {own}" for x, own in zip((a, b), names, strict=True))
            raise ValueError(f"{name}: expected one shape and device, got {found}; compare functions that agree in it")
    return {name: Difference.of(a[name], b[name]) for name in a}


def gradient_differences(
    a: Sequence[Gradient], b: Sequence[Gradient], names: tuple[str, str]
) -> tuple[dict[str, Difference], tuple[str, ...]]:
    """The differences of gradients that both have in one shape, and the names of the others.

    What both models hold is one tensor, under the first's name; what is left is matched by name. ``names`` are those of
    the models.
    """
    of_leaf = {id(one.leaf): one for one in b}
    pairs = [(one, of_leaf[id(one.leaf)]) for one in a if id(one.leaf) in of_leaf]
    both = {id(one.leaf) for one, _ in pairs}
    left_a, left_b = ([one for one in side if id(one.leaf) not in both] for side in (a, b))
    of_name = {one.name: one for one in left_b if not one.name.startswith(UNNAMED)}
    pairs += [(one, of_name[one.name]) for one in left_a if one.name in of_name]
    found: dict[str, Difference] = {}
    for one, other in pairs:
        if one.value.shape == other.value.shape:
            name = other.name if one.name.startswith(UNNAMED) else one.name
            # Two tensors may have one name, each in another model.
            found[f"{name} of {names[1]}" if name in found else name] = Difference.of(one.value, other.value)
            both |= {id(one.leaf), id(other.leaf)}
    alone = [
        (one.name, name) for side, name in zip((a, b), names, strict=True) for one in side if id(one.leaf) not in both
    ]
    return found, tuple(
        dict.fromkeys(f"{own} of {name}" if own in found or own.startswith(UNNAMED) else own for own, name in alone)
    )
