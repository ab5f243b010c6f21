"""What a route plan is built with: checks of its arguments, and the index arithmetic of packed rows."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.checks import (
    describe,
    is_on_host,
    read_values,
    require,
    require_device,
    require_mapping,
    require_tensor,
    require_values,
)
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


def fields_of_masks(
    masks: Mapping[str, Tensor], first_is_cls: bool, positions: Mapping[str, Tensor], codes: Mapping[str, Tensor],
    code_offsets: Mapping[str, int], samples: Mapping[str, Sequence[int]] | None,
    lengths: Mapping[str, Sequence[int]] | None, capacity: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a route plan of padded batches, but for the modalities' names.

    Raises:
        ValueError: as ``RoutePlan.from_masks``.
    """
    names = tuple(masks)
    check_masks(masks, codes, code_offsets, positions)
    device = masks[names[0]].device
    shapes = tuple((mask.shape[0], mask.shape[1]) for mask in masks.values())
    for name, value in positions.items():
        check_positions(name, value, masks, codes.get(name), first_is_cls)
    if lengths is not None:
        check_lengths(lengths, masks)
    else:
        counts = iter(read_values(torch.cat([mask.sum(1) for mask in masks.values()])))
        lengths = {name: list(islice(counts, rows)) for name, (rows, _) in zip(names, shapes, strict=True)}
    sample_of = check_samples({name: mask.shape[0] for name, mask in masks.items()}, samples)
    segments, row_order = segment_lengths(names, lengths, sample_of)
    row_counts = tuple(sum(row) for row in segments)
    max_length = max((sum(column) for column in zip(*segments, strict=True)), default=0)
    total = sum(row_counts)
    if capacity is None:
        capacity = total
    else:
        require(total <= capacity, f"capacity: expected at least the {total} rows of this batch, got {capacity}")
        # A plan to refill must not carry what holds for its first batch alone.
        row_counts, max_length = (), sum(length for _, length in shapes)
    known = tuple(map(tuple, segments)) if row_counts else ()

    shared, first_rows = shared_by_segments(shapes, segments, sample_of, row_order, capacity, first_is_cls)
    table = repeat_columns(shared, capacity, device)
    modality, sample, shift, *place = table.unbind()
    if total == sum(rows * length for rows, length in shapes):
        index = torch.arange(capacity, device=device)  # there is no padding
    else:
        index = compact_index(in_row_order(masks, row_order, first_is_cls), capacity)
    column, source = column_and_source(index, *place)
    position = positions_of(source, positions, masks) if positions else column
    order = torch.arange(capacity, dtype=torch.int32, device=device) + shift
    is_cls = position == 0 if first_is_cls else torch.zeros_like(position, dtype=torch.bool)
    if capacity > total:
        for value in (order, is_cls):
            value[total:] = 0
    return {
        "offsets": copy_to_device([*(row[0] for row in first_rows), total], torch.int32, device),
        "cu_seqlens": copy_to_device(first_rows, torch.int32, device),
        "modality": modality,
        "sample": sample,
        "position": position,
        "code": codes_of(names, codes, position, [*map(sum, segments), capacity - total]),
        "order": order,
        "is_cls": is_cls,
        "source": source,
        "code_offsets": tuple(code_offsets.get(n, s[1] - 1) for n, s in zip(names, shapes, strict=True)),
        "padded_shapes": shapes,
        "row_counts": row_counts,
        "max_length": max_length,
        "segment_lengths": known,
        "has_cls": first_is_cls,
    }


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


def check_masks(
    masks: Mapping[str, Tensor], codes: Mapping[str, Tensor], code_offsets: Mapping[str, int],
    positions: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Raise unless masks are bool matrices on one device, at least one of them, and codes reach all their columns."""
    require_mapping("masks", masks)
    require(len(masks) > 0, "masks: expected at least one modality, got none")
    device = next(iter(masks.values())).device
    for name, mask in masks.items():
        require_tensor(f"masks[{name!r}]", mask, (torch.bool,), "[rows, length]", 2)
        require_device(f"masks[{name!r}]", mask, device)
    for what, of in (("codes", codes), ("code_offsets", code_offsets)):
        unknown = [name for name in of if name not in masks]
        require(not unknown, lambda: f"{what}: expected modalities of the masks, {list(masks)}, got {unknown}")  # noqa: B023
    for name, table in codes.items():
        require_tensor(f"codes[{name!r}]", table, INTEGERS, "[positions]", 1)
        columns = 0 if name in positions else masks[name].shape[1]
        if table.shape[0] < columns:
            raise ValueError(f"codes[{name!r}]: expected those of {columns} positions, got {table.shape[0]}")


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
    _require_inside(f"positions[{name!r}]", value, limit)
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
        (rows, width), own = mask.shape, whole_numbers(f"lengths[{name!r}]", lengths[name])
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
    _require_inside(name, ids, limit)


def _require_inside(name: str, ids: Tensor, limit: int) -> None:
    inside = (ids >= 0) & (ids < limit)
    expected = f"{name}: expected 0 to {limit - 1}, got "
    if not is_on_host(ids):
        require_values(inside.all(), expected + "others")
    elif not inside.all():
        wrong = sorted(set(ids[~inside].tolist()))[:5]
        raise ValueError(f"{expected}{wrong}")


def check_alike(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless tokens of all modalities have one width, dtype and device; autocast joins half and float32."""
    of_first, first = next(iter(tensors.items()))
    for of, x in tensors.items():
        alike = x.dtype == first.dtype or (_is_autocast(x) and torch.float64 not in (x.dtype, first.dtype))
        if not (alike and x.shape[2:] == first.shape[2:] and x.device == first.device):
            raise ValueError(
                f"{name}: expected tensors of one width, dtype and device, got {describe(first)} of {of_first!r} and "
                f"{describe(x)} of {of!r}"
            )


def _is_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def whole_numbers(name: str, values: Sequence[int]) -> list[int]:
    """The values as integers; raises where one is another number."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        got = [*values] if isinstance(values, Iterable) else values
        raise ValueError(f"{name}: expected integers, got {describe(got)}") from None


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


def shared_by_segments(
    shapes: Sequence[tuple[int, int]], segments: list[list[int]], sample_of: Mapping[str, Sequence[int]],
    row_order: Mapping[str, Sequence[int]], capacity: int, first_is_cls: bool,
) -> tuple[list[tuple[int, ...]], list[list[int]]]:  # fmt: skip
    """What the rows of a segment share, and the first row of every segment, the end last: [modalities, samples + 1].

    A tuple for each padded row, in the order of the packed ones, and one for the inert rows: how many packed rows it
    has; their modality; their sample; what makes the number of a packed row its place in the sample; the flat index of
    column 0; where ``in_row_order`` has column 0, whole rows apart: behind the last where that is a CLS; the columns.
    """
    shared: list[tuple[int, ...]] = []
    first_rows: list[list[int]] = []
    start = base = 0
    before = [0] * len(segments[0])
    for m, (name, (rows, length)) in enumerate(zip(row_order, shapes, strict=True)):
        segment, samples = segments[m], sample_of[name]
        first = [*accumulate(segment, initial=start)]
        first_rows.append(first)
        for row in row_order[name]:
            s, column_0 = samples[row], base + row * length
            shared.append((segment[s], m, s, before[s] - first[s], column_0, column_0 - first_is_cls, length))
            before[s] += segment[s]
        start, base = first[-1], base + rows * length
    shared.append((capacity - start, len(segments), 0, 0, base, base, 1))
    return shared, first_rows


def repeat_columns(shared: Sequence[tuple[int, ...]], capacity: int, device: torch.device) -> Tensor:
    """Each tuple but for its first number, as a column as often as that says: int32 [6, capacity], by one copy."""
    table = copy_to_device([*zip(*shared, strict=True)], torch.int32, device)
    return table[1:].repeat_interleave(table[0], dim=1, output_size=capacity)


def in_row_order(masks: Mapping[str, Tensor], row_order: Mapping[str, Sequence[int]], first_is_cls: bool) -> Tensor:
    """Which tokens are real, bool [padded tokens], in the order of packed rows: sorted by sample, a CLS behind."""
    flat = []
    for name, mask in masks.items():
        order = row_order[name]
        if order != list(range(len(order))):
            mask = mask[copy_to_device(order, torch.int64, mask.device)]
        flat.append((mask.roll(-1, 1) if first_is_cls else mask).flatten())
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def compact_index(mask: Tensor, capacity: int, fill: int | None = None) -> Tensor:
    """Index of each True entry of a vector, padded with ``fill``, by default its length: int64 [capacity]."""
    count = mask.shape[0]
    target = mask.cumsum(0) * mask  # what is not wanted meets in an entry of its own
    index = torch.full((capacity + 1,), count if fill is None else fill, device=mask.device)
    return index.scatter_(0, target, torch.arange(count, device=mask.device))[1:]


def column_and_source(index: Tensor, column_0: Tensor, first: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Column of each row's token in its padded row, int32, and its flat index in the concatenated inputs, int64.

    ``index`` is its place in what ``in_row_order`` gives; the others are those of ``shared_by_segments``.
    """
    column = (index - first) % columns
    return column.int(), column + column_0


def positions_of(source: Tensor, positions: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
    """Position of each row: the id of its token, or its column in a modality that has no ids; inert rows get 0."""
    flat = []
    for name, mask in masks.items():
        if name in positions:
            flat.append(positions[name].int().flatten())
        else:
            columns = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
            flat.append(columns.expand(mask.shape).flatten())
    return torch.cat([*flat, flat[0].new_zeros(1)])[source]


def codes_of(names: Sequence[str], codes: Mapping[str, Tensor], position: Tensor, counts: Sequence[int]) -> Tensor:
    """Code of each row: its position, or the entry of its modality's table; ``counts`` rows of each, then inert."""
    if not codes:
        return position
    pieces = [*position.split(counts)]
    for index, name in enumerate(names):
        if name in codes:
            table = codes[name].to(torch.int32)
            pieces[index] = table[pieces[index].clamp(max=table.shape[0] - 1).long()]
    return torch.cat(pieces)


def segment_of_rows(cu_seqlens: Tensor, modality: Tensor, sample: Tensor) -> Tensor:
    """Number of each row's segment, modality after modality; inert rows have the one behind the last: int64 [C]."""
    modalities, samples = cu_seqlens.shape[0], cu_seqlens.shape[1] - 1
    return torch.where(modality >= modalities, modalities * samples, modality * samples + sample).long()


def order_in_sample(cu_seqlens: Tensor, modality: Tensor, sample: Tensor) -> Tensor:
    """Place of each row in its sample, the modalities one after another."""
    starts, lengths = cu_seqlens[:, :-1], cu_seqlens.diff(dim=1)
    shift = _of_segments(lengths.cumsum(0) - lengths - starts, segment_of_rows(cu_seqlens, modality, sample))
    rows = torch.arange(modality.shape[0], dtype=torch.int32, device=modality.device)
    return torch.where(modality >= cu_seqlens.shape[0], 0, rows + shift)


def _of_segments(values: Tensor, segment: Tensor) -> Tensor:
    """Each row's value of its segment, int32 [C]; inert rows get 0."""
    return torch.cat([values.flatten().int(), values.new_zeros(1, dtype=torch.int32)])[segment]


def cls_first(cu_seqlens: Tensor, segment: Tensor, order: Tensor, is_cls: Tensor) -> Tensor:
    """The order with the CLS rows of each segment, which are its last, before the others: int32 [C]."""
    before = torch.cat([is_cls.new_zeros(1, dtype=torch.int64), is_cls.cumsum(0)])
    bounds = before[cu_seqlens.long()]
    count = _of_segments(bounds.diff(dim=1), segment)
    others = _of_segments(cu_seqlens.diff(dim=1) - bounds.diff(dim=1), segment)
    return torch.where(is_cls, order - others, order + count)


def ranks(value: Tensor, modality: Tensor, sample: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Rank of each row's value in its sample, equal ones alike, without gaps: int32 [C]; inert rows get 0."""
    inert = modality >= cu_seqlens.shape[0]
    sample = torch.where(inert, cu_seqlens.shape[1], sample)
    by_value = value.argsort(stable=True)
    row = by_value[sample[by_value].argsort(stable=True)]
    sample, value = sample[row], value[row]
    starts = torch.ones_like(inert)
    starts[1:] = sample[1:] != sample[:-1]
    step = starts.clone()
    step[1:] |= value[1:] != value[:-1]
    count = step.cumsum(0)
    rank = count - torch.where(starts, count, 0).cummax(0).values
    return torch.where(inert, 0, torch.empty_like(rank).scatter_(0, row, rank)).int()


def prefix_values(order: Tensor, modality: Tensor, first: Sequence[int]) -> Tensor:
    """The order with all rows of the modalities ``first`` before everything else."""
    for m in first:
        order = torch.where(modality == m, -1, order)
    return order
