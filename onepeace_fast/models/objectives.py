"""What both pretraining tasks check of their arguments, and their denoising terms (ONE-PEACE, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from onepeace_fast.checks import describe, require
from onepeace_fast.models.inputs import Batch, Hidden
from onepeace_fast.models.losses import denoising_loss


def require_masks(masks: Mapping[str, Tensor], names: set[str]) -> None:
    """Raise unless ``masks`` holds exactly these."""
    got = sorted(masks) if isinstance(masks, Mapping) else describe(masks)
    require(got == sorted(names), f"masks: got {got}, takes exactly one for each of {sorted(names)}")


def require_pairs(first: str, value: object, other: str, other_value: object) -> None:
    """Raise unless both modalities have as many rows."""
    rows = [len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else 0 for tensor in (value, other_value)]
    require(rows[0] == rows[1], f"{first}, {other}: got {rows[0]} and {rows[1]} rows, takes a pair in every row")


def require_smoothing(smoothing: float) -> None:
    """Raise unless a label smoothing is a probability below 1."""
    require(0.0 <= smoothing < 1.0, f"label_smoothing: got {smoothing}, takes a probability in [0, 1)")


def denoising_term(
    batch: Batch, smoothing: float, modality: str, rebuilt: Mapping[str, Tensor], teacher: Mapping[str, Tensor],
    hidden: Hidden,
) -> Tensor:  # fmt: skip
    """The loss of one modality's hidden tokens in one pass: what was rebuilt of them against the teacher's features."""
    lengths = batch.valid.lengths[modality]
    return denoising_loss(
        rebuilt[modality], teacher[modality], batch.valid.masks[modality], sum(lengths) - len(lengths),
        hidden.masks[modality], hidden.counts[modality], smoothing,
    )  # fmt: skip
