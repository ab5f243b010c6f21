"""What goes into MiCo, checked: frames of several modalities, texts, and the sample of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from onepeace_fast.checks import describe, read_values, require, require_device, require_tensor, require_values
from onepeace_fast.models.mico.config import PADDING, EvaConfig, TextConfig
from onepeace_fast.routing import INTEGERS, whole_numbers

Given: TypeAlias = Tensor | Sequence[Tensor]
SHOWN = 8  # samples in a line


class Rows(NamedTuple):
    """One modality of a batch: its rows in the order of their samples."""

    values: Tensor  # frames [frames, 3, side, side], or of a subtitle ids [rows, length]
    counts: list[int]  # frames of each row
    samples: list[int]  # of each row, ascending
    given: list[int]  # which row of the input each one is


def count_rows(name: str, given: Given) -> int:
    """How many rows a modality has; raises where it is no tensor or sequence of them."""
    fits = given.dim() > 0 if isinstance(given, Tensor) else isinstance(given, Sequence)
    require(fits, lambda: f"{name}: expected a tensor or a list of rows of frames, got {describe(given)}")
    return len(given)


def read_samples(name: str, rows: int, samples: Sequence[int] | Tensor | None, count: int | None) -> list[int]:
    """The sample of each row; ``count`` is how many there are, where that is known."""
    require(rows > 0, f"{name}: expected at least one row, got none; leave the modality out")
    if samples is None:
        found = [*range(rows)]
    else:
        found = integers(f"samples[{name!r}]", samples)
        require(
            len(found) == rows and len({*found}) == rows,
            lambda: f"samples[{name!r}]: expected another sample for each of {rows} rows, got {found}",
        )
    limit = "" if count is None else f" below {count}"
    require(
        all(sample >= 0 and (count is None or sample < count) for sample in found),
        lambda: f"samples[{name!r}]: expected samples{limit}, got {found}",
    )
    return found


def integers(name: str, values: Sequence[int] | Tensor) -> list[int]:
    """The values of a list or a tensor; raises where one is no integer."""
    return whole_numbers(name, read_values(values) if isinstance(values, Tensor) else values)


def read_frames(
    name: str, given: Given, config: EvaConfig, samples: list[int], device: torch.device | None = None
) -> Rows:
    """Frames of one modality, of each row its own number of them; those of one channel have it three times.

    Raises:
        ValueError: a row without a frame, or frames of another size than the encoder's.
    """
    side, rows = config.image_size, [*given]
    for place, row in enumerate(rows):
        fits = isinstance(row, Tensor) and row.is_floating_point() and row.dim() in (3, 4) and len(row) > 0
        sizes = ((3, side, side),) if fits and row.dim() == 4 else ((side, side),)
        require(
            fits and row.shape[1:] in sizes,
            lambda place=place, row=row: (
                f"{name}[{place}]: expected floating point frames [frames, 3, {side}, {side}], or of one channel "
                f"[frames, {side}, {side}], got {describe(row)}"
            ),
        )
        device = row.device if device is None else device
        require_device(f"{name}[{place}]", row, device)
    order = sorted(range(len(rows)), key=lambda row: samples[row])
    whole = [row if row.dim() == 4 else row[:, None].expand(-1, 3, -1, -1) for row in (rows[i] for i in order)]
    return Rows(torch.cat(whole), [len(row) for row in whole], [samples[i] for i in order], order)


def read_texts(name: str, ids: Tensor, config: TextConfig) -> Tensor:
    """bool [texts, length], which tokens are real: those before the padding.

    Raises:
        ValueError: ids that do not fit, or more of them than there are positions.
    """
    require_tensor(name, ids, INTEGERS, "[texts, length]", 2)
    length, limit = ids.shape[1], config.max_positions
    require(0 < length <= limit, lambda: f"{name}: expected 1 to {limit} tokens, one for a position, got {length}")
    require_values(
        ((ids >= 0) & (ids < config.vocab_size)).all(),
        f"{name}: expected ids from 0 to {config.vocab_size - 1}, got others",
    )
    valid = ids != PADDING
    require_values(
        valid[:, 0].all() & (valid[:, 1:] <= valid[:, :-1]).all(),
        f"{name}: expected texts with their padding, {PADDING}, behind them, got one that begins or goes on with it",
    )
    return valid


def require_every_sample(count: int, rows: Mapping[str, Rows]) -> None:
    """Raise where a sample has nothing to be seen or heard."""
    found = {sample for one in rows.values() for sample in one.samples}
    empty = [*islice((sample for sample in range(count) if sample not in found), SHOWN + 1)]
    more = " and more" if len(empty) > SHOWN else ""
    require(
        not empty,
        lambda: f"samples: expected at least one modality in each of {count}, got none in {empty[:SHOWN]}{more}",
    )
