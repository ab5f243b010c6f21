"""Models averaged: one, or many along the line between two."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from onepeace_fast.checks import require
from onepeace_fast.merging.average import average
from onepeace_fast.merging.sources import COUNTS, Model, Source, check, read

Value = TypeVar("Value")
Weighted = Mapping[str | Path, float] | Sequence[tuple[Model, float]]
TOLERANCE = 1e-6  # of the weights' sum: that of thirds and sevenths written with 7 decimals


def merge(models: Weighted) -> dict[str, Tensor]:
    """Average the weights of models.

    Sums are in float64 and rounded once, so the order of the models does not matter, and models that are equal give
    their own bits. Files are mapped into memory and read once, a piece at a time: the result is all that is held.

    Args:
        models: {path: weight}, or pairs of a model and its weight. A model is a folder that ``save`` or a training
            wrote, a ``.safetensors`` file, a file by torch.save such as upstream's, a module, or a state dict. The
            weights sum to 1; a negative one goes beyond the other models.

    Returns:
        the averages on the CPU under the models' names: ``load_upstream_state_dict`` of this library's models takes
        them. Each has the dtype that torch promotes the models' to. What is no floating point
        number is the same in all models and stays; of BatchNorms' counts of batches the largest is kept.

    Raises:
        ValueError: weights that do not sum to 1 within 1e-6, and models that differ in their parts, shapes,
            vocabularies, sizes or integers; one line.
    """
    sources, weights = read_all(models)
    return combine(sources, weights)


def interpolate(
    a: Model, b: Model, points: Sequence[float], evaluate: Callable[[dict[str, Tensor]], Value]
) -> list[Value]:
    """Evaluate the models along the line from ``a`` to ``b``.

    Args:
        a, b: models as ``merge`` takes them.
        points: the weight of ``b`` at each point: 0 is ``a`` and 1 is ``b``, to the bit.
        evaluate: called with the weights at each point, in the order of ``points``.

    Returns:
        what ``evaluate`` returned for each point.

    Raises:
        ValueError: a point that is no finite number; otherwise as ``merge``.
    """
    for point in points:
        require(_is_finite(point), f"points: expected finite numbers, got {point!r}")
    sources = [read(a, 1), read(b, 2)]
    return [evaluate(combine(sources, [1 - point, point])) for point in points]


def read_all(models: Weighted) -> tuple[list[Source], list[float]]:
    """The models and their weights, which are checked.

    Raises:
        ValueError: as ``merge``, but for models that do not fit each other.
    """
    pairs = [*models.items()] if isinstance(models, Mapping) else [*models]
    require(bool(pairs), "models: expected at least one, got none")
    for model, weight in pairs:
        named = model if isinstance(model, str | Path) else type(model).__name__
        require(_is_finite(weight), f"{named}: expected a finite number as its weight, got {weight!r}")
    weights = [float(weight) for _, weight in pairs]
    total = math.fsum(weights)
    require(abs(total - 1) <= TOLERANCE, f"weights: expected a sum of 1, got {total:.7g}; divide each of them by it")
    return [read(model, place) for place, (model, _) in enumerate(pairs, 1)], weights


def combine(sources: list[Source], weights: Sequence[float]) -> dict[str, Tensor]:
    """The average of models that were read.

    Raises:
        ValueError: models that do not fit each other.
    """
    dtypes = check(sources)
    result: dict[str, Tensor] = {}
    shared: dict[object, Tensor] = {}  # a table under several names stays one
    for name, dtype in dtypes.items():
        values = [source.weights[name] for source in sources]
        place = tuple((x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride()) for x in values)
        if place not in shared:
            if dtype.is_floating_point:
                shared[place] = average(values, weights, dtype)
            elif name.endswith(COUNTS):
                shared[place] = torch.stack([value.cpu() for value in values]).amax(0)
            else:
                shared[place] = values[0].detach().cpu().clone()
        result[name] = shared[place]
    return result


def _is_finite(value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer that no float holds
        return False
