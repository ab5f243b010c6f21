"""What a route plan is built with: checks of its arguments, and the index arithmetic of packed rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import describe, read_values, require, require_device, require_tensor, require_values
from onepeace_fast.relative_position import MAX_POSITIONS

INTEGERS = (torch.int32, torch.int64)


def copy_to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of host values on a device."""
    return tensor_to_device(torch.tensor(values, dtype=dtype, device="cpu"), torch.device(device))


def tensor_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the copy to a GPU is queued from pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def branch_row_counts(
    drop_path: Tensor, segment_lengths: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Rows of each modality that every branch computes, from factors [layers, 2, S] on the CPU: [layers][2][G]."""
    lengths = torch.tensor(segment_lengths, dtype=torch.float64, device="cpu")
    counts = ((drop_path != 0).double() @ lengths.t()).long().tolist()
    return tuple(tuple(map(tuple, layer)) for layer in counts)


def check_samples(rows: Mapping[str, int], samples: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]]:
    """The sample of each row of each modality; raises unless samples are distinct in a modality and leave no gap."""
    if samples is None:
        require(
            len(set(rows.values())) <= 1,
            f"samples: expected the sample of each row where modalities differ in rows, got none with {rows} rows",
        )
        return {name: list(range(count)) for name, count in rows.items()}
    if set(samples) != set(rows):
        raise ValueError(f"samples: expected exactly the modalities given, {sorted(rows)}, got {sorted(samples)}")
    result = {name: list(samples[name]) for name in rows}
    for name, values in result.items():
        if len(values) != rows[name]:
            raise ValueError(f"samples[{name!r}]: expected an entry per row, {rows[name]}, got {len(values)}")
        repeated = sorted(value for value, count in Counter(values).items() if count > 1)
        require(
            not repeated, f"samples[{name!r}]: expected each sample once per modality, got {repeated} more than once"
        )
    used = set().union(*map(set, result.values()))
    gaps = sorted(set(range(len(used))) - used)
    require(not gaps, f"samples: expected every sample from 0 on in at least one modality, got no row for {gaps[:5]}")
    return result


def check_masks(masks: Mapping[str, Tensor]) -> None:
    """Raise unless masks are bool matrices on one device, at least one of them."""
    require(len(masks) > 0, "masks: expected at least one modality, got none")
    device = next(iter(masks.values())).device
    for name, mask in masks.items():
        require_tensor(f"masks[{name!r}]", mask, (torch.bool,), "[rows, length]", 2)
        require_device(f"masks[{name!r}]", mask, device)


def check_positions(
    name: str, value: Tensor, masks: Mapping[str, Tensor], codes: Tensor | None, first_is_cls: bool
) -> None:
    """Raise unless position ids are a matrix of integers of their mask's shape, each has a code, and 0 is CLS alone."""
    require(name in masks, f"positions: expected modalities of the masks, {list(masks)}, got {name!r}")
    require_tensor(f"positions[{name!r}]", value, INTEGERS, "[rows, length]", 2)
    shape = list(masks[name].shape)
    if list(value.shape) != shape:
        raise ValueError(f"positions[{name!r}]: expected its mask's shape, {shape}, got {describe(value)}")
    require_device(f"positions[{name!r}]", value, masks[name].device)
    limit = MAX_POSITIONS if codes is None else codes.shape[0]
    require_values(
        ((value >= 0) & (value < limit)).all(),
        f"positions[{name!r}]: expected 0 to {limit - 1}, got a position out of range",
    )
    if first_is_cls:
        first = torch.arange(value.shape[1], device=value.device) == 0
        require_values(
            (((value == 0) == first) | ~masks[name]).all(),
            f"positions[{name!r}]: expected 0 in the first column, which is CLS, and nowhere else, got others",
        )


def check_lengths(lengths: Mapping[str, Sequence[int]], masks: Mapping[str, Tensor]) -> None:
    """Raise unless lengths fit the masks and count their True entries: row by row on a CPU, in all elsewhere."""
    if set(lengths) != set(masks):
        raise ValueError(f"lengths: expected the modalities of the masks, {list(masks)}, got {list(lengths)}")
    for name, mask in masks.items():
        (rows, width), own = mask.shape, list(lengths[name])
        if len(own) != rows or not all(0 <= length <= width for length in own):
            raise ValueError(f"lengths[{name!r}]: expected 0 to {width} for each of {rows} rows, got {describe(own)}")
        if mask.device.type == "cpu" and own != (counted := read_values(mask.sum(1))):
            raise ValueError(f"lengths[{name!r}]: expected its mask's {describe(counted)}, got {describe(own)}")
    if next(iter(masks.values())).device.type != "cpu":
        everywhere = torch.stack([mask.sum() for mask in masks.values()]).sum()
        require_values(everywhere == sum(map(sum, lengths.values())), "lengths: expected the masks' total, got another")


def check_ids(name: str, ids: Tensor, limit: int) -> None:
    """Raise unless ids are integers from 0 to ``limit`` - 1."""
    require_tensor(name, ids, INTEGERS, "[tokens]", 1)
    inside = ((ids >= 0) & (ids < limit)).all()
    require_values(inside, f"{name}: expected 0 to {limit - 1}, got an id out of range")


def segment_lengths(
    names: Sequence[str], lengths: Mapping[str, Sequence[int]], sample_of: Mapping[str, Sequence[int]]
) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Segment length of each (modality, sample), and each modality's rows in the order of their samples."""
    samples = len(set().union(*map(set, sample_of.values())))
    segments, row_order = [], {}
    for name in names:
        row = [0] * samples
        for sample, length in zip(sample_of[name], lengths[name], strict=True):
            row[sample] = int(length)
        segments.append(row)
        row_order[name] = sorted(range(len(sample_of[name])), key=sample_of[name].__getitem__)
    return segments, row_order


def cumulative_rows(segments: list[list[int]], device: torch.device) -> Tensor:
    """First row of every segment and, last in each row, the end: int32 [modalities, samples + 1]."""
    rows, start = [], 0
    for row in segments:
        rows.append([*accumulate(row, initial=start)])
        start = rows[-1][-1]
    return copy_to_device(rows, torch.int32, device)


def compact_index(mask: Tensor, index: Tensor, capacity: int, fill: int) -> Tensor:
    """The entries of ``index`` whose ``mask[index]`` is True, in order, padded with ``fill``: int64 [capacity]."""
    chosen = mask[index]
    target = torch.where(chosen, chosen.cumsum(0) - 1, capacity)
    return index.new_full((capacity + 1,), fill).scatter_(0, target, index)[:capacity]


def per_row(source: Tensor, values: Sequence[Tensor], shapes: Sequence[tuple[int, int]], inert: int = 0) -> Tensor:
    """Gather an int32 value of each row from what expands to each modality's padded shape; inert rows get ``inert``."""
    padded = [value.expand(shape).reshape(-1) for value, shape in zip(values, shapes, strict=True)]
    return torch.cat([*padded, torch.full((1,), inert, dtype=torch.int32, device=source.device)])[source]


def codes_of(names: Sequence[str], codes: Mapping[str, Tensor], position: Tensor, modality: Tensor) -> Tensor:
    """Code of each row: its position, or the entry of its modality's table of codes."""
    result = position
    for index, name in enumerate(names):
        if name in codes:
            table = codes[name].to(torch.int32)
            chosen = table[position.clamp(max=table.shape[0] - 1).long()]
            result = torch.where(modality == index, chosen, result)
    return result


def order_in_sample(cu_seqlens: Tensor, modality: Tensor, sample: Tensor) -> Tensor:
    """Place of each row in its sample, the modalities one after another."""
    starts, lengths = cu_seqlens[:, :-1], cu_seqlens.diff(dim=1)
    shift = (lengths.cumsum(0) - lengths - starts).to(torch.int32)
    table = torch.cat([shift.flatten(), shift.new_zeros(1)])
    inert = modality >= cu_seqlens.shape[0]
    segment = torch.where(inert, shift.numel(), modality * shift.shape[1] + sample)
    rows = torch.arange(modality.shape[0], dtype=torch.int32, device=modality.device)
    return torch.where(inert, 0, rows + table[segment.long()])


def prefix_order(cu_seqlens: Tensor, modality: Tensor, sample: Tensor, order: Tensor, first: Sequence[int]) -> Tensor:
    """Order 0 of the modalities ``first``; all else counts from 1 in its sample without them."""
    lengths = cu_seqlens.diff(dim=1)
    of_first = torch.zeros_like(lengths)
    for m in first:
        of_first[m] = lengths[m]
    skipped = torch.cat([of_first.cumsum(0).flatten(), lengths.new_zeros(1)])
    inert = modality >= cu_seqlens.shape[0]
    segment = torch.where(inert, lengths.numel(), modality * lengths.shape[1] + sample)
    is_first = inert.clone()
    for m in first:
        is_first |= modality == m
    return torch.where(is_first, 0, order - skipped[segment.long()] + 1).to(torch.int32)
