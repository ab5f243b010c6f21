"""Checks of a model's inputs before any work, and the one read of the device that a step needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from onepeace_fast.checks import describe, read_values, require, require_device, require_tensor
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.routing import INTEGERS, check_samples


def read_together(tensors: Mapping[tuple[str, Any], Tensor]) -> dict[tuple[str, Any], list[int]]:
    """Values of small integer tensors, flat, in one copy from the device.

    Raises:
        ValueError: inside ``torch.vmap``, whose tensors have no values to read.
    """
    if torch._C._are_functorch_transforms_active() and any(map(is_batchedtensor, tensors.values())):
        raise ValueError(
            "text, padding, masks, samples: expected tensors that the host can read, got a batch by torch.vmap; "
            "give all samples as rows of one call"
        )
    away = [value.flatten().long() for value in tensors.values() if value.device.type != "cpu"]
    flat = iter(read_values(torch.cat(away)) if away else ())
    return {
        key: read_values(value.flatten()) if value.device.type == "cpu" else list(islice(flat, value.numel()))
        for key, value in tensors.items()
    }


@dataclass(frozen=True)
class Subset:
    """Which tokens an encoder pass sees: bool masks [rows, length] and the number of True in each row."""

    masks: dict[str, Tensor]
    lengths: dict[str, list[int]]


@dataclass(frozen=True)
class Batch:
    """Checked inputs: each modality's tensor, its real tokens, and the sample of each row (None: rows in order)."""

    inputs: dict[str, Tensor]
    valid: Subset
    samples: dict[str, list[int]] | None

    def select(self, *names: str) -> Batch:
        """The same batch with some of its modalities."""
        return Batch(
            {name: self.inputs[name] for name in names},
            Subset({n: self.valid.masks[n] for n in names}, {n: self.valid.lengths[n] for n in names}),
            None if self.samples is None else {name: self.samples[name] for name in names},
        )


@dataclass(frozen=True)
class Hidden:
    """A denoising pass: hidden tokens bool [rows, length] without padding, how many they are, and the visible ones."""

    masks: dict[str, Tensor]
    counts: dict[str, int]
    visible: Subset


def read_batch(
    adapters: Mapping[str, Adapter],
    inputs: Mapping[str, Tensor | None],
    *,
    samples: Mapping[str, Tensor | Sequence[int]] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    passes: Sequence[Mapping[str, str]] = (),
) -> tuple[Batch, list[Hidden]]:
    """Check everything and read the device once; raises ``ValueError`` before any work.

    ``inputs`` holds tensors under the modalities' names and padding under ``{name}_padding``; None is as absent.
    ``passes`` says of each denoising pass which of ``masks`` (True where a token is hidden) each modality takes.
    """
    values, paddings = _sort_inputs(adapters, inputs)
    device = next(iter(adapters.values())).cls_embedding.device
    valid = {name: adapters[name].valid(name, value, paddings[name]) for name, value in values.items()}
    for name, value in values.items():
        require_device(name, value, device)
    rows = {name: value.shape[0] for name, value in values.items()}
    places = [(modality, name) for names in passes for modality, name in names.items()]
    if passes:
        wanted = sorted(name for _, name in places)
        got = sorted(masks) if isinstance(masks, Mapping) else describe(masks)
        require(got == wanted, f"masks: expected exactly one for each of {wanted}, got {got}")
    masks = masks or {}
    for modality, name in places:
        mask, real = masks[name], valid[modality]
        require_tensor(f"masks[{name!r}]", mask, (torch.bool,), "[rows, length]", 2)
        shape = list(real.shape)
        require(list(mask.shape) == shape, f"masks[{name!r}]: expected bool {shape}, CLS first, got {describe(mask)}")
        require_device(f"masks[{name!r}]", mask, real.device)
    if samples is None:
        check_samples(rows, None)
    else:
        _check_sample_rows(samples, device)

    faults = [fault for name, value in values.items() for fault in adapters[name].faults(name, value, paddings[name])]
    visible = {name: valid[modality] & ~masks[name] for modality, name in places}
    read = read_together(
        {("lengths", name): mask.sum(1) for name, mask in valid.items()}
        | {("fault", i): count for i, (count, _) in enumerate(faults)}
        | {("sample", name): value for name, value in (samples or {}).items() if isinstance(value, Tensor)}
        | {("visible", name): mask.sum(1) for name, mask in visible.items()}
        | {("hidden CLS", name): masks[name][:, 0].sum() for name in visible}
    )
    for i, (_, message) in enumerate(faults):
        (count,) = read["fault", i]
        require(not count, lambda message=message, count=count: message(count))
    for name in visible:
        require(not read["hidden CLS", name][0], f"masks[{name!r}]: expected False at CLS, column 0, got True there")
    lengths = {name: read["lengths", name] for name in valid}
    sample_of = None
    if samples is not None:
        found: dict[str, Any] = {name: read.get(("sample", name), value) for name, value in samples.items()}
        sample_of = check_samples(rows, found)
    hidden = []
    for names in passes:
        visible_lengths = {modality: read["visible", name] for modality, name in names.items()}
        counts = {modality: sum(lengths[modality]) - sum(visible_lengths[modality]) for modality in names}
        hidden_masks = {modality: masks[name] & valid[modality] for modality, name in names.items()}
        subset = Subset({modality: visible[name] for modality, name in names.items()}, visible_lengths)
        hidden.append(Hidden(hidden_masks, counts, subset))
    return Batch(values, Subset(valid, lengths), sample_of), hidden


def _sort_inputs(
    adapters: Mapping[str, Adapter], inputs: Mapping[str, Tensor | None]
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """The modalities' tensors in the order of a sequence, and the padding of each, None for none."""
    known = ", ".join(adapters)
    given = {name: value for name, value in inputs.items() if value is not None}
    padded = {f"{name}_padding": name for name, adapter in adapters.items() if adapter.takes_padding}
    for name in given:
        require(
            name in adapters or name in padded,
            f"{name}: expected no tensor, got one: the model was built without this modality; it has {known}",
        )
    values = {name: given[name] for name in adapters if name in given}
    for key, name in padded.items():
        require(name in values or key not in given, f"{key}: expected {name} with it, got it alone")
    require(bool(values), f"{known}: expected at least one modality, got none")
    return values, {name: given.get(f"{name}_padding") for name in values}


def _check_sample_rows(samples: Any, device: torch.device) -> None:
    require(isinstance(samples, Mapping), f"samples: expected {{modality: int64 [rows]}}, got {describe(samples)}")
    for name, value in samples.items():
        if isinstance(value, Tensor):
            fits = value.dtype in INTEGERS and value.dim() == 1 and value.device.type in ("cpu", device.type)
        else:
            fits = isinstance(value, Sequence) and all(type(item) is int for item in value)
        require(fits, f"samples[{name!r}]: expected int64 [rows] or a list of integers, got {describe(value)}")
