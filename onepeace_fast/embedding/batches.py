"""What goes through a model together: texts of similar length, images and sounds up to a size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onepeace_fast.checks import require

Name = Callable[[int], str]
Note = Callable[[int, str], None]


@dataclass(frozen=True)
class Batches:
    """How much goes through a model at once: tokens of texts with their padding, images, seconds of sound."""

    tokens: int = 4096
    images: int = 16
    seconds: float = 120.0

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("images", self.images), ("seconds", self.seconds)):
            require(value > 0, lambda name=name, value=value: f"{name}: expected a positive number, got {value!r}")


def by_length(lengths: dict[int, int], tokens: int) -> Iterator[list[int]]:
    """Places in batches of texts of similar length, none with more tokens than ``tokens`` unless it is one text.

    A row of a batch counts as long as its longest, with CLS.
    """
    batch: list[int] = []
    for place in sorted(lengths, key=lambda place: lengths[place]):
        if batch and (len(batch) + 1) * (lengths[place] + 1) > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def each(
    modality: str, items: Sequence[Any], read: Callable[[Any], Any], note: Note, name: Name
) -> Iterator[tuple[int, Any]]:
    """Each item's place and what was read of it; those that cannot be read are noted."""
    for place, item in enumerate(items):
        try:
            yield place, read(item)
        except ValueError as error:
            note(place, str(error).replace(f"{modality}_list[0]", name(place), 1))


def groups(
    read: Iterator[tuple[int, Any]], size: Callable[[Any], float], most: float
) -> Iterator[tuple[list[int], list[Any]]]:
    """Consecutive items, together at most of this size unless it is one item."""
    places: list[int] = []
    values: list[Any] = []
    total = 0.0
    for place, value in read:
        if values and total + size(value) > most:
            yield places, values
            places, values, total = [], [], 0.0
        places.append(place)
        values.append(value)
        total += size(value)
    if values:
        yield places, values
