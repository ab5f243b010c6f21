"""Routes of tokens in any order: a modality id of each token out of boolean masks or lists of indices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from numbers import Integral
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
from onepeace_fast.routing import INTEGERS, check_ids, copy_to_device, order_in_sample, tensor_to_device


def ids_of_masks(masks: Mapping[str, Tensor], last_wins: bool, takes_rest: bool) -> Tensor:
    """The modality id of each token, int64 [tokens]; the number of masks for one in no mask, where these are taken.

    Raises:
        ValueError: masks of another dtype, shape or device, or on a CPU a token in several masks or in none.
    """
    require_mapping("masks", masks)
    require(len(masks) > 0, "masks: expected at least one modality, got none")
    first = next(iter(masks.values()))
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (1, 2):
            raise ValueError(f"masks[{name!r}]: expected bool [tokens] or [samples, length], got {describe(mask)}")
        if mask.shape != first.shape:
            raise ValueError(
                f"masks[{name!r}]: expected the first mask's shape, {list(first.shape)}, got {describe(mask)}"
            )
        require_device(f"masks[{name!r}]", mask, first.device)
    chosen = torch.stack([mask.flatten() for mask in masks.values()])
    if not last_wins:
        require_values(
            (chosen.sum(0) <= 1).all(),
            "masks: expected each token in one mask, got a token in several; last_wins=True gives it to the last",
        )
    if not takes_rest:
        require_values(
            chosen.any(0).all(),
            "masks: expected each token in a mask, got a token in none; leave_out=True gives it no row, inert=True a "
            "row that comes out as zero",
        )
    numbers = torch.arange(1, len(masks) + 1, device=first.device)[:, None]
    last = (chosen * numbers).amax(0) - 1
    return torch.where(last < 0, len(masks), last)


def samples_of_rows(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the rows of mask matrices say of each token: its sample and its position in it; nothing of vectors."""
    first = next(iter(masks.values()))
    if first.dim() == 1:
        return {}
    samples, length = first.shape
    require(samples > 0, lambda: f"masks: expected at least one sample, got {describe(first)}")
    ids, positions = (torch.arange(size, device=first.device) for size in (samples, length))
    return {
        "sample_ids": ids.repeat_interleave(length), "sample_count": samples, "positions": positions.repeat(samples),
        "max_position": length - 1,
    }  # fmt: skip


def fields_of_ids(
    modality_ids: Tensor, names: Sequence[str], sample_ids: Tensor | None, sample_count: int, positions: Tensor | None,
    is_cls: Tensor | None, max_position: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a route plan of interleaved tokens, but for the modalities' names.

    Raises:
        ValueError: as ``RoutePlan.from_modality_ids``.
    """
    modalities = len(names)
    require(len(set(names)) == modalities, lambda: f"modalities: expected names that differ, got {list(names)}")
    check_ids("modality_ids", modality_ids, modalities)
    require(sample_count > 0, f"sample_count: expected a positive number, got {sample_count}")
    if sample_ids is None and sample_count > 1:
        raise ValueError(f"sample_ids: expected the sample of each token with sample_count {sample_count}, got none")
    count, device = modality_ids.shape[0], modality_ids.device
    sample_ids = torch.zeros_like(modality_ids) if sample_ids is None else sample_ids
    positions = torch.arange(count, device=device) if positions is None else positions
    has_cls = False if is_cls is None else None
    is_cls = torch.zeros(count, dtype=torch.bool, device=device) if is_cls is None else is_cls
    limit = count - 1 if max_position is None else max_position
    check_tokens(count, device, sample_ids, sample_count, positions, limit, is_cls)
    key = modality_ids.long() * sample_count + sample_ids.long()
    source = torch.argsort(key * 2 + is_cls, stable=True)
    starts = torch.searchsorted(key[source], torch.arange(modalities * sample_count + 1, device=device)).int()
    segment_starts = starts[:-1].view(modalities, sample_count)
    cu_seqlens = torch.cat([segment_starts, starts[sample_count::sample_count, None]], dim=1)
    modality, sample = modality_ids[source].int(), sample_ids[source].int()
    return {
        "offsets": torch.cat([starts[:-1:sample_count], starts[-1:]]), "cu_seqlens": cu_seqlens, "modality": modality,
        "sample": sample, "position": positions[source].int(), "code": positions[source].int(),
        "order": order_in_sample(cu_seqlens, modality, sample), "is_cls": is_cls[source], "source": source,
        "code_offsets": (limit,) * modalities, "padded_shapes": ((1, count),), "has_cls": has_cls,
    }  # fmt: skip


def check_tokens(
    count: int, device: torch.device, sample_ids: Tensor, sample_count: int, positions: Tensor, limit: int,
    is_cls: Tensor,
) -> None:  # fmt: skip
    """Raise unless there are a sample, a position up to ``limit`` and whether it is CLS of each of the tokens."""
    for name, value in (("sample_ids", sample_ids), ("positions", positions), ("is_cls", is_cls)):
        require(value.shape == (count,), f"{name}: expected one entry per token, [{count}], got {describe(value)}")
        require_device(name, value, device)
    check_ids("sample_ids", sample_ids, sample_count)
    check_ids("positions", positions, limit + 1)
    require_tensor("is_cls", is_cls, (torch.bool,), "[tokens]", 1)


def ids_of_indices(indices: Mapping[str, Sequence[int] | Tensor], tokens: int, device: torch.device | str) -> Tensor:
    """The modality id of each token, int64 [tokens] on a device.

    Raises:
        ValueError: lists that do not hold every token exactly once.
    """
    require_mapping("indices", indices)
    require(len(indices) > 0, "indices: expected at least one modality, got none")
    for name, mine in indices.items():
        if isinstance(mine, Tensor):
            require_tensor(f"indices[{name!r}]", mine, INTEGERS, "[tokens of the modality]", 1)
    if all(not isinstance(mine, Tensor) or is_on_host(mine) for mine in indices.values()):
        _check_lists(indices, tokens)
    total = sum(map(len, indices.values()))
    require(total == tokens, f"indices: expected each of {tokens} tokens in one list, got {total} indices")
    flat = torch.cat([_on_device(mine, torch.device(device)) for mine in indices.values()])
    inside = (flat >= 0) & (flat < tokens)
    seen = flat.new_zeros(tokens).scatter_add(0, torch.where(inside, flat, 0), inside.long())
    require_values((seen == 1).all(), f"indices: expected each token from 0 to {tokens - 1} once, got others")
    numbers = torch.cat([flat.new_full((len(mine),), m) for m, mine in enumerate(indices.values())])
    return flat.new_zeros(tokens).scatter_(0, flat, numbers)


def _check_lists(indices: Mapping[str, Sequence[int] | Tensor], tokens: int) -> None:
    """Raise, naming the tokens, where lists on the host do not hold every token exactly once."""
    lists = [mine for mine in indices.values() if not isinstance(mine, Tensor)]
    wrong = [index for mine in lists for index in mine if not isinstance(index, Integral)]
    require(not wrong, f"indices: expected integers, got {wrong[:5]}")
    flat = [int(index) for mine in indices.values() for index in (mine.tolist() if isinstance(mine, Tensor) else mine)]
    counted = Counter(flat)
    outside = sorted(index for index in counted if not 0 <= index < tokens)
    require(not outside, f"indices: expected tokens from 0 to {tokens - 1}, got {outside[:5]}")
    repeated = sorted(index for index, count in counted.items() if count > 1)
    left_out = sorted(set(range(tokens)) - set(flat))
    faults = [f"{those[:5]} {where}" for those, where in ((repeated, "more than once"), (left_out, "in none")) if those]
    require(not faults, f"indices: expected each of {tokens} tokens in one list, got {' and '.join(faults)}")


def _on_device(mine: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    if not isinstance(mine, Tensor):
        return copy_to_device([int(index) for index in mine], torch.int64, device)
    return tensor_to_device(mine.long(), device)


def inert_last(plan: Any) -> dict[str, Any]:
    """The fields that differ in a route plan without its last modality, whose rows become inert."""
    count = len(plan.modalities) - 1
    real = plan.modality < count
    return {
        "modalities": plan.modalities[:-1],
        "offsets": plan.offsets[:-1],
        "cu_seqlens": plan.cu_seqlens[:-1],
        **{name: torch.where(real, getattr(plan, name), 0) for name in ("sample", "position", "code", "order")},
        "is_cls": plan.is_cls & real,
        "source": torch.where(real, plan.source, plan.padded_rows),
        "code_offsets": plan.code_offsets[:-1],
    }


def without_last(plan: Any) -> dict[str, Any]:
    """The fields that differ in a route plan without its last modality, whose rows are left out; one host read."""
    lengths = iter(read_values(plan.cu_seqlens[:-1].diff(dim=1).flatten()))
    segments = tuple(tuple(islice(lengths, plan.sample_count)) for _ in plan.modalities[:-1])
    total = sum(map(sum, segments))
    of_rows = ("modality", "sample", "position", "code", "order", "is_cls", "source")
    return {
        "modalities": plan.modalities[:-1],
        "offsets": plan.offsets[:-1],
        "cu_seqlens": plan.cu_seqlens[:-1],
        **{name: getattr(plan, name)[:total] for name in of_rows},
        "code_offsets": plan.code_offsets[:-1],
        "row_counts": tuple(map(sum, segments)),
        "max_length": max(map(sum, zip(*segments, strict=True))),
        "segment_lengths": segments,
    }
